// Additive noise and stochastic rounding: a lane makes the normals, or the 16-bit draws, of one block of the keystream, and
// reads from shared memory those of the elements that it holds. Loads are under way while they are made.
//
// Whole stretches of 32 blocks move in vectors where pointers are aligned and e0 begins a block; the ragged end, a
// misaligned pointer and an e0 inside a block go one element at a time.
#include "cuda/perturb.h"

#include <stdexcept>
#include <type_traits>

#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/rows.h"
#include "cuda/tile.h"
#include "law/convert.h"
#include "law/rounding.h"

namespace everett {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

struct Parameters {
  RecordSource record;
  int rounds;
  float sigma;
  const u8* in;
  u8* out;
  u64 n, e0;
  u64 step_blocks;  // from a warp's stretch to its next one
};

// What both kernels do: Op makes a block's row of draws, and has
//   kValues   elements a block decides
//   kVector   elements that one step of a lane takes: load() of In, store() of what becomes of them
template <class Op, Engine E>
__global__ void __launch_bounds__(kThreads, Op::kBlocksPerProcessor) perturb_kernel(const Parameters p) {
  using In = typename Op::In;
  using Out = typename Op::Out;
  constexpr u32 kStretch = 32 * Op::kValues;
  constexpr int kVectors = kStretch / 32 / Op::kVector;  // of a lane in a stretch
  alignas(64) __shared__ u8 shared[kWarps * kWarpBytes];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shared rows = shared_address(shared) + warp * kWarpBytes;
  const Keystream<E> stream({record_of(p.record), (u32)Op::kTag, 0}, p.rounds, rows + kTileBytes, lane);
  Shared places[2] = {row_of<4>(rows, lane), Op::vectors(rows, lane)};
  hide(places, rows, lane);
  const Shared row = places[0], vectors = places[1];

  const u32 phase = (u32)p.e0 % Op::kValues;
  const bool aligned = phase == 0 && (uintptr_t)p.in % 16 == 0 && (uintptr_t)p.out % (Op::kVector * sizeof(Out)) == 0;
  const u64 first_block = p.e0 / Op::kValues, first_stretch = (u64)blockIdx.x * kWarps + warp;
  u64 block = first_block + first_stretch * 32 + lane;
  // Counted as if the tensor began where its first block does.
  for (i64 left = (i64)(p.n + phase - first_stretch * kStretch); left > 0; left -= p.step_blocks * Op::kValues) {
    const bool whole = aligned && left >= kStretch;
    u64 begin = (block - lane - first_block) * Op::kValues - phase;  // the stretch's element 0, which may lie before the first
    const u64 mine = begin + lane * Op::kVector;
    uint4 v[kVectors];
    if (whole) {
      EV_UNROLL  // here and below: left to itself nvcc puts v in memory on some architectures
      for (int q = 0; q < kVectors; q++) v[q] = load_streaming(p.in + (mine + q * 32 * Op::kVector) * sizeof(In));
    }
    u32 x[16];
    stream.block(block, x);
    Op::prepare(x);
    __syncwarp();
    store_row<4>(row, x);
    __syncwarp();
    if (whole) {
      EV_UNROLL
      for (int q = 0; q < kVectors; q++)
        store_vector(p.out + (mine + q * 32 * Op::kVector) * sizeof(Out), Op::apply((const u32*)&v[q], vectors, q, p.sigma));
    } else {
      compute_here(begin);
      const u32 first = block - lane == first_block ? phase : 0, last = left < kStretch ? (u32)left : kStretch;
#pragma unroll 1
      for (u32 i = lane; i < kStretch; i += 32) {
        if (i - first >= last - first) continue;
        ((Out*)p.out)[begin + i] = Op::one(((const In*)p.in)[begin + i], rows, i, p.sigma);
      }
    }
    block += p.step_blocks;
  }
}

// ---- x + sigma * normal ----------------------------------------------------------------------------------------------

// The product is rounded before the sum, and that once to the type. A row is 16 fp32 normals.
template <class Type>
struct AddNoise {
  using In = typename Type::Stored;
  using Out = In;
  static constexpr Tag kTag = kTagNormal;
  static constexpr int kValues = 16, kVector = everett::kVector<Type>, kBlocksPerProcessor = 6;

  static __device__ __forceinline__ void prepare(u32 x[16]) {
    for (int i = 0; i < 16; i += 2) {
      float even, odd;
      normal_pair(x[i], x[i + 1], even, odd);
      x[i] = as_u32(even), x[i + 1] = as_u32(odd);
    }
  }

  // The normals of the elements in a 16-byte vector are 4 or 8 words: tile.h counts in half-words.
  static __device__ __forceinline__ Shared vectors(Shared rows, u32 lane) { return tile_vectors<2 * kVector>(rows, lane); }

