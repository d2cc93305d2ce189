// Fused dropout: tiles and masks as in masked.cu, with more arithmetic between load and store.
//
// Whole tiles move 16 bytes a load and store where all pointers are 16-byte aligned, e0 begins a block and vectors do not
// straddle rows. All other tiles go element by element. A column is counted along, never divided for: a 64-bit
// remainder would cost 12 instructions an element.
#include "cuda/fused.h"

#include <stdexcept>
#include <type_traits>

#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/tile.h"
#include "law/gelu.h"

namespace everett {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

constexpr __host__ __device__ bool takes_extra(FusedOp op) { return op != FusedOp::gelu_erf && op != FusedOp::gelu_tanh; }

// The kernels come in two sorts. A hot one has its op compiled in, takes 16-bit draws and loads ahead of them; the other
// sort looks up what it is asked for, so that few kernels serve all the rest.
template <FusedOp Op>
struct Fixed {
  static constexpr bool kHot = true, kExtra = takes_extra(Op);
  static constexpr FusedOp op = Op;
  static constexpr bool wide = false;
};
struct Any {
  static constexpr bool kHot = false, kExtra = true;
  FusedOp op;
  bool wide;
};

template <class Type, class What>
struct Parameters {
  What what;
  RecordSource record;
  KeepRule rule;
  int rounds;
  float scale;
  const u8 *in, *bias, *extra;
  u8* out;
  u64 n, e0;
  u64 step_blocks, step_bytes;                // from a warp's tile to its next one
  u32 columns;                                // 1 without a bias
  u32 step_tile, step_vectors, step_lanes;  // how far columns move: to the next tile, 32 vectors and 32 elements on
};

// ---- arithmetic ------------------------------------------------------------------------------------------------------

template <class What>
__device__ __forceinline__ float fused_value(const What& what, float v, float extra, float scale) {
  switch (what.op) {
    case FusedOp::bias_dropout_add: return v * scale + extra;
    case FusedOp::gelu_erf: return gelu_erf(v) * scale;
    case FusedOp::gelu_tanh: return gelu_tanh(v) * scale;
    case FusedOp::gelu_erf_backward: return extra * scale * gelu_erf_slope(v);
    default: return extra * scale * gelu_tanh_slope(v);
  }
}

// A word of elements under a mask of their width. bias_dropout_add masks what goes into it (a dropped element is then
// (0 + 0) * scale + extra), the others what comes out.
template <class Type, class What>
__device__ __forceinline__ u32 fused_word(const What& what, u32 word, u32 bias, u32 extra, u32 keep, float scale) {
  const u32 before = what.op == FusedOp::bias_dropout_add ? keep : ~0u, after = ~(before ^ keep);
  float v[Type::kInWord], b[Type::kInWord], r[Type::kInWord];
  Type::unpack(word & before, v);
  Type::unpack(bias & before, b);
  Type::unpack(extra, r);
  EV_UNROLL
  for (int i = 0; i < Type::kInWord; i++) v[i] = fused_value(what, v[i] + b[i], r[i], scale);
  return Type::pack(v) & after;
}

// ---- columns ---------------------------------------------------------------------------------------------------------

__device__ __forceinline__ u32 moved(u32 column, u32 by, u32 columns) {
  const u32 next = column + by;  // both are below columns, which is below 2^31
  return next >= columns ? next - columns : next;
}

// What stands for a bias that is not there: adding -0 changes nothing, not even a zero's sign.
template <class Type>
constexpr u32 kNoBias = sizeof(typename Type::Stored) == 4   ? 0x80000000u
                        : sizeof(typename Type::Stored) == 2 ? 0x80008000u
                                                             : 0x80808080u;

// ---- kernel ----------------------------------------------------------------------------------------------------------

// Elements [first, last) of a tile. `first_byte` is where the tile's element 0 is, or would be; `before` its index + 32.
template <class Type, class What>
__device__ __forceinline__ void fused_by_element(const Parameters<Type, What>& p, u64 first_byte, u64 before, u32 first,
                                                 u32 last, u32 lane, Shared tile) {
  using Stored = typename Type::Stored;
  constexpr int kBatch = What::kHot ? 4 : 1;  // loads of each input under way
  const Shared vectors = tile_vectors<1>(tile, lane);
  const Stored *in = (const Stored*)(p.in + first_byte), *extra = (const Stored*)(p.extra + first_byte);
  Stored* out = (Stored*)(p.out + first_byte);
  // 32 columns before element `lane`, which may lie before the tensor.
  u32 column = (u32)((before + lane) % p.columns);
  column = moved(column, p.columns - p.step_lanes, p.columns);
#pragma unroll 1
  for (u32 q = 0; q < 32; q += kBatch) {
    const u32 i = 32 * q + lane;
    u32 x[kBatch], b[kBatch], r[kBatch];
    for (int k = 0; k < kBatch; k++) {
      const bool inside = i + 32 * k - first < last - first;
      x[k] = inside ? (in + i)[32 * k] : 0;
      b[k] = inside && p.bias ? ((const Stored*)p.bias)[column] : kNoBias<Type>;
      r[k] = inside && takes_extra(p.what.op) ? (extra + i)[32 * k] : 0;
      column = moved(column, p.step_lanes, p.columns);
    }
    for (int k = 0; k < kBatch; k++) {
      u32 keep;
      load_vector<1>(vectors, q + k, &keep);
      const u32 y = fused_word<Type>(p.what, x[k], b[k], r[k], keep ? ~0u : 0u, p.scale);
      if (i + 32 * k - first < last - first) (out + i)[32 * k] = (Stored)y;
    }
  }
}

// By the registers: 80 leave 24 warps a processor. A slope beside loads under way takes more than that.
template <class What>
constexpr int kBlocksPerProcessor = What::kHot ? 6 : 4;
template <>
constexpr int kBlocksPerProcessor<Fixed<FusedOp::gelu_erf_backward>> = 5;
template <>
constexpr int kBlocksPerProcessor<Fixed<FusedOp::gelu_tanh_backward>> = 5;

template <class Type, class What, Engine E>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<What>) fused_kernel(const Parameters<Type, What> p) {
  using Stored = typename Type::Stored;
  constexpr int kElements = kVector<Type>, kVectors = 32 / kElements;  // of a lane in a tile
  // Vectors of each input loaded before the draws are made.
  constexpr int kMost = What::kExtra ? 4 : 8, kEarly = !What::kHot ? 1 : kVectors < kMost ? kVectors : kMost;
  alignas(64) __shared__ u8 shared[kWarps * kWarpBytes];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shared tile = shared_address(shared) + warp * kWarpBytes;
  const Keystream<E> stream({record_of(p.record), (u32)kTagKeep, 0}, p.rounds, tile + kTileBytes, lane);
  Shared places[2] = {tile_row<false>(tile, lane), tile_vectors<kElements>(tile, lane)};
  hide(places, tile, lane);
  const Shared row = places[0], vectors = places[1];

  const u32 phase = (u32)p.e0 & 31;
  const u64 total = p.n + phase;  // as if the tensor began where its first block does
  const bool extra = takes_extra(p.what.op);
  const bool aligned = phase == 0 && p.columns % kElements == (p.bias ? 0 : 1 % kElements) &&
                       (((uintptr_t)p.in | (uintptr_t)p.bias | (uintptr_t)p.extra | (uintptr_t)p.out) & 15) == 0;
  const u64 first_tile = (u64)blockIdx.x * kWarps + warp;
  u64 at = first_tile * kTile * sizeof(Stored) + lane * 16;
  u64 block = (p.e0 >> 5) + first_tile * 32 + lane;
  u32 tile_column = (u32)((first_tile * kTile + lane * kElements) % p.columns);  // of vector 0 of the lane

  for (i64 left = (i64)(total - first_tile * kTile); left > 0; left -= p.step_blocks * 32) {
    const bool whole = aligned && left >= kTile;
    uint4 v[kEarly], r[kEarly] = {};
    if (whole)
      for (int q = 0; q < kEarly; q++) {
        v[q] = load_streaming(p.in + at + 512 * q);
        if (extra) r[q] = load_streaming(p.extra + at + 512 * q);
      }
    if (p.what.wide)
      keep_tile<E, true>(stream, p.rule, block, lane, tile_row<true>(tile, lane));
    else
      keep_tile<E, false>(stream, p.rule, block, lane, row);
    if (whole) {
      u32 column = tile_column;
#pragma unroll(What::kHot ? kVectors : 1)
      for (int q = 0; q < kVectors; q++) {
        uint4 x = v[q % kEarly], add = r[q % kEarly], b = {kNoBias<Type>, kNoBias<Type>, kNoBias<Type>, kNoBias<Type>};
        if (q + kEarly < kVectors) {
          v[q % kEarly] = load_streaming(p.in + at + 512 * (q + kEarly));
          if (extra) r[q % kEarly] = load_streaming(p.extra + at + 512 * (q + kEarly));
        }
        if (p.bias) b = load_vector(p.bias + column * sizeof(Stored));
        column = moved(column, p.step_vectors, p.columns);
        u32 halves[kElements / 2];
        load_vector<kElements>(vectors, q, halves);
        u32* words = (u32*)&x;
        EV_UNROLL  // left to itself the compiler would put the vectors of the cold kernels in memory
        for (int i = 0; i < 4; i++)
          words[i] = fused_word<Type>(p.what, words[i], ((u32*)&b)[i], ((u32*)&add)[i], keep_of_word<Type>(halves, i), p.scale);
        store_vector(p.out + at + 512 * q, x);
      }
    } else {
      const u64 here = block - lane - (p.e0 >> 5);  // blocks before the tile
      u64 first_byte = at - lane * 16 - phase * sizeof(Stored);
      compute_here(first_byte);
      const u32 first = here == 0 ? phase : 0, last = left < kTile ? (u32)left : kTile;
      fused_by_element(p, first_byte, here * 32 + 32 - phase, first, last, lane, tile);
    }
    block += p.step_blocks, at += p.step_bytes, tile_column = moved(tile_column, p.step_tile, p.columns);
  }
}

