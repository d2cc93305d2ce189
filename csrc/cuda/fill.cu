// Fills: a lane makes the values of one block of the keystream, and its warp stores those of 32 blocks as one stretch.
//
// Whole stretches whose memory is 16-byte aligned and whose e0 begins a block leave in 16-byte stores. The ragged end, a
// misaligned pointer and an e0 inside a block read the same values from shared memory one at a time.
#include "cuda/fill.h"

#include <stdexcept>

#include "cuda/elements.h"
#include "cuda/keystream.h"
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "law/convert.h"

namespace everett {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;
constexpr int kWarpBytes = 2048 + 64;  // of shared memory: 32 rows of up to 64 bytes, and behind them a Keystream's part
static_assert(kKeystreamBytes <= 64, "a keystream's part follows the rows");

template <class Type>
constexpr int kUniformBits = kUniformBitsF32;
template <>
constexpr int kUniformBits<ElementBf16> = kUniformBitsBf16;
template <>
constexpr int kUniformBits<ElementF16> = kUniformBitsF16;

// What a block of the keystream gives: kValues values, as kPieces pieces of 16 bytes.
template <Fill Kind, class Type>
struct Row {
  using Stored = typename Type::Stored;
  static constexpr bool kDraws64 = sizeof(Stored) == 8 || Kind == Fill::exponential || Kind == Fill::gumbel;
  static constexpr int kValues = kDraws64 ? 8 : 16;
  static constexpr int kPieces = kValues * sizeof(Stored) / 16;

  // Words of keystream into stored patterns.
  static __device__ __forceinline__ void convert(u32 x[16]) {
    if constexpr (Kind == Fill::words) return;
    if constexpr (sizeof(Stored) == 8)
      convert_f64(x);
    else
      convert_f32(x);
  }

 private:
  static __device__ __forceinline__ void convert_f32(u32 x[16]) {
    float v[kValues];
    if constexpr (Kind == Fill::uniform)
      for (int i = 0; i < 16; i++) v[i] = unit_closed_open<kUniformBits<Type>>(x[i]);
    if constexpr (Kind == Fill::normal)
      for (int i = 0; i < 16; i += 2) normal_pair(x[i], x[i + 1], v[i], v[i + 1]);
    if constexpr (Kind == Fill::exponential)
      for (int i = 0; i < 8; i++) {
        v[i] = exponential(x[2 * i], x[2 * i + 1]);
        if constexpr (std::is_same_v<Type, ElementF16>) v[i] = above_zero_f16(v[i]);
      }
    if constexpr (Kind == Fill::gumbel)
      for (int i = 0; i < 8; i++) v[i] = gumbel(x[2 * i], x[2 * i + 1]);
    for (int i = 0; i < 4 * kPieces; i++) x[i] = Type::pack(v + i * Type::kInWord);
  }

  static __device__ __forceinline__ void convert_f64(u32 x[16]) {
    u64 draw[8];
    double v[8];
    for (int i = 0; i < 8; i++) draw[i] = (u64)x[2 * i + 1] << 32 | x[2 * i];
    for (int i = 0; i < 8; i++) {
      if constexpr (Kind == Fill::uniform) v[i] = unit_closed_open_f64(draw[i]);
      if constexpr (Kind == Fill::exponential) v[i] = exponential_f64(draw[i]);
      if constexpr (Kind == Fill::gumbel) v[i] = gumbel_f64(draw[i]);
      if constexpr (Kind == Fill::normal)
        if (i % 2 == 0) normal_pair_f64(draw[i], draw[i + 1], v[i], v[i + 1]);
    }
    for (int i = 0; i < 8; i++) x[2 * i] = (u32)as_u64(v[i]), x[2 * i + 1] = (u32)(as_u64(v[i]) >> 32);
  }
};

struct Parameters {
  RecordSource record;
  u32 tag, s;
  int rounds;
  u8* out;
  u64 n, e0;
  u64 step_blocks, step_bytes;  // from a warp's stretch to its next one
};

// 64 registers leave 32 warps a processor. fp64's polynomials take more.
template <class Type>
constexpr int kBlocksPerProcessor = sizeof(typename Type::Stored) == 8 ? 4 : 8;

template <Fill Kind, class Type, Engine E>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<Type>) fill_kernel(const Parameters p) {
  using Stored = typename Type::Stored;
  using R = Row<Kind, Type>;
  constexpr u32 kStretch = 32 * R::kValues;
  alignas(64) __shared__ u8 shared[kWarps * kWarpBytes];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shared rows = shared_address(shared) + warp * kWarpBytes;
  const Keystream<E> stream({record_of(p.record), p.tag, p.s}, p.rounds, rows + 2048, lane);
  Shared places[2] = {row_of<R::kPieces>(rows, lane), row_piece<R::kPieces>(rows, lane)};
  hide(places, rows, lane);
  const Shared row = places[0], pieces = places[1];

  const u32 phase = (u32)p.e0 % R::kValues;
  const bool aligned = phase == 0 && ((uintptr_t)p.out & 15) == 0;
  const u64 first_stretch = (u64)blockIdx.x * kWarps + warp;
  const u64 first_block = p.e0 / R::kValues;
  u64 at = first_stretch * kStretch * sizeof(Stored) + lane * 16;
  u64 block = first_block + first_stretch * 32 + lane;

  // Counted as if the memory began where its first block does.
  for (i64 left = (i64)(p.n + phase - first_stretch * kStretch); left > 0; left -= p.step_blocks * R::kValues) {
    u32 x[16];
    stream.block(block, x);
    R::convert(x);
    __syncwarp();
    store_row<R::kPieces>(row, x);
    __syncwarp();
    if (aligned && left >= kStretch) {
      for (int q = 0; q < R::kPieces; q++) {
        uint4 v;
        load_piece(pieces, q, (u32*)&v);
        store_vector(p.out + at + 512 * q, v);
      }
    } else {
      u64 first_byte = at - lane * 16 - phase * sizeof(Stored);
      compute_here(first_byte);
      const u32 first = block - lane == first_block ? phase : 0, last = left < kStretch ? (u32)left : kStretch;
#pragma unroll 4
      for (u32 i = lane; i < kStretch; i += 32) {
        const Stored value = row_element<R::kPieces, Stored>(rows, i);
        if (i - first < last - first) ((Stored*)(p.out + first_byte))[i] = value;
      }
    }
    block += p.step_blocks, at += p.step_bytes;
  }
}

