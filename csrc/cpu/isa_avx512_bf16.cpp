// Kernels of the instruction set avx512_bf16.
#if defined(__x86_64__)
#ifndef INFLLM_EMULATE
#pragma GCC target("avx512f,avx512bw,avx512vl,avx512dq,avx512bf16,avx2,fma,f16c")
#else
#pragma GCC target("avx2,fma,f16c")
#endif
#define INFLLM_WIDTH 16
#define INFLLM_BF16_DOT
#include "attend_tile.h"
#include "unit.h"

namespace infllm {

const Kernels* avx512_bf16_kernels() {
  static const Kernels kernels[] = {make_kernels<float>(), make_kernels<bf16>(), make_kernels<fp16>()};
  return kernels;
}

}  // namespace infllm
#else
#include "kernels.h"
const infllm::Kernels* infllm::avx512_bf16_kernels() { return nullptr; }
#endif
