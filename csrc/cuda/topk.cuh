// Exact top-k: the stored blocks that each row attends to, given the scores of its units.
//
// A row has a block of threads. The lowest score that is taken is found digit by digit, by counting keys in shared
// memory (radix select); then each warp walks over its share of the units, in order, and writes down those taken.
#pragma once
#include <algorithm>

#include "../cpu/problem.h"
#include "warp.cuh"

namespace infllm {

constexpr int kTopkThreads = threads(512, 64);
constexpr int kTopkWarps = kTopkThreads / kWarp;
constexpr int kDigits = 256;

struct TopkArgs {
  const float* scores;  // row r, unit i: scores[r * score_stride + i]
  int64_t score_stride;
  const Row* rows;
  const int64_t* units;
  int64_t* chosen;  // [rows, num_chosen]
  int64_t num_chosen, init_blocks, topk;
};

/// The lowest key that is taken, and how many units with just this key are: the first ones.
struct Cut {
  uint32_t key;
  int ties;
};

/// Extends the cut found so far by the digit at `shift`, one warp together. `count`: keys that agree with it, by digit.
__device__ inline void add_digit(Cut found, const int* count, int shift, Cut* cut) {
  constexpr int kShare = kDigits / kWarp;
  const int lane = lane_of_thread(), highest = kDigits - 1 - lane * kShare;
  int own = 0;
  for (int i = 0; i < kShare; ++i) own += count[highest - i];
  int up_to_own = own;
  for (int step = 1; step < kWarp; step *= 2) {
    const int other = __shfl_up_sync(kAllLanes, up_to_own, step);
    if (lane >= step) up_to_own += other;
  }
  int above = up_to_own - own;  // keys with digits higher than this lane's
  if (found.ties <= above || found.ties > up_to_own) return;
  int digit = highest;
  for (; found.ties - above > count[digit]; --digit) above += count[digit];
  *cut = {found.key | static_cast<uint32_t>(digit) << shift, found.ties - above};
}

/// The cut that takes topk of n scores, 0 < topk < n; all threads of the block together.
__device__ inline Cut find_cut(const float* scores, int n, int topk) {
  __shared__ int count[kDigits];
  __shared__ Cut cut;
  if (threadIdx.x == 0) cut = {0, topk};
  uint32_t known = 0;
  for (int shift = 24; shift >= 0; shift -= 8) {
    for (int i = threadIdx.x; i < kDigits; i += kTopkThreads) count[i] = 0;
    __syncthreads();
    const Cut found = cut;
    for (int i = threadIdx.x; i < n; i += kTopkThreads) {
      const uint32_t key = ordered_key(scores[i]);
      if ((key & known) == found.key) atomicAdd(&count[key >> shift & (kDigits - 1)], 1);
    }
    __syncthreads();
    if (threadIdx.x < kWarp) add_digit(found, count, shift, &cut);
    __syncthreads();
    known |= static_cast<uint32_t>(kDigits - 1) << shift;
  }
  return cut;
}

/// Units whose keys are above the cut, and units whose keys equal it.
struct Tally {
  int above, equal;
};

/// The same of 32 units, one a lane, as bits.
struct Lanes {
  unsigned above, equal;
  __device__ Tally count(unsigned among) const { return {__popc(above & among), __popc(equal & among)}; }
};

__device__ inline Lanes compare(const float* scores, int i, int end, uint32_t cut) {
  const uint32_t key = i < end ? ordered_key(scores[i]) : 0;  // no key is 0
  return {__ballot_sync(kAllLanes, key > cut), __ballot_sync(kAllLanes, key == cut)};
}

/// Writes the units that the cut takes, in order; all threads of the block together.
__device__ inline void write_taken(const float* scores, int n, Cut cut, const int64_t* units, int64_t* taken) {
  __shared__ Tally tallies[kTopkWarps];
  const int warp = threadIdx.x / kWarp, lane = lane_of_thread();
  const int share = (n + kTopkThreads - 1) / kTopkThreads * kWarp;
  const int begin = warp * share, end = std::min(n, begin + share);
  Tally own{0, 0}, before{0, 0};
  for (int first = begin; first < end; first += kWarp) {
    const Tally more = compare(scores, first + lane, end, cut.key).count(kAllLanes);
    own = {own.above + more.above, own.equal + more.equal};
  }
  if (lane == 0) tallies[warp] = own;
  __syncthreads();
  for (int w = 0; w < warp; ++w) before = {before.above + tallies[w].above, before.equal + tallies[w].equal};

  for (int first = begin; first < end; first += kWarp) {
    const Lanes lanes = compare(scores, first + lane, end, cut.key);
    const Tally lower = lanes.count((1u << lane) - 1), all = lanes.count(kAllLanes);
    const int ties = before.equal + lower.equal;
    if (lanes.above >> lane & 1 || (lanes.equal >> lane & 1 && ties < cut.ties))
      taken[before.above + lower.above + std::min(ties, cut.ties)] = units[first + lane];
    before = {before.above + all.above, before.equal + all.equal};
  }
}

__global__ void __launch_bounds__(kTopkThreads) topk_kernel(TopkArgs a) {
  const Row row = a.rows[blockIdx.x];
  const int64_t stored = row.start < row.end ? row.stored : 0;
  const int64_t initial = std::min(a.init_blocks, stored), n = stored - initial;
  const int64_t without_scores = n <= a.topk ? stored : initial, num_taken = initial + std::min(n, a.topk);
  const int64_t* units = a.units + row.units;
  int64_t* chosen = a.chosen + blockIdx.x * a.num_chosen;
  for (int64_t i = threadIdx.x; i < a.num_chosen; i += kTopkThreads) {
    if (i < without_scores) chosen[i] = units[i];
    if (i >= num_taken) chosen[i] = -1;
  }
  if (n <= a.topk || a.topk == 0) return;
  const float* scores = a.scores + blockIdx.x * a.score_stride;
  const Cut cut = find_cut(scores, static_cast<int>(n), static_cast<int>(a.topk));
  write_taken(scores, static_cast<int>(n), cut, units + initial, chosen + initial);
}

}  // namespace infllm