// ---- Bernoulli decisions and integers --------------------------------------------------------------------------------

struct DecisionParameters {
  RecordSource record;
  u32 tag, s;
  int rounds;
  const u64* p;
  u64 p_step;  // from an element's parameter to the next one's: 1, or 0 where all have the same
  void* out;
  u64 one;  // Bernoulli: the pattern of 1, of `bytes` bytes
  int bytes;
  u64 n, e0;
};

template <Fill Kind>
__device__ __forceinline__ u64 decision(u64 draw, u64 parameter, u64 one) {
  if constexpr (Kind == Fill::integers) return integer_below(draw, parameter);
  return bernoulli(draw, as_f64(parameter)) ? one : 0;
}

// An element at a time, neighbours in neighbouring lanes: the 8 bytes of p that each reads are what takes the time.
template <Fill Kind, Engine E>
__global__ void __launch_bounds__(kThreads) decision_kernel(const DecisionParameters p) {
  constexpr u32 kStretch = 256;
  alignas(64) __shared__ u8 shared[kWarps * kWarpBytes];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shared rows = shared_address(shared) + warp * kWarpBytes;
  const Keystream<E> stream({record_of(p.record), p.tag, p.s}, p.rounds, rows + 2048, lane);
  const u32 phase = (u32)p.e0 & 7;
  const u64 step = (u64)gridDim.x * kWarps;
  for (u64 stretch = (u64)blockIdx.x * kWarps + warp; stretch * kStretch < p.n + phase; stretch += step) {
    const u64 begin = stretch * kStretch - phase + lane;  // wraps around before the first element, which n then rules out
    u64 parameter[8];
    for (u32 k = 0; k < 8; k++) parameter[k] = begin + 32 * k < p.n ? p.p[(begin + 32 * k) * p.p_step] : 0;
    u32 x[16];
    stream.block((p.e0 >> 3) + stretch * 32 + lane, x);
    __syncwarp();
    store_row<4>(row_of<4>(rows, lane), x);
    __syncwarp();
    for (u32 k = 0; k < 8; k++) {
      const u64 i = begin + 32 * k;
      const u64 value = decision<Kind>(row_element<4, u64>(rows, 32 * k + lane), parameter[k], p.one);
      if (i >= p.n) continue;
      if (p.bytes == 2) ((u16*)p.out)[i] = (u16)value;
      if (p.bytes == 4) ((u32*)p.out)[i] = (u32)value;
      if (p.bytes == 8) ((u64*)p.out)[i] = value;
    }
  }
}

// ---- launches --------------------------------------------------------------------------------------------------------

// Blocks that `stretches` of a warp each keep busy.
template <auto* Kernel>
unsigned grid_for(u64 stretches) {
  const u64 blocks = (stretches + kWarps - 1) / kWarps, resident = resident_blocks<Kernel>(kThreads);
  return (unsigned)(blocks < resident ? blocks : resident);
}

