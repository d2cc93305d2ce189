// The lane's three small kernels and its refills; see lane.h for the rules.
#include "cuda/lane.h"

#include <algorithm>
#include <stdexcept>

#include "cuda/launch.h"

namespace everett {
namespace {

using Atomic = unsigned long long;

__device__ u64 now(const u64& x) { return *(const volatile u64*)&x; }

__global__ void reserve_kernel(LaneState* state, u64 n, u64* start) {
  u64 at = now(state->reserved);
  for (;;) {
    if (at + n > now(state->limit)) {
      atomicAdd((Atomic*)&state->failed, Atomic(1));
      *start = kNoWords;
      return;
    }
    const u64 seen = atomicCAS((Atomic*)&state->reserved, (Atomic)at, (Atomic)(at + n));
    if (seen == at) break;
    at = seen;
  }
  *start = at;
}

__global__ void finish_kernel(LaneState* state, u64 n, const u64* start) {
  if (*start != kNoWords) atomicAdd((Atomic*)&state->finished, (Atomic)n);
}

__global__ void limit_kernel(LaneState* state, u64 limit) { state->limit = limit; }

__global__ void end_kernel(LaneState* state) { state->limit = now(state->reserved); }

u64 power_of_two(u64 n) {
  if (n == 0 || (n & (n - 1)) != 0) throw std::invalid_argument("a lane's capacity is a power of two");
  return n;
}

}  // namespace

Lane::Lane(int device, u64 capacity)
    : capacity_(power_of_two(capacity)),
      memory_(device, kStateBytes + capacity * sizeof(u64)),
      staging_(device, capacity * sizeof(u64)) {
  // CUDA loads a kernel when it is first asked for, which is better not during a capture.
  DeviceGuard guard(device);
  cudaFuncAttributes a;
  check(cudaFuncGetAttributes(&a, reserve_kernel), "loading reserve_kernel");
  check(cudaFuncGetAttributes(&a, finish_kernel), "loading finish_kernel");
}

WordSource Lane::reserve(u64 n, u64* start, cudaStream_t stream) {
  if (n > capacity_)
    throw std::invalid_argument("a captured op needs " + std::to_string(n) + " direct words, and the lane holds " +
                                std::to_string(capacity_));
  launch("kernel reserve_kernel", reserve_kernel, 1, 1, stream, state(), n, start);
  return {words(), capacity_ - 1, start};
}

void Lane::finish(u64 n, const u64* start, cudaStream_t stream) {
  launch("kernel finish_kernel", finish_kernel, 1, 1, stream, state(), n, start);
}

LaneState Lane::read(cudaStream_t stream) {
  DeviceGuard guard(memory_.device());
  RelaxedCapture relaxed;
  check(cudaMemcpyAsync(&seen_, state(), sizeof seen_, cudaMemcpyDeviceToHost, stream), "reading the state of direct words");
  check(cudaStreamSynchronize(stream), "reading the state of direct words");
  return seen_;
}

template <class Piece>
void Lane::for_pieces(u64 from, u64 n, Piece piece) const {
  const u64 at = from & (capacity_ - 1), first = std::min(n, capacity_ - at);
  if (first != 0) piece(words() + at, u64(0), first);
  if (n != first) piece(words(), first, n - first);
}

void Lane::zero(u64 from, u64 n, cudaStream_t stream) {
  for_pieces(from, n, [&](u64* to, u64, u64 words) {
    check(cudaMemsetAsync(to, 0, words * sizeof(u64), stream), "zeroing direct words");
  });
}

u8* Lane::open(cudaStream_t stream) {
  if (room() == 0) throw std::logic_error("words are in use or there is no room for more");
  DeviceGuard guard(memory_.device());
  zero(zeroed_, seen_.reserved - zeroed_, stream);
  zeroed_ = seen_.reserved;
  return staging_.open();
}

void Lane::submit(u64 n, cudaStream_t stream) {
  if (n > room()) throw std::invalid_argument("more words than there is room for");
  DeviceGuard guard(memory_.device());
  try {
    for_pieces(seen_.limit, n, [&](u64* to, u64 from, u64 words) {
      staging_.copy(from * sizeof(u64), to, words * sizeof(u64), stream);
    });
    staging_.seal(stream);
    launch("kernel limit_kernel", limit_kernel, 1, 1, stream, state(), seen_.limit + n);
  } catch (...) {
    staging_.drop();
    throw;
  }
  seen_.limit += n;
}

void Lane::forgive(cudaStream_t stream) {
  DeviceGuard guard(memory_.device());
  check(cudaMemsetAsync(&state()->failed, 0, sizeof(u64), stream), "resetting the state of direct words");
}

void Lane::destroy(cudaStream_t stream) {
  staging_.drop();
  {
    DeviceGuard guard(memory_.device());
    launch("kernel end_kernel", end_kernel, 1, 1, stream, state());
  }
  read(stream);
  if (seen_.reserved != seen_.finished) return;
  DeviceGuard guard(memory_.device());
  zero(0, capacity_, stream);
  zeroed_ = seen_.reserved;
}

}  // namespace everett
