// The residency caches (vllm_infllm/memory/residency.py): which slot each chosen unit gets, and who leaves for it.
//
// A row has one warp; a slot belongs to one lane. Since each wanted unit's slot is marked as used now, a slot that
// was last used before now is one that may be given away.
#pragma once
#include "../cpu/problem.h"
#include "warp.cuh"

namespace infllm {

constexpr int64_t kEmpty = -1;
constexpr int64_t kPlaces = 1 << 16;

enum Strategy : int64_t { kLru, kFifo, kLruS };

/// The slots of one request, or with strides those of all. Meanings: Residency in memory/residency.py.
struct Slots {
  int64_t* unit;
  int64_t* arrived;
  int64_t* used;
  float* mass;

  __device__ Slots operator+(int64_t offset) const {
    return {unit + offset, arrived + offset, used + offset, mass + offset};
  }
};

struct ResolveArgs {
  Slots slots;
  int64_t* clock;
  int64_t* counts;
  int64_t num_slots, slots_stride, clock_stride, counts_stride;  // from request to request
  Strategy strategy;
  const Row* rows;
  const int32_t* table;
  int64_t table_stride, init_blocks;
  const int64_t* chosen;  // [rows, num_chosen], as are blocks and missing
  int64_t* blocks;
  int64_t* missing;
  int64_t num_chosen;
};

/// Slots that exist: a slot's block holds tokens of its own until they are stored as a unit.
__device__ inline int64_t num_available(int64_t num_units, int64_t num_slots) {
  return num_units < 0 ? 0 : num_units < num_slots ? num_units : num_slots;
}

/// A slot that may be given away: empty ones first, then by rank, then those whose unit arrived first.
struct Candidate {
  int64_t rank, arrived;
  int slot;

