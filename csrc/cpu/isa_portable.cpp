// Kernels of the instruction set portable.
// Vectors of 4 floats: SSE2 on x86-64, NEON on 64-bit ARM.
#define INFLLM_WIDTH 4
#include "attend_tile.h"
#include "unit.h"

namespace infllm {

const Kernels* portable_kernels() {
  static const Kernels kernels[] = {make_kernels<float>(), make_kernels<bf16>(), make_kernels<fp16>()};
  return kernels;
}

}  // namespace infllm
