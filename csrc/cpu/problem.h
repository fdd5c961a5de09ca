// What the operations work on: raw pointers and sizes. Strides are in elements, positions and sizes in tokens.
#pragma once
#include <cstdint>

namespace infllm {

enum class DType { kFloat, kBFloat16, kHalf };

struct Sizes {
  int64_t heads, kv_heads, head_size, block_size;
  int64_t group() const { return heads / kv_heads; }
  /// Elements of the keys (or of the values) of one head in a block.
  int64_t block_elements() const { return block_size * head_size; }
};

/// cos_sin [positions, rotary_dim]: cosines, then sines. neox: pairs are (i, i + rotary_dim / 2), else (2i, 2i + 1).
struct Rope {
  const float* cos_sin;
  int64_t rotary_dim;
  bool neox;
};

/// A row of ops/interface.py: ExecutionBlocks.rows; one execution block [start, end) of one request.
struct Row {
  int64_t offset, start, end, edge, table, stored, units, accumulate, request;
  /// Where token t stands in the batch.
  int64_t place(int64_t t) const { return offset + t - start; }
};

/// A row of ExecutionBlocks.leaving.
struct Leaving {
  int64_t physical, block, unit, is_unit;
};

/// Tokens of the batch, [tokens, heads, head_size], the last dimension dense.
struct Tokens {
  void* data;
  int64_t token_stride, head_stride;
  template <class T>
  T* at(int64_t token, int64_t head) const {
    return (T*)data + token * token_stride + head * head_stride;
  }
};

/// Packed keys and values; block (or unit) i of head h begins at i * block_stride + h * head_stride.
struct Packed {
  void* keys;
  void* values;
  int64_t block_stride, head_stride;
};

struct WriteArgs {
  Sizes sizes;
  Tokens key, value;
  const int64_t* slots;
  Packed cache;
};

struct AttendArgs {
  Sizes sizes;
  Rope rope;
  int64_t n_local;
  float scale;
  const Row* rows;
  int64_t num_rows;
  const int32_t* table;
  int64_t table_stride;
  const int64_t* chosen;  // [num_rows, num_chosen] blocks of `stored`, -1 behind the last
  int64_t num_chosen;
  Tokens query, output;
  Packed cache, stored;
  float* received;  // [num_blocks, heads, block_size]
  float* mass;      // [num_rows, num_chosen] or null
};

struct SelectArgs {
  Sizes sizes;
  Rope rope;
  int64_t n_local, init_blocks, topk;
  const Row* rows;
  int64_t num_rows;
  const int64_t* units;
  Tokens query;
  int64_t* chosen;  // [num_rows, num_chosen]
  int64_t num_chosen;
  /// Units of a row, which follow its blocks of initial tokens.
  const int64_t* units_of(int64_t row) const { return units + rows[row].units + init_blocks; }
};

/// By representatives [num_units, heads, head_size].
struct SelectMeanArgs : SelectArgs {
  const void* representatives;
};

/// By all keys of the store, for the `last` queries of a row.
struct SelectPeakArgs : SelectArgs {
  const void* keys;
  int64_t block_stride, head_stride, last;
  float scale;
};

struct SealArgs {
  Sizes sizes;
  Rope rope;
  int64_t repr_topk;
  const Leaving* leaving;
  int64_t num_leaving;
  Packed cache, store;
  const float* received;
  void* representatives;
};

}  // namespace infllm
