// Attention of one item: queries of one kv head against a range of key tiles, with a running softmax.
#pragma once
#include "kernels.h"
#include "product.h"
#include "rotate.h"
#ifdef INFLLM_BF16_DOT
#include "dot_bf16.h"
#endif

namespace infllm {
namespace {

constexpr int64_t kFar = int64_t(1) << 40;
constexpr float kNothing = -__builtin_inff();
constexpr float kLog2E = 1.44269504088896341f;  // exponentials are powers of two

/// One key tile: columns [begin, end) of keys at token `token`, begin and capacity multiples of 16. Query t sees the
/// columns [max(begin, t + low), min(end, t + high)).
template <class T>
struct Tile {
  const T* keys;    // panels from column 0
  const T* values;  // rows from column 0, panel stride block_size * 16
  int64_t begin, end, low, high;
  bool far, local;
  int64_t panels() const { return (end - begin + kPanel - 1) / kPanel; }
};

/// The columns that any query of [first, last) sees.
template <class T>
inline void clip(Tile<T>& tile, int64_t width, int64_t first, int64_t last) {
  const int64_t low = first + tile.low, high = last - 1 + tile.high;
  tile.begin = low > 0 ? low / kPanel * kPanel : 0;
  tile.end = high < width ? high : width;
}

template <class T>
inline Tile<T> tile_at(const AttendArgs& args, const AttendItem& item, const Tiles& tiles, int64_t index) {
  const Sizes& z = args.sizes;
  const Row& row = args.rows[item.row];
  Tile<T> tile{};
  int64_t block, column;  // column: first token of the tile in its block
  const Packed* from = &args.cache;
  if (index < tiles.num_local + tiles.num_edge) {
    tile.local = index < tiles.num_local;
    tile.far = !tile.local;
    const int64_t token =
        tile.local ? tiles.local_begin + index * tiles.width : row.edge + (index - tiles.num_local) * tiles.width;
    const int64_t out_of_window = 1 - args.n_local - token;  // relative to the query's position
    tile.low = tile.local ? out_of_window : -kFar;
    tile.high = tile.local ? 1 - token : out_of_window;
    block = args.table[row.table * args.table_stride + token / z.block_size];
    column = token % z.block_size;
  } else {
    tile.far = true;
    tile.low = -kFar;
    tile.high = kFar;
    const int64_t token = (index - tiles.num_local - tiles.num_edge) * tiles.width;
    block = args.chosen[item.row * args.num_chosen + token / z.block_size];
    column = token % z.block_size;
    from = &args.stored;
  }
  const int64_t place = block * from->block_stride + item.kv_head * from->head_stride;
  tile.keys = (const T*)from->keys + place + column * z.head_size;
  tile.values = (const T*)from->values + place + column * kPanel;
  clip(tile, tiles.width, item.first, item.last);
  return tile;
}

/// Queries of an item in float32 [M, head_size], as given and, where some have left the window, at the far position.
struct Queries {
  float *near, *far;
};

template <class T, class Args, class Item>
inline void load_queries(const Args& args, const Item& item, Queries to) {
  const Sizes& z = args.sizes;
  const Tokens& query = args.query;
  const Row& row = args.rows[item.row];
  const bool leaves_window = item.last > args.n_local;
  float cos[kMaxHeadSize / 2], sin[kMaxHeadSize / 2];
  int64_t at = 0;
  for (int64_t t = item.first; t < item.last; ++t) {
    if (leaves_window) far_rotation(args.rope, t, args.n_local, cos, sin);
    for (int64_t g = 0; g < z.group(); ++g, at += z.head_size) {
      const T* from = query.at<const T>(row.place(t), item.kv_head * z.group() + g);
      for (int64_t d = 0; d < z.head_size; ++d) to.near[at + d] = to_float(from[d]);
      if (leaves_window) turn(args.rope, z.head_size, to.near + at, cos, sin, to.far + at);
    }
  }
}

/// The keys (wherever they were un-rotated to) and the values of a tile; the next tile lies ahead.
template <class T>
inline Panels<T> key_panels(const Sizes& z, const Tile<T>& tile, const T* keys, const Tile<T>& next) {
  const int64_t ahead = (const char*)next.keys - (const char*)keys;
  return {keys + tile.begin * z.head_size, kPanel * z.head_size, tile.panels(), ahead};
}
template <class T>
inline Panels<T> value_panels(const Sizes& z, const Tile<T>& tile, const Tile<T>& next) {
  const int64_t ahead = (const char*)next.values - (const char*)tile.values;
  return {tile.values + tile.begin * kPanel, z.block_size * kPanel, z.head_size / kPanel, ahead};
}

/// How an item multiplies: float32 arithmetic, with tiles of other types expanded once if many rows share them.
template <class T>
class Products {
 public:
  Products(const Sizes& sizes, int64_t m, Queries queries, float* scratch)
      : z_(sizes), m_(m), queries_(queries), keys_(scratch), values_(scratch + kTileTokens * z_.head_size) {}

