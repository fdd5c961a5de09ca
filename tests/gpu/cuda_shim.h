// CUDA kernels run on the CPU, for tests: blocks of threads one after another, each thread of a block a fiber.
//
// A fiber runs until it waits for others, at a barrier or in an exchange of a warp. Which fiber begins alternates from
// block to block, first or last, so that a missing barrier shows. There are blocks of one dimension, shared memory of
// fixed size, and no tensor cores. One kernel runs at a time, in one thread of the process.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};

struct dim3 {
  unsigned x, y, z;
  explicit dim3(unsigned x, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

using cudaStream_t = void*;

inline uint3 threadIdx, blockIdx;
inline dim3 blockDim(1), gridDim(1);

namespace shim {

constexpr int kLanes = 32, kStackBytes = 64 << 10;

[[noreturn]] inline void fail(const char* why) {
  std::fprintf(stderr, "CUDA on the CPU: %s\n", why);
  std::abort();
}

/// Opens when as many fibers have arrived as are alive; those that wait see `opened` change.
struct Barrier {
  int alive = 0, arrived = 0;
  unsigned opened = 0;

  void open_if_complete() {
    if (alive == 0 || arrived < alive) return;
    arrived = 0;
    ++opened;
  }
};

struct Warp {
  Barrier barrier;
  /// Of two exchanges in turn: a lane that is done with one may begin the next while others still read.
  uint64_t value[2][kLanes];
};

struct Fiber {
  std::unique_ptr<char[]> stack;
  jmp_buf resume;
  const Barrier* at = nullptr;  // waits until at->opened is no longer `seen`
  unsigned seen = 0, exchanges = 0;
  bool alive = false;

  bool waits() const { return at && at->opened == seen; }
};

inline std::vector<Fiber> fibers;  // kept from launch to launch: each runs one kernel after another
inline std::vector<Warp> warps;
inline Barrier block_barrier;
inline std::function<void()> kernel;
inline jmp_buf scheduler;
inline unsigned running, blocks_run;

/// Goes on at `to`, until somebody comes back to `from`.
[[gnu::noinline]] inline void change(jmp_buf& from, jmp_buf& to) {
  if (!_setjmp(from)) _longjmp(to, 1);
}

inline Fiber& self() { return fibers[running]; }
inline Warp& own_warp() { return warps[running / kLanes]; }

inline void wait(Barrier& barrier) {
  Fiber& fiber = self();
  fiber.at = &barrier;
  fiber.seen = barrier.opened;
  ++barrier.arrived;
  barrier.open_if_complete();
  if (fiber.waits()) change(fiber.resume, scheduler);
  fiber.at = nullptr;
}

inline void leave(Barrier& barrier) {
  --barrier.alive;
  barrier.open_if_complete();
}

/// The life of a fiber: a kernel, then the next time it is resumed, another.
inline void live() {
  for (;;) {
    kernel();
    self().alive = false;
    leave(own_warp().barrier);
    leave(block_barrier);
    change(self().resume, scheduler);
  }
}

[[gnu::noinline]] inline void start(Fiber& fiber) {
  fiber.stack = std::make_unique<char[]>(kStackBytes);
  ucontext_t context;
  getcontext(&context);
  context.uc_stack.ss_sp = fiber.stack.get();
  context.uc_stack.ss_size = kStackBytes;
  context.uc_link = nullptr;
  makecontext(&context, live, 0);
  if (!_setjmp(scheduler)) setcontext(&context);
}

inline void run(unsigned thread) {
  running = thread;
  threadIdx = {thread, 0, 0};
  if (self().stack)
    change(scheduler, self().resume);
  else
    start(self());
}

inline void run_block() {
  const unsigned count = blockDim.x;
  const bool last_first = blocks_run++ % 2;
  warps.assign((count + kLanes - 1) / kLanes, {});
  block_barrier = {static_cast<int>(count)};
  for (unsigned i = 0; i < count; ++i) {
    fibers[i].alive = true;
    fibers[i].exchanges = 0;
    ++warps[i / kLanes].barrier.alive;
  }
  while (block_barrier.alive) {
    bool stuck = true;
    for (unsigned i = 0; i < count; ++i) {
      const unsigned thread = last_first ? count - 1 - i : i;
      if (!fibers[thread].alive || fibers[thread].waits()) continue;
      stuck = false;
      run(thread);
    }
    if (stuck) fail("threads of a block wait for each other at different places");
  }
}

inline void launch(dim3 grid, dim3 block, std::function<void()> body) {
  if (block.y != 1 || block.z != 1) fail("blocks of one dimension only");
  if (!grid.x || grid.y > 65535 || !grid.y || grid.z > 65535 || !grid.z || !block.x || block.x > 1024)
    fail("a GPU cannot launch this grid");
  if (fibers.size() < block.x) fibers.resize(block.x);
  kernel = std::move(body);
  gridDim = grid;
  blockDim = block;
  for (unsigned z = 0; z < grid.z; ++z)
    for (unsigned y = 0; y < grid.y; ++y)
      for (unsigned x = 0; x < grid.x; ++x) {
        blockIdx = {x, y, z};
        run_block();
      }
  kernel = nullptr;
}

/// Shows each lane of the warp the values of all: `pick` is given them.
template <class T, class Pick>
auto exchange(unsigned mask, T own, Pick pick) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  if (mask != 0xffffffffu) fail("whole warps only");
  uint64_t* value = own_warp().value[self().exchanges++ % 2];
  std::memcpy(&value[running % kLanes], &own, sizeof(T));
  wait(own_warp().barrier);
  return pick([value](unsigned lane) {
    T other;
    std::memcpy(&other, &value[lane % kLanes], sizeof(T));
    return other;
  });
}

}  // namespace shim

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)
#define LAUNCH(kernel, grid, block, stream, ...) \
  (static_cast<void>(stream), shim::launch(dim3(grid), dim3(block), [&] { kernel(__VA_ARGS__); }))

inline void __syncthreads() { shim::wait(shim::block_barrier); }
inline void __syncwarp() { shim::wait(shim::own_warp().barrier); }

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  return shim::exchange(mask, value, [lane](auto of) { return of(lane); });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int bits) {
  return __shfl_sync(mask, value, (threadIdx.x % shim::kLanes) ^ bits);
}

template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta) {
  const unsigned lane = threadIdx.x % shim::kLanes;
  return __shfl_sync(mask, value, lane < delta ? lane : lane - delta);
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return shim::exchange(mask, predicate != 0, [](auto of) {
    unsigned bits = 0;
    for (unsigned lane = 0; lane < shim::kLanes; ++lane) bits |= static_cast<unsigned>(of(lane)) << lane;
    return bits;
  });
}

inline int atomicAdd(int* at, int value) {
  const int old = *at;
  *at += value;
  return old;
}

inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(unsigned bits) { return __builtin_ffs(static_cast<int>(bits)); }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __fadd_rn(float a, float b) { return a + b; }

inline uint32_t __float_as_uint(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  return bits;
}
