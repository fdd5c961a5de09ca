// Kernels of the instruction set avx2.
#if defined(__x86_64__)
#pragma GCC target("avx2,fma,f16c")
#define INFLLM_WIDTH 8
#include "attend_tile.h"
#include "unit.h"

namespace infllm {

const Kernels* avx2_kernels() {
  static const Kernels kernels[] = {make_kernels<float>(), make_kernels<bf16>(), make_kernels<fp16>()};
  return kernels;
}

}  // namespace infllm
#else
#include "kernels.h"
const infllm::Kernels* infllm::avx2_kernels() { return nullptr; }
#endif
