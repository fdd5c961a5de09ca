// Inverse and far rotation (see attention/rope.py): products of complex numbers, one for each pair of dimensions.
#pragma once
#include "kernels.h"
#include "vector.h"

namespace infllm {
namespace {

struct Pair {
  int64_t first, second;
};
inline Pair pair_at(const Rope& rope, int64_t i) {
  return rope.neox ? Pair{i, i + rope.rotary_dim / 2} : Pair{2 * i, 2 * i + 1};
}

/// cos and sin [rotary_dim / 2] that take the rotation of `position` off. Divides by cos^2 + sin^2, so that rounded
/// tables and tables with an attention factor invert exactly.
inline void inverse_rotation(const Rope& rope, int64_t position, float* cos, float* sin) {
  const int64_t pairs = rope.rotary_dim / 2;
  const float* row = rope.cos_sin + position * rope.rotary_dim;
  for (int64_t i = 0; i < pairs; ++i) {
    const float c = row[i], s = row[pairs + i], norm = c * c + s * s;
    cos[i] = c / norm;
    sin[i] = -s / norm;
  }
}

/// cos and sin [rotary_dim / 2] that turn a query at `position` into one at distance n_local - 1 from keys at position 0.
inline void far_rotation(const Rope& rope, int64_t position, int64_t n_local, float* cos, float* sin) {
  const int64_t pairs = rope.rotary_dim / 2;
  const float* far = rope.cos_sin + (n_local - 1) * rope.rotary_dim;
  const float factor = rope.cos_sin[0];  // what a key at position 0 would carry
  inverse_rotation(rope, position, cos, sin);
  for (int64_t i = 0; i < pairs; ++i) {
    const float c = cos[i], s = sin[i];
    cos[i] = (c * far[i] - s * far[pairs + i]) * factor;
    sin[i] = (s * far[i] + c * far[pairs + i]) * factor;
  }
}

/// out = x turned, [head_size]; dimensions behind rotary_dim stay.
inline void turn(const Rope& rope, int64_t head_size, const float* x, const float* cos, const float* sin, float* out) {
  for (int64_t i = 0; i < rope.rotary_dim / 2; ++i) {
    const Pair at = pair_at(rope, i);
    const float a = x[at.first], b = x[at.second];
    out[at.first] = a * cos[i] - b * sin[i];
    out[at.second] = b * cos[i] + a * sin[i];
  }
  for (int64_t d = rope.rotary_dim; d < head_size; ++d) out[d] = x[d];
}

/// Take the rotation off packed keys: panels of 16 tokens, the first at `position`; float32 panels out.
/// coefficients: kCoefficients floats of scratch.
template <class T>
inline void unrotate_panels(const Rope& rope, int64_t head_size, const T* keys, int64_t position, int64_t panels,
                            float* out, float* coefficients) {
  const int64_t pairs = rope.rotary_dim / 2;
  float* cos = coefficients;
  float* sin = cos + pairs * kPanel;
  float token_cos[kMaxHeadSize / 2], token_sin[kMaxHeadSize / 2];
  for (int64_t p = 0; p < panels; ++p) {
    float* panel = out + p * kPanel * head_size;
    expand(keys + p * kPanel * head_size, 0, panel, 0, 1, head_size);
    for (int64_t token = 0; token < kPanel; ++token) {
      inverse_rotation(rope, position + p * kPanel + token, token_cos, token_sin);
      for (int64_t i = 0; i < pairs; ++i) {
        cos[i * kPanel + token] = token_cos[i];
        sin[i * kPanel + token] = token_sin[i];
      }
    }
    for (int64_t i = 0; i < pairs; ++i) {
      const Pair at = pair_at(rope, i);
      for (int lane = 0; lane < kPanel; lane += kWidth) {
        float *first = panel + at.first * kPanel + lane, *second = panel + at.second * kPanel + lane;
        const Vec a = load(first), b = load(second), c = load(cos + i * kPanel + lane), s = load(sin + i * kPanel + lane);
        store(first, a * c - b * s);
        store(second, b * c + a * s);
      }
    }
  }
}

/// Panels of float32 rows, rounded to T and packed as keys.
template <class T>
inline void pack_panels(const float* from, int64_t head_size, int64_t panels, T* to) {
  for (int64_t p = 0; p < panels; ++p, from += kPanel * head_size, to += kPanel * head_size)
    for (int64_t row = 0; row < head_size; ++row)
      for (int64_t lane = 0; lane < kPanel; ++lane) to[in_panel<T>(row, lane)] = from_float<T>(from[row * kPanel + lane]);
}

}  // namespace
}  // namespace infllm
