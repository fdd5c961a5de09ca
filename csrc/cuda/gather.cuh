// Copies units from host memory, which the GPU reads in place, into blocks of the paged cache.
#pragma once
#include "warp.cuh"

namespace infllm {

constexpr int kGatherThreads = threads(256, 32);
/// Vectors that a thread has under way at once: host memory is far.
constexpr int kInFlight = 4;
/// Blocks of threads that share a unit, and places that are looked at at once; there are fewer if there is less to do.
constexpr int64_t kUnitBlocks = 16, kPlacesAtOnce = 128;

/// A vector is 16 bytes; a half is the keys, or the values, of one head.
struct GatherArgs {
  const uint4* keys;  // of all units, dense
  const uint4* values;
  uint4* cache;
  int64_t block_stride, half_vectors, kv_heads;
  const int64_t* missing;
  const int64_t* blocks;
  int64_t missing_stride, blocks_stride, num_places;
};

__device__ inline void copy_half(const uint4* from, uint4* to, int64_t count) {
  for (int64_t first = threadIdx.x; first < count; first += kInFlight * kGatherThreads) {
    uint4 vectors[kInFlight] = {};
    for (int i = 0; i < kInFlight; ++i)
      if (first + i * kGatherThreads < count) vectors[i] = from[first + i * kGatherThreads];
    for (int i = 0; i < kInFlight; ++i)
      if (first + i * kGatherThreads < count) to[first + i * kGatherThreads] = vectors[i];
  }
}

/// The halves of a unit that fall to this block of threads: in the cache, keys and values of a head stand together.
__device__ inline void copy_unit(const GatherArgs& a, int64_t unit, int64_t block) {
  for (int64_t half = blockIdx.x; half < 2 * a.kv_heads; half += gridDim.x) {
    const uint4* from = half % 2 ? a.values : a.keys;
    copy_half(from + (unit * a.kv_heads + half / 2) * a.half_vectors,
              a.cache + block * a.block_stride + half * a.half_vectors, a.half_vectors);
  }
}

/// Most places are hits, with nothing to copy: each lane looks at one, and the warp goes on to those with a unit.
__global__ void __launch_bounds__(kGatherThreads) gather_kernel(GatherArgs a) {
  const int64_t step = gridDim.y;
  for (int64_t first = blockIdx.y; first < a.num_places; first += step * kWarp) {
    const int64_t own = first + lane_of_thread() * step;
    const int64_t unit = own < a.num_places ? a.missing[own * a.missing_stride] : -1;
    for (unsigned todo = __ballot_sync(kAllLanes, unit >= 0); todo; todo &= todo - 1) {
      const int source = __ffs(todo) - 1;
      copy_unit(a, __shfl_sync(kAllLanes, unit, source), a.blocks[(first + source * step) * a.blocks_stride]);
    }
  }
}

}  // namespace infllm
