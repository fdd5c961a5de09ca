// Attention of a batch: each row, kv head and tile of queries is an item; few queries are split over keys as well.
#include <algorithm>
#include <memory>

#include "isa.h"
#include "parallel.h"
#include "schedule.h"

namespace infllm {
namespace {

/// Items whose results belong together: all splits of one query tile, or all query tiles of a row and kv head.
struct Group {
  int64_t first_item, num_items;
  bool split;
};

struct Work {
  AttendItem item;
  Tiles tiles;
  int64_t group;
  Partial partial;  // null pointers where the thread's own scratch serves
  float* received;  // [group, received_stride]
  float* mass;      // [num_chosen]
  int64_t received_stride() const { return tiles.num_local * tiles.width; }
};

/// Largest tile that blocks are a multiple of.
int64_t tile_width(int64_t block_size) {
  for (int64_t width = std::min(block_size, kTileTokens);; width -= 16)
    if (block_size % width == 0) return width;
}

Tiles make_tiles(const AttendArgs& args, const Row& row, int64_t num_chosen, int64_t first, int64_t last) {
  const int64_t width = tile_width(args.sizes.block_size), n_local = args.n_local;
  const int64_t window = std::max(row.edge, first - n_local + 1) / width;
  return {.width = width,
          .local_begin = window * width,
          .num_local = (last - 1) / width - window + 1,
          .num_edge = last - n_local > row.edge ? (last - 1 - n_local - row.edge) / width + 1 : 0,
          .num_stored = num_chosen * (args.sizes.block_size / width)};
}

/// Takes consecutive pieces of one allocation; a first pass without memory only measures.
class Arena {
 public:
  explicit Arena(float* memory) : memory_(memory) {}
  float* take(int64_t count) {
    float* piece = memory_ ? memory_ + used_ : nullptr;
    used_ += (count + 15) / 16 * 16;
    return piece;
  }
  int64_t used() const { return used_; }

 private:
  float* memory_;
  int64_t used_ = 0;
};

/// Partial results of M rows; those that only differ between splits, then those that splits share.
void take_results(Arena& arena, const Sizes& z, int64_t m, Partial& to) {
  to.highest = arena.take(m);
  to.sum = arena.take(m);
  to.output = arena.take(m * z.head_size);
}
void take_kept(Arena& arena, const Tiles& tiles, int64_t m, bool keep, bool mass, Partial& to) {
  to.kept = keep ? arena.take(tiles.num_local * m * tiles.width) : nullptr;
  to.tile_highest = keep || mass ? arena.take(tiles.total() * m) : nullptr;
  to.tile_sum = mass ? arena.take(tiles.num_stored * m) : nullptr;
}

/// One call at a time; what it holds is kept for the next, so that a steady state allocates nothing.
class Attention {
 public:
  void run(const AttendArgs& args, const Kernels& kernels) {
    args_ = args;
    kernels_ = kernels;
    cut();
    share_out();
    start_counters();
    const bool alone = products_ < kWorthAThread;
    const int64_t count = work_.size(), threads = threads_for(count, alone);
    for_each(count, alone, [&](int64_t i) { process(work_[i], work_[std::min(i + threads, count - 1)]); });
    if (args_.mass) sum_mass();
  }

 private:
  /// Items and groups of all rows.
  void cut() {
    work_.clear();
    groups_.clear();
    products_ = 0;
    const int64_t most = std::max<int64_t>(1, kTileRows / args_.sizes.group());
    for (int64_t r = 0; r < args_.num_rows; ++r) {
      const Row& row = args_.rows[r];
      const int64_t* chosen = args_.chosen + r * args_.num_chosen;
      const int64_t count = std::find(chosen, chosen + args_.num_chosen, -1) - chosen;
      for (int64_t h = 0; h < args_.sizes.kv_heads; ++h) {
        groups_.push_back({int64_t(work_.size()), 0, row.end - row.start <= most});
        for (int64_t first = row.start; first < row.end; first += most) {
          const int64_t last = std::min(first + most, row.end);
          cut_tile({r, h, first, last, 0, 0}, make_tiles(args_, row, count, first, last));
        }
        groups_.back().num_items = work_.size() - groups_.back().first_item;
      }
    }
  }

  void cut_tile(AttendItem item, const Tiles& tiles) {
    const int64_t total = tiles.total(), splits = groups_.back().split ? (total + kSplitTiles - 1) / kSplitTiles : 1;
    for (int64_t i = 0; i < splits; ++i) {
      item.tile_begin = i * total / splits;
      item.tile_end = (i + 1) * total / splits;
      work_.push_back({item, tiles, int64_t(groups_.size()) - 1, {}, nullptr, nullptr});
    }
    products_ += 2 * rows_of(item) * total * tiles.width * args_.sizes.head_size;
  }

  int64_t rows_of(const AttendItem& item) const { return (item.last - item.first) * args_.sizes.group(); }
  bool accumulates(const AttendItem& item) const { return args_.rows[item.row].accumulate; }

  /// Give every item its place in memory that outlives it.
  void share_out() {
    Arena measure(nullptr);
    place(measure);
    Arena arena(shared_.floats(measure.used()));
    place(arena);
  }