  /// scores [m, stride] of queries, near or far, and keys.
  void scores(bool far, const Panels<T>& from, float* scores, int64_t stride) {
    const float* q = far ? queries_.far : queries_.near;
    if (expands()) {
      expand(from.first, from.stride, keys_, from.stride, from.count, z_.head_size);
      const Panels<float> expanded{keys_, from.stride, from.count, 0};
      product(q, z_.head_size, m_, expanded, z_.head_size, scores, stride, false);
    } else {
      product(q, z_.head_size, m_, from, z_.head_size, scores, stride, false);
    }
  }

  /// output [m, head_size] += probabilities [m, stride] times the tile's values.
  void values(const Tile<T>& tile, const Tile<T>& next, const float* probabilities, int64_t stride, float* output) {
    const Panels<T> from = value_panels(z_, tile, next);
    const int64_t count = tile.end - tile.begin;
    if (expands()) {
      expand(from.first, from.stride, values_, kTileTokens * kPanel, from.count, count);
      const Panels<float> expanded{values_, kTileTokens * kPanel, from.count, 0};
      product(probabilities, stride, m_, expanded, count, output, z_.head_size, true);
    } else {
      product(probabilities, stride, m_, from, count, output, z_.head_size, true);
    }
  }

 private:
  bool expands() const { return sizeof(T) < 4 && m_ > 6; }
  const Sizes& z_;
  const int64_t m_;
  const Queries queries_;
  float *keys_, *values_;
};

#ifdef INFLLM_BF16_DOT
/// bfloat16 by its dot-product instruction: queries and probabilities are rounded, sums are float32.
template <>
class Products<bf16> {
 public:
  Products(const Sizes& sizes, int64_t m, Queries queries, float* scratch)
      : z_(sizes), m_(m), near_((bf16*)scratch), far_(near_ + m * z_.head_size), p_(far_ + m * z_.head_size) {
    round_rows(queries.near, m * z_.head_size, near_);
    round_rows(queries.far, m * z_.head_size, far_);
  }
  void scores(bool far, const Panels<bf16>& from, float* scores, int64_t stride) {
    dot_product(far ? far_ : near_, z_.head_size, m_, from, z_.head_size, scores, stride, false);
  }
  void values(const Tile<bf16>& tile, const Tile<bf16>& next, const float* probabilities, int64_t stride,
              float* output) {
    for (int64_t r = 0; r < m_; ++r)
      round_rows(probabilities + r * stride, tile.panels() * kPanel, p_ + r * kTileTokens);
    dot_product(p_, kTileTokens, m_, value_panels(z_, tile, next), tile.end - tile.begin, output, z_.head_size, true);
  }

