// Element types and packing of keys and values. Included by every instruction set: no code from the standard library.
//
// A block holds B tokens of one kv head. Keys lie in panels of 16 tokens, values in panels of 16 dimensions, so that
// both matrix products of attention load 16 neighbours at a time:
//
//     keys   [B / 16][D][16 tokens]            values [D / 16][B][16 dimensions]
//
// bfloat16 interleaves pairs along the summed dimension, as its dot-product instruction wants them:
//
//     keys   [B / 16][D / 2][16 tokens][2]     values [D / 16][B / 2][16 dimensions][2]
//
// A block of the paged cache holds the keys of a head, then its values; a unit of the store has the two in two tensors.
#pragma once
#include <cstdint>

namespace infllm {

constexpr int64_t kPanel = 16;

struct bf16 {
  uint16_t bits;
};
struct fp16 {
  uint16_t bits;
};

template <class T>
constexpr bool kPairs = false;
template <>
constexpr bool kPairs<bf16> = true;

namespace {

/// Place of element (row of the summed dimension, lane) in a panel.
template <class T>
inline int64_t in_panel(int64_t row, int64_t lane) {
  return kPairs<T> ? (row / 2) * 2 * kPanel + 2 * lane + row % 2 : row * kPanel + lane;
}
template <class T>
inline int64_t key_index(int64_t head_size, int64_t token, int64_t dim) {
  return token / kPanel * kPanel * head_size + in_panel<T>(dim, token % kPanel);
}
template <class T>
inline int64_t value_index(int64_t block_size, int64_t token, int64_t dim) {
  return dim / kPanel * kPanel * block_size + in_panel<T>(token, dim % kPanel);
}

inline float bits_to_float(uint32_t bits) {
  float value;
  __builtin_memcpy(&value, &bits, 4);
  return value;
}
inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  __builtin_memcpy(&bits, &value, 4);
  return bits;
}

inline float to_float(float x) { return x; }
inline float to_float(bf16 x) { return bits_to_float(uint32_t(x.bits) << 16); }
inline float to_float(fp16 x) {
  uint32_t sign = uint32_t(x.bits & 0x8000) << 16, rest = x.bits & 0x7fff;
  if (rest >= 0x7c00) return bits_to_float(sign | 0x7f800000 | (rest & 0x3ff) << 13);
  // The exponent's bias goes from 15 to 127 by a product, which also normalizes subnormal numbers.
  return bits_to_float(float_to_bits(bits_to_float(rest << 13) * 0x1p112f) | sign);
}

/// Rounds to nearest, ties to even.
template <class T>
inline T from_float(float x);
template <>
inline float from_float<float>(float x) {
  return x;
}
template <>
inline bf16 from_float<bf16>(float x) {
  uint32_t bits = float_to_bits(x);
  if (x != x) return {uint16_t(bits >> 16 | 0x40)};
  return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
template <>
inline fp16 from_float<fp16>(float x) {
  uint32_t bits = float_to_bits(x), sign = bits >> 16 & 0x8000, size = bits & 0x7fffffff;
  if (size > 0x7f800000) return {uint16_t(sign | 0x7e00)};
  if (size >= 0x47800000) return {uint16_t(sign | 0x7c00)};
  if (size < 0x38800000) {  // subnormal: let the addition round to multiples of 2^-24
    return {uint16_t(sign | (float_to_bits(bits_to_float(size) + 0.5f) - 0x3f000000))};
  }
  return {uint16_t(sign | ((size - 0x38000000 + 0xfff + (size >> 13 & 1)) >> 13))};
}

}  // namespace
}  // namespace infllm
