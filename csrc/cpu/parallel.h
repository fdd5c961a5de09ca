// Threads: those of torch, or, where a sanitizer has to see the synchronization, the standard library's.
#pragma once
#include <atomic>
#include <cstdint>
#include <vector>
#ifdef INFLLM_STD_THREADS
#include <thread>
#else
#include <torch/csrc/stable/ops.h>
#endif

namespace infllm {

/// Products of query and key elements below which waking a thread costs more than it saves.
constexpr int64_t kWorthAThread = 1 << 20;

/// Threads that share `count` pieces of work.
inline int64_t threads_for(int64_t count, bool alone) {
#ifdef INFLLM_STD_THREADS
  const int64_t available = 3;
#else
  const int64_t available = torch::stable::get_num_threads();
#endif
  return alone ? 1 : (count < available ? count : available);
}

/// Call f(i) for each i in [0, count), each thread taking the next one when it is free. On the calling thread alone
/// where `alone`, for work that is not worth waking another one.
template <class F>
void for_each(int64_t count, bool alone, const F& f) {
  const int64_t threads = threads_for(count, alone);
  if (threads <= 1) {
    for (int64_t i = 0; i < count; ++i) f(i);
    return;
  }
  std::atomic<int64_t> next{0};
  const auto work = [&](int64_t, int64_t) {
    for (int64_t i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) f(i);
  };
#ifdef INFLLM_STD_THREADS
  std::vector<std::thread> others;
  for (int64_t i = 1; i < threads; ++i) others.emplace_back([&] { work(0, 0); });
  work(0, 0);
  for (std::thread& thread : others) thread.join();
#else
  torch::stable::parallel_for(0, threads, 1, work);
#endif
}

/// Memory that is kept from call to call, so that a steady state allocates nothing.
class Scratch {
 public:
  float* floats(int64_t count) {
    if (int64_t(memory_.size()) < count) memory_.resize(count);
    return memory_.data();
  }

 private:
  std::vector<float> memory_;
};

}  // namespace infllm