 private:
  const Sizes& z_;
  const int64_t m_;
  bf16 *near_, *far_, *p_;
};
#endif

/// Scores of one query to exponentials, in place; updates its running maximum and sum, and returns the factor by which
/// what was summed before has to shrink. Columns outside [low, high) are not seen.
inline float soften(float* scores, int64_t columns, int64_t low, int64_t high, float scale, float& running,
                    float& total, float& tile_total) {
  const int64_t padded = (columns + kPanel - 1) / kPanel * kPanel;
  for (int64_t j = 0; j < low && j < padded; ++j) scores[j] = kNothing;
  for (int64_t j = high > 0 ? high : 0; j < padded; ++j) scores[j] = kNothing;
  Vec best = splat(kNothing);
  for (int64_t j = 0; j < padded; j += kWidth) best = highest(best, load(scores + j));
  const float top = highest(best) * scale, now = top > running ? top : running;
  tile_total = 0;
  if (now == kNothing) {
    for (int64_t j = 0; j < padded; ++j) scores[j] = 0;
    return 1;
  }
  Vec tile_sum{};
  for (int64_t j = 0; j < padded; j += kWidth) {
    const Vec p = exp2(load(scores + j) * scale - now);
    store(scores + j, p);
    tile_sum += p;
  }
  tile_total = sum(tile_sum);
  const float shrink = exp2(running - now);
  running = now;
  total = total * shrink + tile_total;
  return shrink;
}

template <class T>
void attend(const AttendArgs& args, const AttendItem& item, const Tiles& tiles, const AttendItem& then,
            const Tiles& then_tiles, const Partial& out, float* scratch) {
  const Sizes& z = args.sizes;
  const int64_t group = z.group(), m = (item.last - item.first) * group, size = z.head_size;
  const float scale = args.scale * kLog2E;
  Queries queries{scratch, scratch + m * size};
  float* own_scores = queries.far + m * size;
  T* unrotated = (T*)(own_scores + m * kTileTokens);
  float* coefficients = (float*)unrotated + kTileTokens * size;
  float* panels = coefficients + kCoefficients;

  load_queries<T>(args, item, queries);
  Products<T> products(z, m, queries, panels + kTileTokens * size);
  for (int64_t r = 0; r < m; ++r) {
    out.highest[r] = kNothing;
    out.sum[r] = 0;
  }
  for (int64_t i = 0; i < m * size; ++i) out.output[i] = 0;

  for (int64_t index = item.tile_begin; index < item.tile_end; ++index) {
    const Tile<T> tile = tile_at<T>(args, item, tiles, index);
    const T* keys = tile.keys;
    if (tile.far && index < tiles.num_local + tiles.num_edge) {
      // The paged cache holds rotated keys; rounded as they will be in the store.
      const int64_t token = args.rows[item.row].edge + (index - tiles.num_local) * tiles.width;
      unrotate_panels(args.rope, size, keys, token, tile.panels(), panels, coefficients);
      pack_panels(panels, size, tile.panels(), unrotated);
      keys = unrotated;
    }
    const bool kept = tile.local && out.kept;
    float* scores = kept ? out.kept + index * m * tiles.width : own_scores;
    const int64_t stride = kept ? tiles.width : kTileTokens, columns = tile.end - tile.begin;
    const Tile<T> next = index + 1 < item.tile_end ? tile_at<T>(args, item, tiles, index + 1)
                                                   : tile_at<T>(args, then, then_tiles, then.tile_begin);
    products.scores(tile.far, key_panels(z, tile, keys, next), scores, stride);
    for (int64_t r = 0; r < m; ++r) {
      const int64_t t = item.first + r / group;
      float total;
      const float shrink = soften(scores + r * stride, columns, t + tile.low - tile.begin,
                                  t + tile.high < tile.end ? t + tile.high - tile.begin : columns, scale,
                                  out.highest[r], out.sum[r], total);
      if (shrink != 1)
        for (int64_t d = 0; d < size; d += kWidth)
          store(out.output + r * size + d, load(out.output + r * size + d) * shrink);
      if (out.tile_highest) out.tile_highest[index * m + r] = out.highest[r];
      if (out.tile_sum && index >= tiles.num_local + tiles.num_edge)
        out.tile_sum[(index - tiles.num_local - tiles.num_edge) * m + r] = total;
    }
    products.values(tile, next, scores, stride, out.output);
  }
}

/// Attention that each local token received from the item's queries: sum over them of probability, by head.
template <class T>
inline void sum_received(const AttendArgs& args, const AttendItem& item, const Tiles& tiles, const Partial& kept,
                         const float* highest_of, const float* inverse_sum, float* received, int64_t stride) {
  const int64_t group = args.sizes.group(), m = (item.last - item.first) * group;
  for (int64_t i = 0; i < group * stride; ++i) received[i] = 0;
  for (int64_t index = 0; index < tiles.num_local; ++index) {
    const Tile<T> tile = tile_at<T>(args, item, tiles, index);
    const float* p = kept.kept + index * m * tiles.width;
    for (int64_t r = 0; r < m; ++r) {
      const float weight = exp2(kept.tile_highest[index * m + r] - highest_of[r]) * inverse_sum[r];
      float* to = received + r % group * stride + index * tiles.width + tile.begin;
      if (weight != 0)
        for (int64_t j = 0; j < tile.panels() * kPanel; j += kWidth)
          store(to + j, load(to + j) + load(p + r * tiles.width + j) * weight);
    }
  }
}

template <class T>
void finish(const AttendArgs& args, const AttendItem& item, const Tiles& tiles, const Partial* partials,
            int64_t num_partials, float* received, int64_t received_stride, float* mass) {
  const Sizes& z = args.sizes;
  const int64_t group = z.group(), m = (item.last - item.first) * group, size = z.head_size;
  const Row& row = args.rows[item.row];
  Partial first = partials[0];
  for (int64_t r = 0; r < m; ++r) {
    float top = kNothing, total = 0;
    for (int64_t i = 0; i < num_partials; ++i) top = partials[i].highest[r] > top ? partials[i].highest[r] : top;
    for (int64_t i = 0; i < num_partials; ++i) {
      const float weight = exp2(partials[i].highest[r] - top);
      total += partials[i].sum[r] * weight;
      for (int64_t d = 0; d < size; d += kWidth) {
        const Vec x = load(partials[i].output + r * size + d) * weight;
        store(first.output + r * size + d, i ? load(first.output + r * size + d) + x : x);
      }
    }
    first.highest[r] = top;
    first.sum[r] = 1 / total;
    T* to = args.output.at<T>(row.place(item.first + r / group), item.kv_head * group + r % group);
    for (int64_t d = 0; d < size; ++d) to[d] = from_float<T>(first.output[r * size + d] * first.sum[r]);
  }
  if (received) sum_received<T>(args, item, tiles, first, first.highest, first.sum, received, received_stride);
  if (mass) {
    const int64_t in_block = z.block_size / tiles.width, before = tiles.num_local + tiles.num_edge;
    for (int64_t i = 0; i < tiles.num_stored * m; ++i) {
      const int64_t tile = i / m, r = i % m;
      const float weight = exp2(first.tile_highest[(before + tile) * m + r] - first.highest[r]) * first.sum[r];
      mass[tile / in_block] += first.tile_sum[i] * weight;
    }
  }
}

}  // namespace
}  // namespace infllm