  static __device__ __forceinline__ uint4 apply(const u32 v[4], Shared vectors, u32 q, float sigma) {
    u32 noise[kVector];
    load_vector<2 * kVector>(vectors, q, noise);
    uint4 y;
    for (int i = 0; i < 4; i++) ((u32*)&y)[i] = word(v[i], noise + i * Type::kInWord, sigma);
    return y;
  }

  static __device__ __forceinline__ Out one(In in, Shared rows, u32 i, float sigma) {
    const u32 noise[2] = {row_element<4, u32>(rows, i), 0};
    return (Out)word(in, noise, sigma);
  }

 private:
  static __device__ __forceinline__ u32 word(u32 in, const u32* noise, float sigma) {
    float x[Type::kInWord];
    Type::unpack(in, x);
    for (int i = 0; i < Type::kInWord; i++) {
      const float scaled = sigma * as_f32(noise[i]);
      x[i] = x[i] + scaled;
    }
    return Type::pack(x);
  }
};

// ---- stochastic rounding ---------------------------------------------------------------------------------------------

// fp32 to 16 bits. A row is 32 draws of 16 bits. Vectors of 4 elements: 16 bytes in, 8 bytes out.
template <class Type>
struct Round {
  using In = u32;
  using Out = u16;
  static constexpr Tag kTag = kTagRounding;
  static constexpr int kValues = 32, kVector = 4, kBlocksPerProcessor = 5;  // 32 registers of loads under way

  static __device__ __forceinline__ void prepare(u32[16]) {}
  static __device__ __forceinline__ Shared vectors(Shared rows, u32 lane) { return tile_vectors<kVector>(rows, lane); }

  static __device__ __forceinline__ uint2 apply(const u32 v[4], Shared vectors, u32 q, float) {
    u32 draws[2];
    load_vector<kVector>(vectors, q, draws);
    return make_uint2(rounded(v[0], draws[0] & 0xFFFFu) | rounded(v[1], draws[0] >> 16) << 16,
                      rounded(v[2], draws[1] & 0xFFFFu) | rounded(v[3], draws[1] >> 16) << 16);
  }

  static __device__ __forceinline__ Out one(In in, Shared rows, u32 i, float) {
    return (Out)rounded(in, row_element<4, u16>(rows, i));
  }

 private:
  static __device__ __forceinline__ u32 rounded(u32 bits, u32 draw) {
    return std::is_same_v<Type, ElementBf16> ? bf16_stochastic(bits, draw) : f16_stochastic(bits, draw);
  }
};

// ---- launches --------------------------------------------------------------------------------------------------------

template <class Op, Engine E>
void launch_one(const PerturbCall& c, u64 n, u64 e0, cudaStream_t stream) {
  const u64 a_block = kWarps * 32 * Op::kValues, blocks = (n + e0 % Op::kValues + a_block - 1) / a_block;
  const u64 resident = resident_blocks<perturb_kernel<Op, E>>(kThreads), grid = blocks < resident ? blocks : resident;
  const Parameters p = {c.record, rounds_of(c.generator), c.sigma, (const u8*)c.in, (u8*)c.out, n, e0, grid * kWarps * 32};
  launch("perturb_kernel", perturb_kernel<Op, E>, (unsigned)grid, kThreads, stream, p);
}

template <class Op>
void with_engine(const PerturbCall& c, u64 n, u64 e0, cudaStream_t stream) {
  switch (c.generator) {
    case kChaCha8: return launch_one<Op, Engine::chacha8>(c, n, e0, stream);
    case kPhilox: return launch_one<Op, Engine::philox>(c, n, e0, stream);
    default: return launch_one<Op, Engine::chacha>(c, n, e0, stream);
  }
}

}  // namespace

void launch_perturb(const PerturbCall& c, u64 n, u64 e0, cudaStream_t stream) {
  const bool noise = c.op == PerturbOp::add_noise;
  if (c.type != DType::bf16 && c.type != DType::f16 && !(noise && c.type == DType::f32))
    throw std::invalid_argument(noise ? "additive noise serves fp32, bf16 and fp16" : "stochastic rounding is to bf16 or fp16");
  if (n == 0) return;
  switch (c.type) {
    case DType::bf16:
      return noise ? with_engine<AddNoise<ElementBf16>>(c, n, e0, stream) : with_engine<Round<ElementBf16>>(c, n, e0, stream);
    case DType::f16:
      return noise ? with_engine<AddNoise<ElementF16>>(c, n, e0, stream) : with_engine<Round<ElementF16>>(c, n, e0, stream);
    default: return with_engine<AddNoise<ElementF32>>(c, n, e0, stream);
  }
}

}  // namespace everett
