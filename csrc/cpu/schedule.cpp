#include "schedule.h"

#include <algorithm>
#include <cmath>
#include <numeric>

#include "isa.h"
#include "parallel.h"

namespace infllm {
namespace {

constexpr int64_t kTokensAPiece = 64;
constexpr int64_t kUnitsAPiece = 128;
/// Units whose representatives are read sooner than another thread wakes up.
constexpr int64_t kFewUnits = 1536;
constexpr int64_t kFewQueries = 64;

int64_t pieces(int64_t count, int64_t size) { return (count + size - 1) / size; }

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
  float *query, *scores;  // [heads, head_size], [num_units]
};

class Selection {
 public:
  void run(const SelectArgs& args, const Kernels& kernels) {
    std::fill_n(args.chosen, args.num_rows * args.num_chosen, -1);
    find_choices(args);
    if (choices_.empty()) return;
    const Sizes& z = args.sizes;
    for_each(choices_.size() * z.heads, queries_ <= kFewQueries, [&](int64_t i) {
      const Choice& choice = choices_[i / z.heads];
      kernels.far_sum(args, choice.row, i % z.heads, choice.query + i % z.heads * z.head_size);
    });
    pieces_.clear();
    int64_t num_units = 0;
    for (size_t c = 0; c < choices_.size(); ++c) {
      num_units += choices_[c].num_units;
      for (int64_t first = 0; first < choices_[c].num_units; first += kUnitsAPiece) pieces_.push_back({c, first});
    }
    for_each(pieces_.size(), num_units < kFewUnits, [&](int64_t i) {
      const Choice& choice = choices_[pieces_[i].first];
      const int64_t first = pieces_[i].second, count = std::min(kUnitsAPiece, choice.num_units - first);
      kernels.score(args, choice.query, args.units + args.rows[choice.row].units + args.init_blocks + first, count,
                    choice.scores + first);
    });
    for (const Choice& choice : choices_) choose(args, choice);
  }

 private:
  /// Rows without a choice take all their blocks at once.
  void find_choices(const SelectArgs& args) {
    choices_.clear();
    queries_ = 0;
    int64_t floats = 0;
    const int64_t query = args.sizes.heads * args.sizes.head_size;
    for (int64_t r = 0; r < args.num_rows; ++r) {
      const Row& row = args.rows[r];
      const int64_t num_units = std::max<int64_t>(0, row.stored - args.init_blocks);
      const int64_t sure = num_units > args.topk ? args.init_blocks : row.stored;
      std::copy_n(args.units + row.units, sure, args.chosen + r * args.num_chosen);
      if (num_units <= args.topk || args.topk == 0) continue;
      choices_.push_back({r, num_units, nullptr, nullptr});
      queries_ += row.end - row.start;
      floats += query + num_units;
    }
    float* memory = memory_.floats(floats);
    for (Choice& choice : choices_) {
      choice.query = memory;
      choice.scores = memory + query;
      memory += query + choice.num_units;
    }
  }

  void choose(const SelectArgs& args, const Choice& choice) {
    highest_places(choice.scores, choice.num_units, args.topk, places_);
    const int64_t* units = args.units + args.rows[choice.row].units + args.init_blocks;
    int64_t* to = args.chosen + choice.row * args.num_chosen + args.init_blocks;
    for (int64_t place : places_) *to++ = units[place];
  }

  std::vector<Choice> choices_;
  std::vector<std::pair<size_t, int64_t>> pieces_;
  std::vector<int64_t> places_;
  Scratch memory_;
  int64_t queries_ = 0;
};

}  // namespace

void write(DType dtype, const WriteArgs& args, int64_t num_tokens) {
  const Kernels& use = kernels(dtype);
  for_each(pieces(num_tokens, kTokensAPiece), num_tokens <= kTokensAPiece, [&](int64_t i) {
    use.write(args, i * kTokensAPiece, std::min((i + 1) * kTokensAPiece, num_tokens));
  });
}

void select(DType dtype, const SelectArgs& args) {
  thread_local Selection selection;
  selection.run(args, kernels(dtype));
}

void seal(DType dtype, const SealArgs& args) {
  const Kernels& use = kernels(dtype);
  for_each(args.num_leaving * args.sizes.kv_heads, false, [&](int64_t i) {
    thread_local Scratch scratch;
    use.seal(args, i / args.sizes.kv_heads, i % args.sizes.kv_heads, scratch.floats(seal_scratch(args.sizes)));
  });
}

}  // namespace infllm
