// What each instruction set implements: the work that one thread does alone. schedule.cpp cuts operations into it.
#pragma once
#include "problem.h"

namespace infllm {

/// Keys of one tile are at most this many tokens of one block.
constexpr int64_t kTileTokens = 128;
/// Rows (query tokens times heads of the group) that share a key tile, where there are as many.
constexpr int64_t kTileRows = 96;
/// Most tiles of one split. Fixed, so that results depend neither on the batch nor on the number of threads.
constexpr int64_t kSplitTiles = 8;
/// Largest head size; and room for the cosines and sines of its pairs, for the 16 tokens of a panel.
constexpr int64_t kMaxHeadSize = 256;
constexpr int64_t kCoefficients = kMaxHeadSize * 16;

/// A range of key tiles for the queries [first, last) of one row and one kv head.
struct AttendItem {
  int64_t row, kv_head;
  int64_t first, last;
  int64_t tile_begin, tile_end;
};

/// Units [unit_begin, unit_end) of the row's num_units for the queries [first, last) of one row and one kv head.
struct PeakItem {
  int64_t row, kv_head;
  int64_t first, last;
  int64_t unit_begin, unit_end, num_units;
};

/// What an item leaves behind, not normalized: scores are kept in units of log 2.
///
/// M = (last - first) * group rows, by token, then head.
/// highest, sum: [M]; output: [M, head_size].
/// kept: exponentials of the local tiles [local tiles, M, tile tokens], relative to tile_highest [local tiles, M];
/// both null where nothing is accumulated. tile_sum: [tiles, M] of stored tiles, null without mass.
struct Partial {
  float *highest, *sum, *output, *kept, *tile_highest, *tile_sum;
};

/// The key tiles of queries [first, last) of a row, in this order: local, edge (outside some window, not stored yet),
/// stored.
struct Tiles {
  int64_t width;         // tokens a tile
  int64_t local_begin;   // first token of the first local tile
  int64_t num_local, num_edge, num_stored;
  int64_t total() const { return num_local + num_edge + num_stored; }
};

struct Kernels {
  void (*write)(const WriteArgs&, int64_t first, int64_t last);
  /// then, its tiles: the item that this thread probably does next; few queries ask for its first keys and values.
  /// scratch: attend_scratch(args.sizes) floats.
  void (*attend)(const AttendArgs&, const AttendItem&, const Tiles&, const AttendItem& then, const Tiles& then_tiles,
                 const Partial&, float* scratch);
  /// Join the partial results of one row, kv head and query tile: write the output; add the attention received by each
  /// local token to received[heads of the group][stride], from the first local tile's first token on; add the mass of
  /// stored blocks to mass [num_chosen]. Both may be null.
  void (*finish)(const AttendArgs&, const AttendItem&, const Tiles&, const Partial* partials, int64_t num_partials,
                 float* received, int64_t received_stride, float* mass);
  /// Sum of the far queries of head `head` of a row: sum [head_size].
  void (*far_sum)(const SelectArgs&, int64_t row, int64_t head, float* sum);
  /// Dot products of units [count] with query [heads * head_size].
  void (*score)(const SelectMeanArgs&, const float* query, const int64_t* units, int64_t count, float* scores);
  /// What each unit is to each query, by token, then head: highest score, in units of log 2, and sum of exponentials
  /// relative to it; both [(last - first) * group, num_units]. scratch: attend_scratch(args.sizes) floats.
  void (*weigh)(const SelectPeakArgs&, const PeakItem&, float* highest, float* sum, float* scratch);
  /// scratch: seal_scratch(args.sizes) floats.
  void (*seal)(const SealArgs&, int64_t leaving, int64_t kv_head, float* scratch);
};

inline int64_t attend_scratch(const Sizes& s) {
  const int64_t rows = s.group() > kTileRows ? s.group() : kTileRows;
  // Queries, far queries and scores; a tile of keys un-rotated, in float32 and packed; what Products needs.
  return rows * (2 * s.head_size + kTileTokens) + 2 * kTileTokens * s.head_size + kCoefficients +
         rows * (s.head_size + kTileTokens / 2) + 2 * kTileTokens * s.head_size;
}
inline int64_t seal_scratch(const Sizes& s) { return s.block_elements() + kCoefficients; }

/// Kernels of an instruction set, by DType; null if this build has no such set.
const Kernels* portable_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();

}  // namespace infllm
