// What the kernels share: a warp's lanes together, and the order of scores.
#pragma once
#include <cmath>
#include <cstdint>

#include "launch.h"

namespace infllm {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

__device__ inline int lane_of_thread() { return threadIdx.x % kWarp; }

__device__ inline int warp_sum(int x) {
  for (int step = kWarp / 2; step; step /= 2) x += __shfl_xor_sync(kAllLanes, x, step);
  return x;
}

/// Ordered like the number: NaN is as low as -inf, and -0 equals 0.
__device__ inline uint32_t ordered_key(float x) {
  const uint32_t bits = __float_as_uint(std::isnan(x) ? -INFINITY : x + 0.0f);
  return bits >> 31 ? ~bits : bits | 0x80000000u;
}

}  // namespace infllm