  void place(Arena& arena) {
    for (const Group& group : groups_)
      for (int64_t i = 0; i < group.num_items; ++i) {
        Work& work = work_[group.first_item + i];
        const int64_t m = rows_of(work.item);
        if (group.split) {
          if (i == 0) {
            take_kept(arena, work.tiles, m, accumulates(work.item), args_.mass, work.partial);
          } else {
            work.partial = work_[group.first_item].partial;
          }
          take_results(arena, args_.sizes, m, work.partial);
        }
        if (group.split && i > 0) continue;
        work.received = accumulates(work.item) ? arena.take(args_.sizes.group() * work.received_stride()) : nullptr;
        work.mass = args_.mass ? arena.take(args_.num_chosen) : nullptr;
      }
  }

  void start_counters() {
    if (num_counters_ < groups_.size()) {
      num_counters_ = groups_.size();
      left_ = std::make_unique<std::atomic<int64_t>[]>(num_counters_);
    }
    for (size_t g = 0; g < groups_.size(); ++g) left_[g].store(groups_[g].num_items, std::memory_order_relaxed);
  }

  /// One item; whoever does the last one of a group also joins the group.
  void process(const Work& work, const Work& then) {
    thread_local Scratch scratch;
    const Group& group = groups_[work.group];
    const int64_t m = rows_of(work.item), own = attend_scratch(args_.sizes);
    if (group.split) {
      kernels_.attend(args_, work.item, work.tiles, then.item, then.tiles, work.partial, scratch.floats(own));
    } else {
      const bool keep = accumulates(work.item);
      Partial partial;
      const auto take = [&](Arena arena) {
        take_results(arena, args_.sizes, m, partial);
        take_kept(arena, work.tiles, m, keep, args_.mass, partial);
        return arena.used();
      };
      float* memory = scratch.floats(own + take(Arena(nullptr)));
      take(Arena(memory + own));
      kernels_.attend(args_, work.item, work.tiles, then.item, then.tiles, partial, memory);
      finish(work, &partial, 1);
    }
    if (left_[work.group].fetch_sub(1, std::memory_order_acq_rel) == 1) join(group);
  }

  void finish(const Work& work, const Partial* partials, int64_t count) {
    if (work.mass) std::fill_n(work.mass, args_.num_chosen, 0.0f);
    kernels_.finish(args_, work.item, work.tiles, partials, count, work.received, work.received_stride(), work.mass);
  }

  void join(const Group& group) {
    const Work& first = work_[group.first_item];
    if (group.split) {
      thread_local std::vector<Partial> partials;
      partials.clear();
      for (int64_t i = 0; i < group.num_items; ++i) partials.push_back(work_[group.first_item + i].partial);
      finish(first, partials.data(), group.num_items);
    }
    if (!accumulates(first.item)) return;
    forget_new_tokens(first.item);
    for (int64_t i = 0; i < (group.split ? 1 : group.num_items); ++i) add_received(work_[group.first_item + i]);
  }

  float* received_of(const AttendItem& item, int64_t token, int64_t head) {
    const Sizes& z = args_.sizes;
    const int64_t block = args_.table[args_.rows[item.row].table * args_.table_stride + token / z.block_size];
    return args_.received + (block * z.heads + item.kv_head * z.group() + head) * z.block_size + token % z.block_size;
  }

  /// What the slots of new tokens held belongs to earlier owners of their blocks.
  void forget_new_tokens(const AttendItem& item) {
    const Row& row = args_.rows[item.row];
    for (int64_t token = row.start; token < row.end; ++token)
      for (int64_t g = 0; g < args_.sizes.group(); ++g) *received_of(item, token, g) = 0;
  }

  void add_received(const Work& work) {
    const int64_t width = work.tiles.width;
    for (int64_t tile = 0; tile < work.tiles.num_local; ++tile) {
      const int64_t token = work.tiles.local_begin + tile * width, count = std::min(width, work.item.last - token);
      for (int64_t g = 0; g < args_.sizes.group(); ++g) {
        float* to = received_of(work.item, token, g);
        const float* from = work.received + g * work.received_stride() + tile * width;
        for (int64_t j = 0; j < count; ++j) to[j] += from[j];
      }
    }
  }

  void sum_mass() {
    std::fill_n(args_.mass, args_.num_rows * args_.num_chosen, 0.0f);
    for (const Work& work : work_)
      for (int64_t i = 0; work.mass && i < args_.num_chosen; ++i)
        args_.mass[work.item.row * args_.num_chosen + i] += work.mass[i];
  }

  AttendArgs args_;
  Kernels kernels_;
  int64_t products_ = 0;
  std::vector<Work> work_;
  std::vector<Group> groups_;
  std::unique_ptr<std::atomic<int64_t>[]> left_;
  size_t num_counters_ = 0;
  Scratch shared_;
};

}  // namespace

void attend(DType dtype, const AttendArgs& args) {
  thread_local Attention attention;
  attention.run(args, kernels(dtype));
}

}  // namespace infllm
