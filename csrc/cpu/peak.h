// What single queries would attend to, were the units of a row all there is.
#pragma once
#include "attend_tile.h"

namespace infllm {
namespace {

template <class T>
void weigh(const SelectPeakArgs& args, const PeakItem& item, float* highest, float* sum, float* scratch) {
  const Sizes& z = args.sizes;
  const int64_t m = (item.last - item.first) * z.group(), *units = args.units_of(item.row);
  const Queries queries{scratch, scratch + m * z.head_size};
  float *scores = queries.far + m * z.head_size, unused;
  load_queries<T>(args, item, queries);
  Products<T> products(z, m, queries, scores + m * kTileTokens);
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
