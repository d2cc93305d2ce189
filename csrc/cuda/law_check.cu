// The stream law evaluated on a GPU for a range of keystream blocks, so that a test can hold the very headers that all
// kernels use against the CPU on each new card, compiler and driver. One thread a block; speed is of no interest here.
#include "cuda/law_check.h"

#include "cuda/launch.h"
#include "law/convert.h"

namespace everett {
namespace {

__device__ void write_words(const u32 x[16], u32* out) {
  for (int j = 0; j < 16; j++) out[j] = x[j];
}

__device__ void write_keep(const u32 x[16], const Threshold& h, u32 dither, u64 block, u32* out) {
  const u64 threshold = block_threshold(h, dither, (u32)block);
  for (int e = 0; e < 32; e++) {
    const u32 draw = (x[e >> 1] >> (16 * (e & 1))) & 0x7FFFu;
    out[e] = draw >= threshold;
  }
}

__device__ void write_normals(const u32 x[16], u32* out) {
  for (int j = 0; j < 16; j += 2) {
    float even, odd;
    normal_pair(x[j], x[j + 1], even, odd);
    out[j] = as_u32(even), out[j + 1] = as_u32(odd);
  }
}

template <Generator G>
__global__ void law_check_kernel(Stream t, Threshold h, LawCheck what, u64 first_block, u32 blocks, u32* out) {
  const u32 i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= blocks) return;
  const u64 block = first_block + i;
  u32 x[16];
  stream_block<G>(t, (u32)block, (u32)(block >> 32), x);
  out += (u64)i * values_per_block(what);
  switch (what) {
    case LawCheck::words: write_words(x, out); break;
    case LawCheck::keep: write_keep(x, h, t.subkey.dither, block, out); break;
    case LawCheck::normal: write_normals(x, out); break;
    case LawCheck::uniform:
      for (int j = 0; j < 16; j++) out[j] = as_u32(unit_closed_open<kUniformBitsF32>(x[j]));
      break;
    case LawCheck::exponential:
      for (int j = 0; j < 8; j++) out[j] = as_u32(exponential(x[2 * j], x[2 * j + 1]));
      break;
    case LawCheck::gumbel:
      for (int j = 0; j < 8; j++) out[j] = as_u32(gumbel(x[2 * j], x[2 * j + 1]));
      break;
  }
}

}  // namespace

void law_check(Generator g, const Stream& t, double p, LawCheck what, u64 first_block, u32 blocks, u32* out,
               cudaStream_t stream) {
  if (blocks == 0) return;
  const size_t bytes = (size_t)blocks * values_per_block(what) * sizeof(u32);
  u32* device = nullptr;
  check(cudaMallocAsync(&device, bytes, stream), "law_check: allocation");
  const auto kernel = g == kChaCha8    ? law_check_kernel<kChaCha8>
                      : g == kChaCha12 ? law_check_kernel<kChaCha12>
                      : g == kChaCha20 ? law_check_kernel<kChaCha20>
                                       : law_check_kernel<kPhilox>;
  try {
    launch("law_check_kernel", kernel, (blocks + 127) / 128, 128, stream, t, threshold_of(p), what, first_block, blocks,
           device);
    check(cudaMemcpyAsync(out, device, bytes, cudaMemcpyDeviceToHost, stream), "law_check: copying back");
    check(cudaStreamSynchronize(stream), "law_check_kernel");
  } catch (...) {
    cudaFreeAsync(device, stream);
    throw;
  }
  check(cudaFreeAsync(device, stream), "law_check: freeing");
}

int device_count() {
  int n = 0;
  const cudaError_t error = cudaGetDeviceCount(&n);
  if (error == cudaErrorNoDevice) return 0;
  check(error, "counting devices (a driver older than this build's CUDA gives this too)");
  return n;
}

}  // namespace everett
