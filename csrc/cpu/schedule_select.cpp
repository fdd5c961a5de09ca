// Choosing units: rows that have more than they may choose score them, by one rule or the other, and take the best.
#include <algorithm>
#include <cmath>
#include <numeric>
#include <utility>

#include "isa.h"
#include "parallel.h"
#include "schedule.h"

namespace infllm {
namespace {

/// Units whose representatives, or whose keys, are one piece of work.
constexpr int64_t kRepresentativesAPiece = 128, kUnitsAPiece = 16;
/// Units whose representatives are read sooner than another thread wakes up.
constexpr int64_t kFewUnits = 1536;
constexpr int64_t kFewQueries = 64;
/// Weights (of a unit to a query) that are compared sooner than another thread wakes up.
constexpr int64_t kFewWeights = 1 << 13;

/// Places of the `count` highest scores, ascending; of equal ones the lower place. Not-a-number is lowest.
void highest_places(float* scores, int64_t total, int64_t count, std::vector<int64_t>& places) {
  for (int64_t i = 0; i < total; ++i)
    if (std::isnan(scores[i])) scores[i] = -INFINITY;
  places.resize(total);
  std::iota(places.begin(), places.end(), 0);
  const auto before = [&](int64_t a, int64_t b) { return scores[a] != scores[b] ? scores[a] > scores[b] : a < b; };
  if (count < total) std::nth_element(places.begin(), places.begin() + count, places.end(), before);
  places.resize(std::min(count, total));
  std::sort(places.begin(), places.end());
}

/// A row with more units than may be chosen.
struct Choice {
  int64_t row, num_units;
};

class Choices {
 public:
  /// Rows without a choice take all their blocks at once, the others their initial tokens; returns the latter.
  const std::vector<Choice>& find(const SelectArgs& args) {
    std::fill_n(args.chosen, args.num_rows * args.num_chosen, -1);
    found_.clear();
    for (int64_t r = 0; r < args.num_rows; ++r) {
      const Row& row = args.rows[r];
      const int64_t num_units = std::max<int64_t>(0, row.stored - args.init_blocks);
      const int64_t sure = num_units > args.topk ? args.init_blocks : row.stored;
      std::copy_n(args.units + row.units, sure, args.chosen + r * args.num_chosen);
      if (num_units > args.topk && args.topk > 0) found_.push_back({r, num_units});
    }
    return found_;
  }

  /// The units with the highest scores [num_units].
  void choose(const SelectArgs& args, const Choice& choice, float* scores) {
    highest_places(scores, choice.num_units, args.topk, places_);
    int64_t* to = args.chosen + choice.row * args.num_chosen + args.init_blocks;
    for (int64_t place : places_) *to++ = args.units_of(choice.row)[place];
  }

 private:
  std::vector<Choice> found_;
  std::vector<int64_t> places_;
};

/// By the sum over heads of < mean far query, representative >.
class MeanSelection {
 public:
  void run(const SelectMeanArgs& args, const Kernels& kernels) {
    const std::vector<Choice>& choices = choices_.find(args);
    if (choices.empty()) return;
    const Sizes& z = args.sizes;
    prepare(args, choices);
    for_each(choices.size() * z.heads, num_queries_ <= kFewQueries, [&](int64_t i) {
      kernels.far_sum(args, choices[i / z.heads].row, i % z.heads, work_[i / z.heads].query + i % z.heads * z.head_size);
    });
    for_each(pieces_.size(), num_units_ < kFewUnits, [&](int64_t i) {
      const auto [c, first] = pieces_[i];
      const int64_t count = std::min(kRepresentativesAPiece, choices[c].num_units - first);
      kernels.score(args, work_[c].query, args.units_of(choices[c].row) + first, count, work_[c].scores + first);
    });
    for (size_t c = 0; c < choices.size(); ++c) choices_.choose(args, choices[c], work_[c].scores);
  }

 private:
  struct Work {
    float *query, *scores;  // [heads, head_size], [num_units]
  };

  void prepare(const SelectMeanArgs& args, const std::vector<Choice>& choices) {
    const int64_t query = args.sizes.heads * args.sizes.head_size;
    num_queries_ = num_units_ = 0;
    for (const Choice& choice : choices) {
      num_queries_ += args.rows[choice.row].end - args.rows[choice.row].start;
      num_units_ += choice.num_units;
    }
    float* memory = memory_.floats(choices.size() * query + num_units_);
    work_.clear();
    pieces_.clear();
    for (size_t c = 0; c < choices.size(); ++c) {
      work_.push_back({memory, memory + query});
      memory += query + choices[c].num_units;
      for (int64_t first = 0; first < choices[c].num_units; first += kRepresentativesAPiece)
        pieces_.push_back({c, first});
    }
  }

