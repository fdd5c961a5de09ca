// What single queries would attend to, were the units of a row all there is.
#pragma once
#include "attend_tile.h"

namespace infllm {
namespace {

/// Far queries of an item, [M, head_size].
template <class T>
inline void load_far_queries(const SelectPeakArgs& args, const PeakItem& item, float* to) {
  const Sizes& z = args.sizes;
  const Row& row = args.rows[item.row];
  float cos[kMaxHeadSize / 2], sin[kMaxHeadSize / 2], query[kMaxHeadSize];
  for (int64_t t = item.first; t < item.last; ++t) {
    far_rotation(args.rope, t, args.n_local, cos, sin);
    for (int64_t g = 0; g < z.group(); ++g, to += z.head_size) {
      const T* from = args.query.at<const T>(row.place(t), item.kv_head * z.group() + g);
      for (int64_t d = 0; d < z.head_size; ++d) query[d] = to_float(from[d]);
      turn(args.rope, z.head_size, query, cos, sin, to);
    }
  }
}

template <class T>
void weigh(const SelectPeakArgs& args, const PeakItem& item, float* highest, float* sum, float* scratch) {
  const Sizes& z = args.sizes;
  const int64_t m = (item.last - item.first) * z.group(), *units = args.units_of(item.row);
  float *queries = scratch, *scores = queries + m * z.head_size, unused;
  load_far_queries<T>(args, item, queries);
  Products<T> products(z, m, {queries, queries}, scores + m * kTileTokens);
  const auto keys_of = [&](int64_t u) {
    return (const T*)args.keys + units[u] * args.block_stride + item.kv_head * args.head_stride;
  };
  for (int64_t u = item.unit_begin; u < item.unit_end; ++u) {
    for (int64_t r = 0; r < m; ++r) {
      highest[r * item.num_units + u] = kNothing;
      sum[r * item.num_units + u] = 0;
    }
    const T* following = keys_of(u + 1 < item.num_units ? u + 1 : u);
    for (int64_t left = z.block_size; left > 0; left -= kTileTokens) {
      const int64_t columns = left < kTileTokens ? left : kTileTokens;
      const T* keys = keys_of(u) + (z.block_size - left) * z.head_size;
      const T* next = left > kTileTokens ? keys + kTileTokens * z.head_size : following;
      const int64_t ahead = (const char*)next - (const char*)keys;
      products.scores(true, {keys, kPanel * z.head_size, columns / kPanel, ahead}, scores, kTileTokens);
      for (int64_t r = 0; r < m; ++r)
        soften(scores + r * kTileTokens, columns, 0, columns, args.scale * kLog2E, highest[r * item.num_units + u],
               sum[r * item.num_units + u], unused);
    }
  }
}

}  // namespace
}  // namespace infllm