// ---- launches --------------------------------------------------------------------------------------------------------

template <class Type, Engine E, class What>
void launch_one(const FusedCall& c, What what, u64 n, u64 e0, cudaStream_t stream) {
  using Stored = typename Type::Stored;
  const u64 tiles = (n + (e0 & 31) + kTile - 1) / kTile, blocks = (tiles + kWarps - 1) / kWarps;
  const u64 resident = resident_blocks<fused_kernel<Type, What, E>>(kThreads);
  const u64 grid = blocks < resident ? blocks : resident, step = grid * kWarps * kTile;
  const u64 columns = c.bias ? c.columns : 1;
  const Parameters<Type, What> p = {what,
                                    c.record,
                                    keep_rule(c.threshold),
                                    rounds_of(c.generator),
                                    c.threshold.scale,
                                    (const u8*)c.in,
                                    (const u8*)c.bias,
                                    (const u8*)c.extra,
                                    (u8*)c.out,
                                    n,
                                    e0,
                                    step / 32,
                                    step * sizeof(Stored),
                                    (u32)columns,
                                    (u32)(step % columns),
                                    (u32)(32 * kVector<Type> % columns),
                                    (u32)(32 % columns)};
  launch("fused_kernel", fused_kernel<Type, What, E>, (unsigned)grid, kThreads, stream, p);
}

