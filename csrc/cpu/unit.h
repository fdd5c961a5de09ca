// Writing tokens, scoring units and sealing them.
#pragma once
#include "peak.h"
#include "rotate.h"

namespace infllm {
namespace {

/// Keys and values of the batch's tokens [first, last) into their slots.
template <class T>
void write(const WriteArgs& args, int64_t first, int64_t last) {
  const Sizes& z = args.sizes;
  for (int64_t n = first; n < last; ++n) {
    const int64_t block = args.slots[n] / z.block_size, token = args.slots[n] % z.block_size;
    for (int64_t h = 0; h < z.kv_heads; ++h) {
      const T *key = args.key.at<const T>(n, h), *value = args.value.at<const T>(n, h);
      const int64_t place = block * args.cache.block_stride + h * args.cache.head_stride;
      T *keys = (T*)args.cache.keys + place, *values = (T*)args.cache.values + place;
      for (int64_t d = 0; d < z.head_size; ++d) {
        keys[key_index<T>(z.head_size, token, d)] = key[d];
        values[value_index<T>(z.block_size, token, d)] = value[d];
      }
    }
  }
}

template <class T>
void far_sum(const SelectArgs& args, int64_t row_index, int64_t head, float* total) {
  const Row& row = args.rows[row_index];
  const int64_t size = args.sizes.head_size;
  float cos[kMaxHeadSize / 2], sin[kMaxHeadSize / 2], query[kMaxHeadSize], far[kMaxHeadSize];
  for (int64_t d = 0; d < size; ++d) total[d] = 0;
  for (int64_t t = row.start; t < row.end; ++t) {
    const T* from = args.query.at<const T>(row.place(t), head);
    far_rotation(args.rope, t, args.n_local, cos, sin);
    for (int64_t d = 0; d < size; ++d) query[d] = to_float(from[d]);
    turn(args.rope, size, query, cos, sin, far);
    for (int64_t d = 0; d < size; ++d) total[d] += far[d];
  }
}

/// Units whose representatives are asked for before they are scored: their ids need not be neighbours.
constexpr int64_t kUnitsAhead = 8;

template <class T>
void score(const SelectMeanArgs& args, const float* query, const int64_t* units, int64_t count, float* scores) {
  constexpr int64_t kSums = 4, kStep = kSums * kWidth, kLine = 64 / sizeof(T);
  const int64_t length = args.sizes.heads * args.sizes.head_size;
  const T* representatives = (const T*)args.representatives;
  for (int64_t u = 0; u < count; ++u) {
    const T* representative = representatives + units[u] * length;
    const T* ahead = representatives + units[u + kUnitsAhead < count ? u + kUnitsAhead : u] * length;
    for (int64_t i = 0; i < length; i += kLine) __builtin_prefetch(ahead + i);
    Vec total[kSums] = {};
    int64_t i = 0;
    for (; i + kStep <= length; i += kStep)
      for (int64_t j = 0; j < kSums; ++j)
        total[j] += load_plain(representative + i + j * kWidth) * load(query + i + j * kWidth);
    for (; i < length; i += kWidth) total[0] += load_plain(representative + i) * load(query + i);
    scores[u] = sum(total[0] + total[1] + (total[2] + total[3]));
  }
}

/// Mean of the keys of the repr_topk tokens that received most attention; the earlier token on equal attention.
/// keys: float32 panels; received: [block_size].
template <class T>
inline void represent(const Sizes& z, const float* keys, const float* received, int64_t repr_topk, T* representative) {
  float total[kMaxHeadSize] = {};
  float last = __builtin_inff();
  int64_t last_token = -1;
  for (int64_t k = 0; k < repr_topk; ++k) {
    int64_t best = -1;
    for (int64_t token = 0; token < z.block_size; ++token) {
      const bool behind_last = received[token] < last || (received[token] == last && token > last_token);
      if (behind_last && (best < 0 || received[token] > received[best])) best = token;
    }
    if (best < 0) break;  // not a number among the sums
    for (int64_t d = 0; d < z.head_size; ++d) total[d] += keys[key_index<float>(z.head_size, best, d)];
    last = received[best];
    last_token = best;
  }
  for (int64_t d = 0; d < z.head_size; ++d) representative[d] = from_float<T>(total[d] / repr_topk);
}

/// One kv head of a block that has left every window: keys un-rotated and values to the store, and representatives.
template <class T>
void seal(const SealArgs& args, int64_t index, int64_t kv_head, float* scratch) {
  const Sizes& z = args.sizes;
  const Leaving& leaving = args.leaving[index];
  const int64_t from = leaving.physical * args.cache.block_stride + kv_head * args.cache.head_stride;
  const int64_t to = leaving.unit * args.store.block_stride + kv_head * args.store.head_stride;
  const int64_t panels = z.block_size / kPanel;
  float* keys = scratch + kCoefficients;
  unrotate_panels(args.rope, z.head_size, (const T*)args.cache.keys + from, leaving.block * z.block_size, panels, keys,
                  scratch);
  pack_panels(keys, z.head_size, panels, (T*)args.store.keys + to);
  __builtin_memcpy((T*)args.store.values + to, (const T*)args.cache.values + from, z.block_elements() * sizeof(T));
  if (!leaving.is_unit) return;
  for (int64_t h = kv_head * z.group(); h < (kv_head + 1) * z.group(); ++h)
    represent(z, keys, args.received + (leaving.physical * z.heads + h) * z.block_size, args.repr_topk,
              (T*)args.representatives + (leaving.unit * z.heads + h) * z.head_size);
}

template <class T>
constexpr Kernels make_kernels() {
  return {write<T>, attend<T>, finish<T>, far_sum<T>, score<T>, weigh<T>, seal<T>};
}

}  // namespace
}  // namespace infllm
