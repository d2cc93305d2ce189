// Small kernels that show what the emulation can notice: lanes that talk through shared memory with and without their
// barriers, shuffles, and threads that wait at different barriers.
#include <cuda_runtime.h>

namespace {

constexpr int kThreads = 64;

// Each lane takes what the lane opposite in its warp has written, twice: a missing barrier shows in the first turn where
// it stands before the read, in the second where it stands after it.
template <bool kBefore, bool kAfter>
__global__ void reverse_lanes(const int* in, int* out, int turns) {
  __shared__ int shared[kThreads];
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 * 32;
  for (int t = 0; t < turns; t++) {
    shared[warp + lane] = in[t * kThreads + threadIdx.x];
    if (kBefore) __syncwarp();
    out[t * kThreads + threadIdx.x] = shared[warp + 31 - lane];
    if (kAfter) __syncwarp();
  }
}

// Across the warps of a block.
template <bool kBarrier>
__global__ void reverse_block(const int* in, int* out, int) {
  __shared__ int shared[kThreads];
  shared[threadIdx.x] = in[threadIdx.x];
  if (kBarrier) __syncthreads();
  out[threadIdx.x] = shared[kThreads - 1 - threadIdx.x];
}

__global__ void different_barriers(const int*, int*, int) {
  if (threadIdx.x == 0)
    __syncwarp();
  else
    __syncthreads();
}

// out: the value of lane 5, the value of the lane across, the lanes with an odd value.
__global__ void shuffles(const int* in, int* out, int) {
  const int value = in[threadIdx.x];
  out[threadIdx.x] = __shfl_sync(~0u, value, 5);
  out[kThreads + threadIdx.x] = __shfl_xor_sync(~0u, value, 16);
  out[2 * kThreads + threadIdx.x] = (int)__ballot_sync(~0u, value & 1);
}

void (*const kKernels[])(const int*, int*, int) = {
    reverse_lanes<true, true>, reverse_lanes<false, true>, reverse_lanes<true, false>, reverse_block<true>,
    reverse_block<false>,      different_barriers,         shuffles};

}  // namespace

// 0, or 1 where the emulation found a mistake.
extern "C" __attribute__((visibility("default"))) int self_check(int kernel, const int* in, int* out, int turns) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(1), config.blockDim = dim3(kThreads);
  try {
    return cudaLaunchKernelEx(&config, kKernels[kernel], in, out, turns);
  } catch (const std::logic_error&) {
    return 1;
  }
}
