#include "isa.h"

#include <utility>

namespace infllm {
namespace {

struct Isa {
  std::string name;
  const Kernels* kernels;
};

bool runs_avx2() {
#if defined(__x86_64__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return false;
#endif
}

bool runs_avx512() {
#if defined(INFLLM_EMULATE)
  return runs_avx2();
#elif defined(__x86_64__)
  return runs_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
#else
  return false;
#endif
}

bool runs_avx512_bf16() {
#if defined(INFLLM_EMULATE)
  return runs_avx2();
#elif defined(__x86_64__)
  return runs_avx512() && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

/// Intel's dot product of bfloat16 pairs runs at half the rate of float32 arithmetic: 86 and 174 GFLOP/s on a core of
/// Emerald Rapids.
bool dots_slowly() {
#if defined(__x86_64__) && !defined(INFLLM_EMULATE)
  return __builtin_cpu_is("intel");
#else
  return false;
#endif
}

/// The best one last.
std::vector<Isa> find() {
#if defined(__x86_64__)
  __builtin_cpu_init();
#endif
  std::vector<Isa> found{{"portable", portable_kernels()}};
  if (runs_avx2()) found.push_back({"avx2", avx2_kernels()});
  if (runs_avx512()) found.push_back({"avx512", avx512_kernels()});
  if (runs_avx512_bf16()) found.push_back({"avx512_bf16", avx512_bf16_kernels()});
  if (runs_avx512_bf16() && dots_slowly()) std::swap(found[found.size() - 2], found.back());
  return found;
}

const std::vector<Isa>& all() {
  static const std::vector<Isa> found = find();
  return found;
}

const Isa*& current() {
  static const Isa* chosen = &all().back();
  return chosen;
}

}  // namespace

std::vector<std::string> supported_isas() {
  std::vector<std::string> names;
  for (const Isa& isa : all()) names.push_back(isa.name);
  return names;
}

bool use_isa(const std::string& name) {
  for (const Isa& isa : all())
    if (isa.name == name) {
      current() = &isa;
      return true;
    }
  return false;
}

const std::string& current_isa() { return current()->name; }

const Kernels& kernels(DType dtype) { return current()->kernels[int(dtype)]; }

}  // namespace infllm
