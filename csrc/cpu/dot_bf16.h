// Products of bfloat16 pairs, summed in float32, by AVX-512's dot-product instruction.
#pragma once
#include "product.h"

namespace infllm {
namespace {

#ifdef INFLLM_EMULATE
inline Vec dot_pairs(Vec sum, UVec a, UVec b) {
  sum += as_floats(a & 0xffff0000) * as_floats(b & 0xffff0000);
  return sum + as_floats(a << 16) * as_floats(b << 16);
}
inline void round_16(const float* from, bf16* to) {
  for (int i = 0; i < 16; ++i) to[i] = from_float<bf16>(from[i]);
}
#else
inline Vec dot_pairs(Vec sum, UVec a, UVec b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
inline void round_16(const float* from, bf16* to) {
  const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from));
  __builtin_memcpy(to, &rounded, sizeof rounded);
}
#endif

/// count: a multiple of 16.
inline void round_rows(const float* from, int64_t count, bf16* to) {
  for (int64_t i = 0; i < count; i += 16) round_16(from + i, to + i);
}

inline UVec splat_pair(const bf16* pair) {
  uint32_t both;
  __builtin_memcpy(&both, pair, 4);
  return both - UVec{};
}

template <int RM, int P>
inline void dot_block(const bf16* a, int64_t a_stride, const Panels<bf16>& b, int64_t k, float* c, int64_t c_stride,
                      bool add) {
  Vec acc[RM][P];
  for (int r = 0; r < RM; ++r)
    for (int p = 0; p < P; ++p) acc[r][p] = add ? load(c + r * c_stride + p * kPanel) : Vec{};
  for (int64_t row = 0; row < k; row += 2) {
    UVec both[P];
    for (int p = 0; p < P; ++p) {
      if constexpr (RM <= 3) fetch_rows(b.first + (row * P + 2 * p) * kPanel, b.ahead);
      both[p] = load_bits(b.first + p * b.stride + row * kPanel);
      if (row + 1 == k) both[p] &= 0xffff;  // the partner of the last row may be uninitialized
    }
    for (int r = 0; r < RM; ++r)
      for (int p = 0; p < P; ++p) acc[r][p] = dot_pairs(acc[r][p], splat_pair(a + r * a_stride + row), both[p]);
  }
  for (int r = 0; r < RM; ++r)
    for (int p = 0; p < P; ++p) store(c + r * c_stride + p * kPanel, acc[r][p]);
}

template <int RM, int P>
inline void dot_rows(const bf16*& a, int64_t a_stride, const Panels<bf16>& b, int64_t k, float*& c, int64_t c_stride,
                     bool add, int64_t& m) {
  for (; m >= RM; m -= RM, a += RM * a_stride, c += RM * c_stride)
    dot_block<RM, P>(a, a_stride, b, k, c, c_stride, add);
}

template <int P>
inline void dot_panels(const bf16* a, int64_t a_stride, int64_t m, const Panels<bf16>& b, int64_t k, float* c,
                       int64_t c_stride, bool add) {
  constexpr int kRows = 24 / P;
  dot_rows<kRows, P>(a, a_stride, b, k, c, c_stride, add, m);
  if constexpr (kRows > 6) dot_rows<6, P>(a, a_stride, b, k, c, c_stride, add, m);
  dot_rows<3, P>(a, a_stride, b, k, c, c_stride, add, m);
  dot_rows<1, P>(a, a_stride, b, k, c, c_stride, add, m);
}

/// C[m, panels * 16] (+)= A[m, k] B, as `product` in product.h. Where k is odd, A has one element more, of any value.
inline void dot_product(const bf16* a, int64_t a_stride, int64_t m, const Panels<bf16>& b, int64_t k, float* c,
                        int64_t c_stride, bool add) {
  int64_t p = 0;
  if (m <= 6)
    for (; p + 4 <= b.count; p += 4) dot_panels<4>(a, a_stride, m, b.at(p), k, c + p * kPanel, c_stride, add);
  for (; p + 2 <= b.count; p += 2) dot_panels<2>(a, a_stride, m, b.at(p), k, c + p * kPanel, c_stride, add);
  for (; p < b.count; ++p) dot_panels<1>(a, a_stride, m, b.at(p), k, c + p * kPanel, c_stride, add);
}

}  // namespace
}  // namespace infllm
