// How kernels are launched: on a GPU, or for tests on the CPU, where each thread of a block is a fiber.
#pragma once
#ifdef CUDA_ON_CPU
#include "cuda_shim.h"
#else
#include <cuda_runtime.h>

#define LAUNCH(kernel, grid, block, stream, ...) kernel<<<grid, block, 0, stream>>>(__VA_ARGS__)
#endif

namespace infllm {

/// Threads of a block: on the CPU few, since each of them costs time.
#ifdef CUDA_ON_CPU
constexpr int threads(int, int on_cpu) { return on_cpu; }
#else
constexpr int threads(int on_gpu, int) { return on_gpu; }
#endif

}  // namespace infllm
