// CUDA threads as fibers on one CPU thread: blocks one after the other, the threads of a block in turn, each until its
// next barrier. So what lanes tell each other through shared memory really passes through it, in an order that shows a
// missing barrier: lane 0 runs ahead of all others in one round, lane 31 in the next.
#pragma once

#include <setjmp.h>
#include <stdint.h>
#include <sys/mman.h>
#include <ucontext.h>

#include <exception>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

struct uint3 {
  unsigned x, y, z;
};
struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
// Set each time a fiber goes on.
inline uint3 threadIdx, blockIdx;
inline dim3 blockDim, gridDim;

namespace emulation {

constexpr unsigned kWarp = 32, kMaxThreads = 1024;

class Blocks {
 public:
  // Runs `kernel` for every thread of every block; grids and blocks of one dimension. Throws std::logic_error where
  // threads wait for each other at different barriers for ever, and what a kernel throws.
  void run(unsigned grid, unsigned threads, const std::function<void()>& kernel) {
    kernel_ = &kernel;
    gridDim = dim3(grid), blockDim = dim3(threads);
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    try {
      for (unsigned b = 0; b < grid; b++) {
        blockIdx = {b, 0, 0};
        for (unsigned t = 0; t < threads; t++) fibers_[t]->state = State::ready;
        run_block(threads);
      }
    } catch (...) {
      fibers_.clear();  // they are stuck in the middle of a kernel
      throw;
    }
  }

  void wait_for_warp(unsigned mask) { wait(State::at_warp_barrier, mask); }
  void wait_for_block() { wait(State::at_block_barrier, 0); }

  // A word that every lane of the warp can write and read; see lane_values.
  uint64_t& slot(unsigned lane) { return fibers_[threadIdx.x / kWarp * kWarp + lane]->slot; }
  bool done(unsigned lane) {
    const unsigned t = threadIdx.x / kWarp * kWarp + lane;
    return t >= blockDim.x || fibers_[t]->state == State::done;
  }

 private:
  enum class State { ready, at_warp_barrier, at_block_barrier, done };
  static constexpr size_t kStack = 256 << 10;
  struct Fiber {
    Fiber() {
      void* stack = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
      if (stack == MAP_FAILED) throw std::bad_alloc();
      getcontext(&start);
      start.uc_stack.ss_sp = stack, start.uc_stack.ss_size = kStack, start.uc_link = nullptr;
      makecontext(&start, &Blocks::fiber_main, 0);
    }
    ~Fiber() { munmap(start.uc_stack.ss_sp, kStack); }
    Fiber(const Fiber&) = delete;

    State state = State::done;
    unsigned mask = 0;
    uint64_t slot = 0;
    bool started = false;
    jmp_buf here;
    ucontext_t start;
  };
  static void fiber_main();

  // _setjmp and _longjmp switch stacks without a system call; swapcontext, which makes two, only starts a fiber.
  void resume(unsigned t) {
    current_ = fibers_[t].get();
    threadIdx = {t, 0, 0};
    if (_setjmp(scheduler_) == 0) {
      if (current_->started) _longjmp(current_->here, 1);
      current_->started = true;
      setcontext(&current_->start);
    }
  }

  void wait(State state, unsigned mask) {
    Fiber* me = current_;
    me->state = state, me->mask = mask;
    if (_setjmp(me->here) == 0) _longjmp(scheduler_, 1);
  }

  void run_block(unsigned threads) {
    const unsigned warps = (threads + kWarp - 1) / kWarp;
    for (unsigned round = 0;; round++) {
      bool went_on = false, all_done = true;
      for (unsigned i = 0; i < warps; i++) {
        const unsigned w = round % 2 ? warps - 1 - i : i;
        const unsigned first = w * kWarp, n = threads - first < kWarp ? threads - first : kWarp;
        for (unsigned j = 0; j < n; j++) {
          const unsigned t = first + (round % 2 ? n - 1 - j : j);
          if (fibers_[t]->state == State::ready) resume(t), went_on = true;
          if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
          all_done &= fibers_[t]->state == State::done;
        }
        release_warp(first, n);
      }
      if (all_done) return;
      if (release_block(threads)) continue;
      if (!went_on) throw std::logic_error("threads of a block wait at different barriers");
    }
  }

  // Lanes wait for those that their mask names and that have not left the kernel.
  void release_warp(unsigned first, unsigned n) {
    for (unsigned j = 0; j < n; j++) {
      Fiber& f = *fibers_[first + j];
      if (f.state != State::at_warp_barrier) continue;
      const unsigned mask = f.mask;
      bool all = true;
      for (unsigned k = 0; k < n; k++) {
        const Fiber& other = *fibers_[first + k];
        if (mask >> k & 1 && other.state != State::done)
          all &= other.state == State::at_warp_barrier && other.mask == mask;
      }
      for (unsigned k = 0; all && k < n; k++)
        if (mask >> k & 1 && fibers_[first + k]->state == State::at_warp_barrier)
          fibers_[first + k]->state = State::ready;
    }
  }

  bool release_block(unsigned threads) {
    bool any = false;
    for (unsigned t = 0; t < threads; t++) {
      const State s = fibers_[t]->state;
      if (s != State::at_block_barrier && s != State::done) return false;
      any |= s == State::at_block_barrier;
    }
    for (unsigned t = 0; t < threads; t++)
      if (fibers_[t]->state == State::at_block_barrier) fibers_[t]->state = State::ready;
    return any;
  }

  const std::function<void()>* kernel_ = nullptr;
  std::vector<std::unique_ptr<Fiber>> fibers_;
  Fiber* current_ = nullptr;
  std::exception_ptr error_;
  jmp_buf scheduler_;
};

inline Blocks blocks;

// A fiber outlives its kernel: at the end it waits to be made ready for the next block.
inline void Blocks::fiber_main() {
  for (;;) {
    try {
      (*blocks.kernel_)();
    } catch (...) {
      blocks.error_ = std::current_exception();
    }
    blocks.wait(State::done, 0);
  }
}

// What `value` is in each lane of the mask (others: 0). Every lane of the mask must call it.
inline void lane_values(unsigned mask, uint64_t value, uint64_t all[kWarp]) {
  blocks.slot(threadIdx.x % kWarp) = value;
  blocks.wait_for_warp(mask);
  for (unsigned k = 0; k < kWarp; k++) all[k] = mask >> k & 1 && !blocks.done(k) ? blocks.slot(k) : 0;
  blocks.wait_for_warp(mask);
}

}  // namespace emulation

inline void __syncwarp(unsigned mask = ~0u) { emulation::blocks.wait_for_warp(mask); }
inline void __syncthreads() { emulation::blocks.wait_for_block(); }

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  uint64_t all[emulation::kWarp];
  emulation::lane_values(mask, predicate != 0, all);
  unsigned r = 0;
  for (unsigned k = 0; k < emulation::kWarp; k++) r |= (unsigned)all[k] << k;
  return r;
}

template <class T>
T __shfl_sync(unsigned mask, T value, int lane) {
  static_assert(sizeof(T) <= 8, "a shuffled value has at most 64 bits");
  uint64_t bits = 0, all[emulation::kWarp];
  __builtin_memcpy(&bits, &value, sizeof(T));
  emulation::lane_values(mask, bits, all);
  __builtin_memcpy(&value, &all[lane & 31], sizeof(T));
  return value;
}
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  return __shfl_sync(mask, value, (int)(threadIdx.x % emulation::kWarp) ^ lanes);
}