template <Fill Kind, class Type, Engine E>
void launch_one(const FillCall& c, u64 n, u64 e0, cudaStream_t stream) {
  constexpr u64 kValues = Row<Kind, Type>::kValues, kStretch = 32 * kValues;
  const unsigned grid = grid_for<fill_kernel<Kind, Type, E>>((n + e0 % kValues + kStretch - 1) / kStretch);
  const u64 step = (u64)grid * kWarps;
  const Parameters p = {c.record, c.tag, c.s, rounds_of(c.generator), (u8*)c.out, n, e0, step * 32,
                        step * kStretch * sizeof(typename Type::Stored)};
  launch("fill_kernel", fill_kernel<Kind, Type, E>, grid, kThreads, stream, p);
}

template <Fill Kind, class Type>
void with_engine(const FillCall& c, u64 n, u64 e0, cudaStream_t stream) {
  constexpr bool kHot = sizeof(typename Type::Stored) < 8 && Kind <= Fill::normal;
  if (c.generator == kPhilox) return launch_one<Kind, Type, Engine::philox>(c, n, e0, stream);
  if constexpr (kHot)
    if (c.generator == kChaCha8) return launch_one<Kind, Type, Engine::chacha8>(c, n, e0, stream);
  launch_one<Kind, Type, Engine::chacha>(c, n, e0, stream);
}

template <Fill Kind>
void with_type(const FillCall& c, u64 n, u64 e0, cudaStream_t stream) {
  switch (c.type) {
    case DType::f32: return with_engine<Kind, ElementF32>(c, n, e0, stream);
    case DType::f64: return with_engine<Kind, ElementF64>(c, n, e0, stream);
    case DType::bf16: return with_engine<Kind, ElementBf16>(c, n, e0, stream);
    case DType::f16: return with_engine<Kind, ElementF16>(c, n, e0, stream);
    default: throw std::invalid_argument("this fill needs fp32, fp64, bf16 or fp16");
  }
}

u64 pattern_of_one(DType type) {
  switch (type) {
    case DType::f32: return ElementF32::stored(1);
    case DType::f64: return ElementF64::stored(1);
    case DType::bf16: return ElementBf16::stored(1);
    case DType::f16: return ElementF16::stored(1);
    default: throw std::invalid_argument("this fill needs fp32, fp64, bf16 or fp16");
  }
}

template <Fill Kind, Engine E>
void launch_decisions(const FillCall& c, u64 n, u64 e0, cudaStream_t stream) {
  const u64 one = Kind == Fill::bernoulli ? pattern_of_one(c.type) : 0;
  const DecisionParameters p = {c.record, c.tag, c.s, rounds_of(c.generator), c.p, c.one_p ? 0u : 1u, c.out, one,
                                bytes_of(c.type), n, e0};
  const unsigned grid = grid_for<decision_kernel<Kind, E>>((n + e0 % 8 + 255) / 256);
  launch("decision_kernel", decision_kernel<Kind, E>, grid, kThreads, stream, p);
}

template <Fill Kind>
void decide(const FillCall& c, u64 n, u64 e0, cudaStream_t stream) {
  if (c.generator == kPhilox) return launch_decisions<Kind, Engine::philox>(c, n, e0, stream);
  launch_decisions<Kind, Engine::chacha>(c, n, e0, stream);
}

}  // namespace

void launch_fill(const FillCall& c, u64 n, u64 e0, cudaStream_t stream) {
  if (c.kind == Fill::words && c.type != DType::u32) throw std::invalid_argument("words are uint32");
  if (c.kind == Fill::integers && c.type != DType::i64) throw std::invalid_argument("integers are int64");
  if (c.kind >= Fill::gamma && c.type != DType::f64) throw std::invalid_argument("gamma variates are fp64");
  if (n == 0) return;
  switch (c.kind) {
    case Fill::words: return with_engine<Fill::words, ElementF32>(c, n, e0, stream);
    case Fill::uniform: return with_type<Fill::uniform>(c, n, e0, stream);
    case Fill::normal: return with_type<Fill::normal>(c, n, e0, stream);
    case Fill::exponential: return with_type<Fill::exponential>(c, n, e0, stream);
    case Fill::gumbel: return with_type<Fill::gumbel>(c, n, e0, stream);
    case Fill::bernoulli: return decide<Fill::bernoulli>(c, n, e0, stream);
    case Fill::integers: return decide<Fill::integers>(c, n, e0, stream);
    case Fill::gamma:
    case Fill::log_gamma: return launch_gamma(c, n, e0, stream);
  }
}

}  // namespace everett