template <class Type, Engine E>
void launch_hot(const FusedCall& c, u64 n, u64 e0, cudaStream_t stream) {
  switch (c.op) {
    case FusedOp::bias_dropout_add: return launch_one<Type, E>(c, Fixed<FusedOp::bias_dropout_add>{}, n, e0, stream);
    case FusedOp::gelu_erf: return launch_one<Type, E>(c, Fixed<FusedOp::gelu_erf>{}, n, e0, stream);
    case FusedOp::gelu_tanh: return launch_one<Type, E>(c, Fixed<FusedOp::gelu_tanh>{}, n, e0, stream);
    case FusedOp::gelu_erf_backward: return launch_one<Type, E>(c, Fixed<FusedOp::gelu_erf_backward>{}, n, e0, stream);
    case FusedOp::gelu_tanh_backward: return launch_one<Type, E>(c, Fixed<FusedOp::gelu_tanh_backward>{}, n, e0, stream);
  }
}

template <class Type>
void launch_type(const FusedCall& c, u64 n, u64 e0, cudaStream_t stream) {
  if constexpr (sizeof(typename Type::Stored) >= 2)
    if (!c.threshold.wide) {
      if (c.generator == kChaCha8) return launch_hot<Type, Engine::chacha8>(c, n, e0, stream);
      if (c.generator == kPhilox) return launch_hot<Type, Engine::philox>(c, n, e0, stream);
    }
  const Any what = {c.op, c.threshold.wide};
  if (c.generator == kPhilox)
    launch_one<Type, Engine::philox>(c, what, n, e0, stream);
  else
    launch_one<Type, Engine::chacha>(c, what, n, e0, stream);
}

}  // namespace

void launch_fused(const FusedCall& c, u64 n, u64 e0, cudaStream_t stream) {
  if (c.bias && (c.columns == 0 || c.columns >> 31)) throw std::invalid_argument("a bias has 1 to 2^31 - 1 elements");
  if (n == 0) return;
  with_element(c.type, [&](auto type) {
    using Type = decltype(type);
    if constexpr (std::is_same_v<Type, ElementF64>)
      throw std::invalid_argument("fused dropout computes in fp32, so it does not serve fp64");
    else
      launch_type<Type>(c, n, e0, stream);
  });
}

}  // namespace everett
