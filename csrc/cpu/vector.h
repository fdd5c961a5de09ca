// Vectors of the instruction set that the including file was compiled for (INFLLM_WIDTH floats), by the compiler's vector
// extension; intrinsics only where the extension has no word for it. INFLLM_EMULATE leaves them out, so that the code
// of a wide instruction set runs on a machine without it.
#pragma once
#include "layout.h"
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace infllm {
namespace {

constexpr int kWidth = INFLLM_WIDTH;
/// Vectors in a row of a panel.
constexpr int kVectors = kPanel / kWidth;

typedef float Vec __attribute__((vector_size(kWidth * 4)));
typedef uint32_t UVec __attribute__((vector_size(kWidth * 4)));
typedef uint16_t HVec __attribute__((vector_size(kWidth * 2)));

inline Vec load(const float* p) {
  Vec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline void store(float* p, Vec v) { __builtin_memcpy(p, &v, sizeof v); }
inline UVec load_bits(const void* p) {
  UVec v;
  __builtin_memcpy(&v, p, sizeof v);
  return v;
}
inline Vec as_floats(UVec v) { return (Vec)v; }
inline Vec splat(float x) { return x - Vec{}; }

inline Vec highest(Vec a, Vec b) { return a > b ? a : b; }
#if INFLLM_WIDTH == 16 && !defined(INFLLM_EMULATE)
inline float sum(Vec v) { return _mm512_reduce_add_ps(v); }
inline float highest(Vec v) { return _mm512_reduce_max_ps(v); }
#else
inline float sum(Vec v) {
  float total = 0;
  for (int i = 0; i < kWidth; ++i) total += v[i];
  return total;
}
inline float highest(Vec v) {
  float best = v[0];
  for (int i = 1; i < kWidth; ++i) best = v[i] > best ? v[i] : best;
  return best;
}
#endif

/// 2^x to one unit in the last place; exactly 0 below 2^-126, and for minus infinity. x at most 127.
inline Vec exp2(Vec x) {
  const float shift = 0x1.8p23f;  // adding it rounds to an integer, which stands in the low bits
  Vec rounded = x + shift;
  Vec f = x - (rounded - shift);
  Vec p = f * 1.535336188319500e-4f + 1.339887440266574e-3f;
  p = p * f + 9.618437357674640e-3f;
  p = p * f + 5.550332471162809e-2f;
  p = p * f + 2.402264791363012e-1f;
  p = p * f + 6.931472028550421e-1f;
  p = p * f + 1.0f;
  UVec scaled = (UVec)p + ((UVec)rounded << 23);
  return as_floats(x >= -126.0f ? scaled : UVec{});
}
inline float exp2(float x) { return exp2(splat(x))[0]; }

/// kWidth neighbours of any type.
inline Vec load_plain(const float* p) { return load(p); }
inline Vec load_plain(const bf16* p) {
  HVec half;
  __builtin_memcpy(&half, p, sizeof half);
  return as_floats(__builtin_convertvector(half, UVec) << 16);
}
inline Vec load_plain(const fp16* p) {
#if INFLLM_WIDTH == 16 && !defined(INFLLM_EMULATE)
  return _mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)p));
#elif INFLLM_WIDTH == 8
  return _mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)p));
#else
  HVec half;
  __builtin_memcpy(&half, p, sizeof half);
  UVec bits = __builtin_convertvector(half, UVec), rest = bits & 0x7fff;
  UVec finite = (UVec)(as_floats(rest << 13) * 0x1p112f);
  return as_floats((rest < 0x7c00 ? finite : (rest << 13) | 0x7f800000) | (bits & 0x8000) << 16);
#endif
}

// ---- rows of a panel: 16 neighbours as kVectors vectors ----------------------------------------------------------------

inline void load_row(const float* panel, int64_t row, Vec* out) {
  for (int i = 0; i < kVectors; ++i) out[i] = load(panel + row * kPanel + i * kWidth);
}
inline void load_row(const fp16* panel, int64_t row, Vec* out) {
  for (int i = 0; i < kVectors; ++i) out[i] = load_plain(panel + row * kPanel + i * kWidth);
}
/// Row `row`, and row `row + 1` in `next`; row is even. Pairs come out of one load.
template <class T>
inline void load_rows(const T* panel, int64_t row, Vec* out, Vec* next) {
  load_row(panel, row, out);
  load_row(panel, row + 1, next);
}
inline void load_rows(const bf16* panel, int64_t row, Vec* out, Vec* next) {
  for (int i = 0; i < kVectors; ++i) {
    UVec both = load_bits(panel + row * kPanel + 2 * i * kWidth);
    out[i] = as_floats(both << 16);
    next[i] = as_floats(both & 0xffff0000);
  }
}
/// An even row without its partner, which may be uninitialized.
inline void load_row(const bf16* panel, int64_t row, Vec* out) {
  for (int i = 0; i < kVectors; ++i) out[i] = as_floats(load_bits(panel + row * kPanel + 2 * i * kWidth) << 16);
}

/// Panels in float32, rows [0, rows) of each; rows may be odd.
template <class T>
inline void expand(const T* from, int64_t from_stride, float* to, int64_t to_stride, int64_t panels, int64_t rows) {
  for (int64_t p = 0; p < panels; ++p) {
    const T* panel = from + p * from_stride;
    float* out = to + p * to_stride;
    for (int64_t row = 0; row < rows; row += 2) {
      Vec even[kVectors], odd[kVectors];
      const bool last = row + 1 == rows;
      if (last) {
        load_row(panel, row, even);
      } else {
        load_rows(panel, row, even, odd);
      }
      for (int i = 0; i < kVectors; ++i) {
        store(out + row * kPanel + i * kWidth, even[i]);
        if (!last) store(out + (row + 1) * kPanel + i * kWidth, odd[i]);
      }
    }
  }
}

}  // namespace
}  // namespace infllm
