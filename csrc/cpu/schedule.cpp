#include "schedule.h"

#include <algorithm>

#include "isa.h"
#include "parallel.h"

namespace infllm {
namespace {

constexpr int64_t kTokensAPiece = 64;

}  // namespace

void write(DType dtype, const WriteArgs& args, int64_t num_tokens) {
  const Kernels& use = kernels(dtype);
  for_each((num_tokens + kTokensAPiece - 1) / kTokensAPiece, num_tokens <= kTokensAPiece, [&](int64_t i) {
    use.write(args, i * kTokensAPiece, std::min((i + 1) * kTokensAPiece, num_tokens));
  });
}

void seal(DType dtype, const SealArgs& args) {
  const Kernels& use = kernels(dtype);
  for_each(args.num_leaving * args.sizes.kv_heads, false, [&](int64_t i) {
    thread_local Scratch scratch;
    use.seal(args, i / args.sizes.kv_heads, i % args.sizes.kv_heads, scratch.floats(seal_scratch(args.sizes)));
  });
}

}  // namespace infllm
