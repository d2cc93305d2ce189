// Direct words into values: one thread a granule. No source gives more than some 0.2 GB/s, so speed is of no interest.
#include "cuda/direct.h"

#include "cuda/launch.h"

namespace everett {
namespace {

constexpr int kThreads = 128;

__host__ __device__ Conversion conversion_of(Fill kind) {
  switch (kind) {
    case Fill::normal: return Conversion::normal;
    case Fill::exponential: return Conversion::exponential;
    case Fill::gumbel: return Conversion::gumbel;
    default: return Conversion::uniform;
  }
}

__device__ void store_double(DType type, void* out, u64 i, double x) {
  if (type == DType::f64)
    ((double*)out)[i] = x;
  else
    store_value((ValueType)type, out, i, (float)x);
}

__device__ void store_poison(const DirectCall& call, u64 first, int values) {
  for (u64 i = first; i < first + values && i < call.n; i++) {
    if (call.kind == Fill::words)
      ((u32*)call.out)[i] = 0xFFFFFFFFu;
    else
      store_double(call.type, call.out, i, (double)as_f32(0x7FC00000u));
  }
}

__device__ void store_granule(const DirectCall& call, const u32* w, u64 first) {
  switch (call.kind) {
    case Fill::words:
      for (int j = 0; j < 2 && first + j < call.n; j++) ((u32*)call.out)[first + j] = w[j];
      break;
    case Fill::bernoulli:
      store_double(call.type, call.out, first, bernoulli(draw64(w), call.p[first]) ? 1.0 : 0.0);
      break;
    default: convert_granule(conversion_of(call.kind), (ValueType)call.type, w, first, call.n, call.out);
  }
}

__global__ void direct_kernel(DirectCall call, WordSource from, u64 first, u64 granules, int values, int words) {
  const u64 g = (u64)blockIdx.x * kThreads + threadIdx.x;
  if (g >= granules) return;
  const u64 start = start_of(from), value = (first + g) * values;
  if (start == kNoWords) return store_poison(call, value, values);
  u32 w[4];
  EV_UNROLL
  for (int j = 0; j < 2; j++) {
    const u64 word = j < words ? from.words[(start + g * words + j) & from.mask] : 0;
    w[2 * j] = (u32)word, w[2 * j + 1] = (u32)(word >> 32);
  }
  store_granule(call, w, value);
}

}  // namespace

int direct_values(Fill kind, DType type) {
  if (kind == Fill::words) return 2;
  return kind == Fill::bernoulli ? 1 : values_per_granule(conversion_of(kind), (ValueType)type);
}

int direct_words(Fill kind, DType type) {
  const bool one = kind == Fill::words || kind == Fill::bernoulli;
  return one ? 1 : words_per_granule(conversion_of(kind), (ValueType)type);
}

void launch_direct(const DirectCall& call, const WordSource& from, u64 first, u64 granules, cudaStream_t stream) {
  if (granules == 0) return;
  const u64 grid = (granules + kThreads - 1) / kThreads;
  launch("kernel direct_kernel", direct_kernel, (unsigned)grid, kThreads, stream, call, from, first, granules,
         direct_values(call.kind, call.type), direct_words(call.kind, call.type));
}

}  // namespace everett