  Choices choices_;
  std::vector<Work> work_;
  std::vector<std::pair<size_t, int64_t>> pieces_;
  Scratch memory_;
  int64_t num_queries_, num_units_;
};

/// By the largest share of attention that any head of any of the last queries gives to a unit.
class PeakSelection {
 public:
  void run(const SelectPeakArgs& args, const Kernels& kernels) {
    const std::vector<Choice>& choices = choices_.find(args);
    if (choices.empty()) return;
    prepare(args, choices);
    for_each(pieces_.size(), num_weights_ * args.sizes.block_elements() < kWorthAThread, [&](int64_t i) {
      thread_local Scratch scratch;
      const auto [t, first] = pieces_[i];
      PeakItem item = tiles_[t].item;
      item.unit_begin = first;
      item.unit_end = std::min(first + kUnitsAPiece, item.num_units);
      kernels.weigh(args, item, tiles_[t].highest, tiles_[t].sum, scratch.floats(attend_scratch(args.sizes)));
    });
    for_each(tiles_.size(), num_weights_ < kFewWeights, [&](int64_t i) { find_odds(args.sizes.group(), tiles_[i]); });
    for (auto tile = tiles_.begin(); tile != tiles_.end();) {
      const auto first = tile++;
      for (; tile != tiles_.end() && tile->choice == first->choice; ++tile)
        for (int64_t u = 0; u < first->item.num_units; ++u) first->odds[u] = std::max(first->odds[u], tile->odds[u]);
      choices_.choose(args, choices[first->choice], first->odds);
    }
  }

 private:
  /// Queries of a row and kv head that are multiplied together, and what comes of them.
  struct Tile {
    size_t choice;
    PeakItem item;
    float *highest, *sum;  // [queries * group, num_units], of `weigh`
    float* odds;           // [num_units]
  };

  void prepare(const SelectPeakArgs& args, const std::vector<Choice>& choices) {
    const Sizes& z = args.sizes;
    const int64_t tokens = std::max<int64_t>(1, kTileRows / z.group());
    tiles_.clear();
    pieces_.clear();
    num_weights_ = 0;
    int64_t num_odds = 0;
    for (size_t c = 0; c < choices.size(); ++c) {
      const Row& row = args.rows[choices[c].row];
      for (int64_t head = 0; head < z.kv_heads; ++head)
        for (int64_t first = std::max(row.start, row.end - args.last); first < row.end; first += tokens) {
          const int64_t last = std::min(first + tokens, row.end), num_units = choices[c].num_units;
          for (int64_t unit = 0; unit < num_units; unit += kUnitsAPiece) pieces_.push_back({tiles_.size(), unit});
          tiles_.push_back({c, {choices[c].row, head, first, last, 0, num_units, num_units}, nullptr, nullptr, nullptr});
          num_weights_ += (last - first) * z.group() * num_units;
          num_odds += num_units;
        }
    }
    float* memory = memory_.floats(2 * num_weights_ + num_odds);
    for (Tile& tile : tiles_) {
      const int64_t weights = (tile.item.last - tile.item.first) * z.group() * tile.item.num_units;
      tile.highest = memory;
      tile.sum = memory + weights;
      tile.odds = memory + 2 * weights;
      memory += 2 * weights + tile.item.num_units;
    }
  }

  /// Largest log(p / (1 - p)) of each unit over the rows, p its share: tells shares near 1 apart.
  static void find_odds(int64_t group, const Tile& tile) {
    const int64_t n = tile.item.num_units;
    thread_local std::vector<double> weights, odds;
    weights.resize(n);
    odds.assign(n, 0);
    for (int64_t r = 0; r < (tile.item.last - tile.item.first) * group; ++r) {
      const float *highest = tile.highest + r * n, *sum = tile.sum + r * n;
      const float top = *std::max_element(highest, highest + n);
      for (int64_t u = 0; u < n; ++u) weights[u] = sum[u] * std::exp2(double(highest[u]) - top);
      const auto best = std::max_element(weights.begin(), weights.end());
      const double most = std::exchange(*best, 0);
      const double others = std::accumulate(weights.begin(), weights.end(), 0.0);
      for (int64_t u = 0; u < n; ++u) odds[u] = std::max(odds[u], weights[u] / (others + most - weights[u]));
      double& of_best = odds[best - weights.begin()];
      of_best = std::max(of_best, most / others);
    }
    for (int64_t u = 0; u < n; ++u) tile.odds[u] = std::log2(odds[u]);
  }

  Choices choices_;
  std::vector<Tile> tiles_;
  std::vector<std::pair<size_t, int64_t>> pieces_;
  Scratch memory_;
  int64_t num_weights_;
};

}  // namespace

void select(DType dtype, const SelectMeanArgs& args) {
  thread_local MeanSelection selection;
  selection.run(args, kernels(dtype));
}

void select_peak(DType dtype, const SelectPeakArgs& args) {
  thread_local PeakSelection selection;
  selection.run(args, kernels(dtype));
}

}  // namespace infllm