  __device__ bool before(const Candidate& other) const {
    if (rank != other.rank) return rank < other.rank;
    return arrived != other.arrived ? arrived < other.arrived : slot < other.slot;
  }
};

__device__ inline int64_t rank_of(const Slots& slots, int slot, Strategy strategy) {
  if (slots.unit[slot] == kEmpty) return -1;
  if (strategy == kFifo) return 0;
  return strategy == kLru ? slots.used[slot] : static_cast<int64_t>(ordered_key(slots.mass[slot]));
}

/// The slot to be given away, the same on all lanes. There is one: no more units are wanted than there are slots.
__device__ inline int give_away(const Slots& slots, int available, int64_t clock, Strategy strategy) {
  Candidate best{INT64_MAX, INT64_MAX, -1};
  for (int slot = lane_of_thread(); slot < available; slot += kWarp) {
    if (slots.used[slot] == clock) continue;
    const Candidate candidate{rank_of(slots, slot, strategy), slots.arrived[slot], slot};
    if (candidate.before(best)) best = candidate;
  }
  for (int step = kWarp / 2; step; step /= 2) {
    const Candidate other{__shfl_xor_sync(kAllLanes, best.rank, step), __shfl_xor_sync(kAllLanes, best.arrived, step),
                          __shfl_xor_sync(kAllLanes, best.slot, step)};
    if (other.before(best)) best = other;
  }
  return best.slot;
}

/// What one row finds and fills in.
struct RowView {
  const int64_t* wanted;
  int64_t* blocks;
  int64_t* missing;
  const int32_t* slot_block;  // paged block of each slot
  int init_blocks, num_chosen, available;
};

/// Marks wanted units that are resident as used, and fills in their blocks; returns how many this lane found.
__device__ inline int find_resident(const RowView& row, const Slots& slots, int64_t clock) {
  int hits = 0;
  for (int slot = lane_of_thread(); slot < row.available; slot += kWarp) {
    const int64_t unit = slots.unit[slot];
    if (unit == kEmpty) continue;
    for (int place = row.init_blocks; place < row.num_chosen; ++place) {
      if (row.wanted[place] != unit) continue;
      row.blocks[place] = row.slot_block[slot];
      row.missing[place] = -1;
      slots.used[slot] = clock;
      ++hits;
      break;
    }
  }
  return hits;
}

/// Units copied in and evicted; each lane counts its own.
struct Changes {
  int copied, evicted;
};

/// Gives slots to the units that are still missing, one after another.
__device__ inline Changes admit_missing(const RowView& row, const Slots& slots, int64_t clock, Strategy strategy) {
  Changes changes{0, 0};
  const int lane = lane_of_thread();
  for (int first = row.init_blocks; first < row.num_chosen; first += kWarp) {
    const int64_t own = first + lane < row.num_chosen ? row.missing[first + lane] : -1;
    for (unsigned todo = __ballot_sync(kAllLanes, own >= 0); todo; todo &= todo - 1) {
      const int source = __ffs(todo) - 1, place = first + source;
      const int64_t unit = __shfl_sync(kAllLanes, own, source);
      const int slot = give_away(slots, row.available, clock, strategy);
      if (lane != slot % kWarp) continue;
      changes = {changes.copied + 1, changes.evicted + (slots.unit[slot] != kEmpty)};
      slots.unit[slot] = unit;
      slots.arrived[slot] = clock * kPlaces + place;
      slots.used[slot] = clock;
      slots.mass[slot] = 0;
      row.blocks[place] = row.slot_block[slot];
    }
  }
  return changes;
}

/// Blocks of the initial tokens, which are always resident; units count as missing until they are found.
__device__ inline void begin_row(const RowView& row, const int32_t* table, int64_t stored) {
  for (int place = lane_of_thread(); place < row.num_chosen; place += kWarp) {
    const bool initial = place < row.init_blocks;
    row.blocks[place] = initial && place < stored ? table[place] : -1;
    row.missing[place] = initial || stored == 0 ? -1 : row.wanted[place];
  }
}

__global__ void __launch_bounds__(kWarp) resolve_kernel(ResolveArgs a) {
  const Row row = a.rows[blockIdx.x];
  const bool empty = row.start == row.end;
  const int64_t stored = empty ? 0 : row.stored, offset = blockIdx.x * a.num_chosen;
  const int32_t* table = a.table + row.table * a.table_stride;
  const int64_t available = num_available(stored - a.init_blocks, a.num_slots);
  const RowView view{a.chosen + offset,
                     a.blocks + offset,
                     a.missing + offset,
                     table + a.init_blocks,
                     static_cast<int>(a.init_blocks),
                     static_cast<int>(a.num_chosen),
                     static_cast<int>(available)};
  begin_row(view, table, stored);
  if (empty) return;

  const Slots slots = a.slots + row.request * a.slots_stride;
  int64_t* last_clock = a.clock + row.request * a.clock_stride;
  const int64_t clock = *last_clock + 1;
  __syncwarp();  // what begin_row wrote is read by other lanes
  const int hits = find_resident(view, slots, clock);
  __syncwarp();
  const Changes changes = admit_missing(view, slots, clock, a.strategy);
  const int all_hits = warp_sum(hits), copied = warp_sum(changes.copied), evicted = warp_sum(changes.evicted);
  if (lane_of_thread()) return;
  *last_clock = clock;
  int64_t* counts = a.counts + row.request * a.counts_stride;
  counts[0] += all_hits;
  counts[1] += copied;
  counts[2] += evicted;
}

struct AttendedArgs {
  const int64_t* unit;
  float* kept;
  int64_t num_slots, stride;
  float decay;
  const Row* rows;
  int64_t init_blocks;
  const int64_t* chosen;  // [rows, num_chosen], as is mass
  const float* mass;
  int64_t num_chosen;
};

/// Decays the mass of resident units, and adds the attention that they received now. Rounded step by step as in torch.
__global__ void __launch_bounds__(kWarp) attended_kernel(AttendedArgs a) {
  const Row row = a.rows[blockIdx.x];
  if (row.start == row.end) return;
  const int64_t available = num_available(row.stored - a.init_blocks, a.num_slots);
  const int64_t* chosen = a.chosen + blockIdx.x * a.num_chosen;
  const float* mass = a.mass + blockIdx.x * a.num_chosen;
  for (int64_t slot = lane_of_thread(); slot < available; slot += kWarp) {
    const int64_t unit = a.unit[row.request * a.stride + slot];
    if (unit == kEmpty) continue;
    float* kept = a.kept + row.request * a.stride + slot;
    int64_t place = a.init_blocks;
    while (place < a.num_chosen && chosen[place] != unit) ++place;
    *kept = __fadd_rn(__fmul_rn(*kept, a.decay), place < a.num_chosen ? mass[place] : 0.0f);
  }
}

}  // namespace infllm
