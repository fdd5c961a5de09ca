// Matrix products with a packed right side: C[m, panels * 16] = A[m, k] * B, B in panels of [k][16].
#pragma once
#include "vector.h"

namespace infllm {
namespace {

/// The right side: panels `stride` elements apart. What lies `ahead` bytes behind them is read soon: few rows of A are
/// done with a panel sooner than memory is, and ask for as much of it, from the first byte on. 0: nothing is.
template <class T>
struct Panels {
  const T* first;
  int64_t stride, count, ahead;

  Panels at(int64_t panel) const { return {first + panel * stride, stride, count - panel, ahead}; }
};

/// Two rows of a panel, into the second-level cache. In order, so that the hardware goes on by itself.
template <class T>
inline void fetch_rows(const T* rows, int64_t ahead) {
  __builtin_prefetch((const char*)rows + ahead, 0, 2);
  if constexpr (sizeof(T) == 4) __builtin_prefetch((const char*)rows + ahead + 64, 0, 2);
}

/// RM rows of A times P panels of B, held in registers.
template <class T, int RM, int P>
inline void product_block(const float* a, int64_t a_stride, const Panels<T>& b, int64_t k, float* c, int64_t c_stride,
                          bool add) {
  Vec acc[RM][P * kVectors];
  for (int r = 0; r < RM; ++r)
    for (int j = 0; j < P * kVectors; ++j) acc[r][j] = add ? load(c + r * c_stride + j * kWidth) : Vec{};
  int64_t row = 0;
  for (; row + 1 < k; row += 2) {
    Vec even[P * kVectors], odd[P * kVectors];
    if constexpr (RM <= 3)
      for (int p = 0; p < P; ++p) fetch_rows(b.first + (row * P + 2 * p) * kPanel, b.ahead);
    for (int p = 0; p < P; ++p) load_rows(b.first + p * b.stride, row, even + p * kVectors, odd + p * kVectors);
    for (int r = 0; r < RM; ++r)
      for (int j = 0; j < P * kVectors; ++j) acc[r][j] += a[r * a_stride + row] * even[j];
    for (int r = 0; r < RM; ++r)
      for (int j = 0; j < P * kVectors; ++j) acc[r][j] += a[r * a_stride + row + 1] * odd[j];
  }
  if (row < k) {
    Vec even[P * kVectors];
    for (int p = 0; p < P; ++p) load_row(b.first + p * b.stride, row, even + p * kVectors);
    for (int r = 0; r < RM; ++r)
      for (int j = 0; j < P * kVectors; ++j) acc[r][j] += a[r * a_stride + row] * even[j];
  }
  for (int r = 0; r < RM; ++r)
    for (int j = 0; j < P * kVectors; ++j) store(c + r * c_stride + j * kWidth, acc[r][j]);
}

/// Rows by RM, and those left over by smaller blocks: as many accumulators as registers allow, at least eight chains.
template <class T, int RM, int P>
inline void product_rows(const float*& a, int64_t a_stride, const Panels<T>& b, int64_t k, float*& c, int64_t c_stride,
                         bool add, int64_t& m) {
  for (; m >= RM; m -= RM, a += RM * a_stride, c += RM * c_stride)
    product_block<T, RM, P>(a, a_stride, b, k, c, c_stride, add);
}

template <class T, int P>
inline void product_panels(const float* a, int64_t a_stride, int64_t m, const Panels<T>& b, int64_t k, float* c,
                           int64_t c_stride, bool add) {
  constexpr int kRegisters = kWidth == 16 ? 24 : 12;
  constexpr int kRows = kRegisters / (P * kVectors);
  product_rows<T, kRows, P>(a, a_stride, b, k, c, c_stride, add, m);
  if constexpr (kRows > 6) product_rows<T, 6, P>(a, a_stride, b, k, c, c_stride, add, m);
  if constexpr (kRows > 3) product_rows<T, 3, P>(a, a_stride, b, k, c, c_stride, add, m);
  product_rows<T, 1, P>(a, a_stride, b, k, c, c_stride, add, m);
}

/// C = A B, or C += A B. Few rows take more panels at a time, to have enough independent sums.
template <class T>
inline void product(const float* a, int64_t a_stride, int64_t m, const Panels<T>& b, int64_t k, float* c,
                    int64_t c_stride, bool add) {
  constexpr int kWide = kWidth == 16 ? 4 : 2, kNarrow = kWidth == 16 ? 2 : 1;
  int64_t p = 0;
  if (m <= 6)
    for (; p + kWide <= b.count; p += kWide)
      product_panels<T, kWide>(a, a_stride, m, b.at(p), k, c + p * kPanel, c_stride, add);
  for (; p + kNarrow <= b.count; p += kNarrow)
    product_panels<T, kNarrow>(a, a_stride, m, b.at(p), k, c + p * kPanel, c_stride, add);
  for (; p < b.count; ++p) product_panels<T, 1>(a, a_stride, m, b.at(p), k, c + p * kPanel, c_stride, add);
}

}  // namespace
}  // namespace infllm
