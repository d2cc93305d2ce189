// Masked ops on contiguous memory: a warp takes tiles of 1024 elements; a lane makes the masks of one block of 32, then
// reads those of the elements it holds.
//
// Whole tiles whose pointers are 16-byte aligned and whose e0 begins a block move 16 bytes a load and store, and the
// loads are under way while the draws are made. Every other tile (the ragged end, a misaligned pointer, a shard that
// starts inside a block) reads the same masks one element at a time.
#include "cuda/masked.h"

#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/tile.h"

namespace everett {
namespace {

// Four warps a block: 2^19 elements are 512 tiles, which four warps a block spread over 128 processors and eight over 64.
constexpr int kThreads = 128, kWarps = kThreads / 32;

template <class Type>
struct Parameters {
  RecordSource record;
  KeepRule rule;
  u32 s;
  int rounds;
  Factors<Type> by;
  const typename Type::Stored* in;
  const typename Type::Stored* extra;
  typename Type::Stored* out;
  u64 n, e0;
  u64 step_blocks, step_bytes;  // from a warp's tile to its next one
};

// Registers decide how many warps hide the latency of memory: 64 a thread leave 32 warps a processor, 80 leave 24.
template <class Type>
constexpr int kBlocksPerProcessor = sizeof(typename Type::Stored) <= 2 ? 8 : sizeof(typename Type::Stored) == 4 ? 6 : 4;

// Elements [first, last) of a tile, one at a time. `in` and so on are where the tile's element 0 is, or would be. A lane
// has a batch of loads under way at once: one by one, a ragged end would wait for memory 32 times.
template <class Type, MaskedOp Op>
__device__ __forceinline__ void masked_by_element(const typename Type::Stored* in, const typename Type::Stored* extra,
                                                  typename Type::Stored* out, const Factors<Type>& by, u32 first,
                                                  u32 last, u32 lane, Shared tile) {
  constexpr int kBatch = sizeof(typename Type::Stored) < 8 && Op != MaskedOp::dropout_add ? 16 : 8;
  const Shared vectors = tile_vectors<1>(tile, lane);
#pragma unroll 1
  for (u32 q = 0; q < 32; q += kBatch) {
    const u32 i = 32 * q + lane;
    typename Type::Stored x[kBatch], r[kBatch];
    for (int k = 0; k < kBatch; k++) {
      const bool inside = i + 32 * k - first < last - first;
      x[k] = inside ? (in + i)[32 * k] : 0;
      r[k] = inside && Op == MaskedOp::dropout_add ? (extra + i)[32 * k] : 0;
    }
    for (int k = 0; k < kBatch; k++) {
      u32 keep;
      load_vector<1>(vectors + q * 64, k, &keep);
      if (i + 32 * k - first < last - first) (out + i)[32 * k] = masked_element<Type, Op>(x[k], r[k], keep != 0, by);
    }
  }
}

template <class Type, MaskedOp Op, Engine E, bool Wide>
__global__ void __launch_bounds__(kThreads, kBlocksPerProcessor<Type>) masked_kernel(const Parameters<Type> p) {
  constexpr int kElements = kVector<Type>, kVectors = 32 / kElements;  // of a lane in a tile
  constexpr int kEarly = kVectors < 8 ? kVectors : 8;                  // loaded before the draws are made
  using Stored = typename Type::Stored;
  alignas(64) __shared__ u8 shared[kWarps * kWarpBytes];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shared tile = shared_address(shared) + warp * kWarpBytes;
  const Keystream<E> stream({record_of(p.record), (u32)kTagKeep, p.s}, p.rounds, tile + kTileBytes, lane);
  Shared places[2] = {tile_row<Wide>(tile, lane), tile_vectors<kElements>(tile, lane)};
  hide(places, tile, lane);
  const Shared row = places[0], vectors = places[1];

  const u32 phase = (u32)p.e0 & 31;
  const u64 total = p.n + phase;  // as if the tensor began where its first block does
  const bool aligned = phase == 0 && (((uintptr_t)p.in | (uintptr_t)p.extra | (uintptr_t)p.out) & 15) == 0;
  const u64 first_tile = (u64)blockIdx.x * kWarps + warp;
  u64 at = first_tile * kTile * sizeof(Stored) + lane * 16;
  u64 block = (p.e0 >> 5) + first_tile * 32 + lane;

  for (i64 left = (i64)(total - first_tile * kTile); left > 0; left -= p.step_blocks * 32) {
    const bool whole = aligned && left >= kTile;
    const u8 *in = (const u8*)p.in + at, *extra = (const u8*)p.extra + at;
    u8* out = (u8*)p.out + at;
    uint4 v[kEarly];
    if (whole)
      for (int q = 0; q < kEarly; q++) v[q] = load_streaming(in + 512 * q);
    keep_tile<E, Wide>(stream, p.rule, block, lane, row);
    if (whole) {
      for (int q = 0; q < kVectors; q++) {
        uint4 x = v[q % kEarly], r = {};
        if (q + kEarly < kVectors) v[q % kEarly] = load_streaming(in + 512 * (q + kEarly));
        if (Op == MaskedOp::dropout_add) r = load_streaming(extra + 512 * q);
        u32 halves[kElements / 2];
        load_vector<kElements>(vectors, q, halves);
        masked_vector<Type, Op>((u32*)&x, (const u32*)&r, halves, p.by);
        store_vector(out + 512 * q, x);
      }
    } else {
      u64 first_byte = at - lane * 16 - phase * sizeof(Stored);
      compute_here(first_byte);
      const u32 first = block - lane == p.e0 >> 5 ? phase : 0, last = left < kTile ? (u32)left : kTile;
      masked_by_element<Type, Op>((const Stored*)((const u8*)p.in + first_byte),
                                  (const Stored*)((const u8*)p.extra + first_byte),
                                  (Stored*)((u8*)p.out + first_byte), p.by, first, last, lane, tile);
    }
    block += p.step_blocks, at += p.step_bytes;
  }
}

template <class Type, MaskedOp Op, Engine E, bool Wide>
void launch_one(const MaskedCall& c, u64 n, u64 e0, cudaStream_t stream) {
  using Stored = typename Type::Stored;
  const u64 tiles = (n + (e0 & 31) + kTile - 1) / kTile, blocks = (tiles + kWarps - 1) / kWarps;
  const u64 resident = resident_blocks<masked_kernel<Type, Op, E, Wide>>(kThreads);
  const u64 grid = blocks < resident ? blocks : resident, step = grid * kWarps * kTile;
  const Parameters<Type> p = {c.record,
                              keep_rule(c.threshold),
                              c.s,
                              rounds_of(c.generator),
                              factors<Type>(c.scale, c.shift, c.dropped),
                              (const Stored*)c.in,
                              (const Stored*)c.extra,
                              (Stored*)c.out,
                              n,
                              e0,
                              step / 32,
                              step * sizeof(Stored)};
  launch("masked_kernel", masked_kernel<Type, Op, E, Wide>, (unsigned)grid, kThreads, stream, p);
}

template <class Type, MaskedOp Op>
void with_engine(const MaskedCall& c, u64 n, u64 e0, cudaStream_t stream) {
  constexpr bool kHot = sizeof(typename Type::Stored) < 8 && Op != MaskedOp::affine;
  const bool wide = c.threshold.wide;
  if (c.generator == kPhilox)
    return wide ? launch_one<Type, Op, Engine::philox, true>(c, n, e0, stream)
                : launch_one<Type, Op, Engine::philox, false>(c, n, e0, stream);
  if constexpr (kHot)
    if (c.generator == kChaCha8 && !wide) return launch_one<Type, Op, Engine::chacha8, false>(c, n, e0, stream);
  return wide ? launch_one<Type, Op, Engine::chacha, true>(c, n, e0, stream)
              : launch_one<Type, Op, Engine::chacha, false>(c, n, e0, stream);
}

template <class Type>
void with_op(const MaskedCall& c, u64 n, u64 e0, cudaStream_t stream) {
  switch (c.op) {
    case MaskedOp::dropout: return with_engine<Type, MaskedOp::dropout>(c, n, e0, stream);
    case MaskedOp::dropout_add: return with_engine<Type, MaskedOp::dropout_add>(c, n, e0, stream);
    case MaskedOp::affine: return with_engine<Type, MaskedOp::affine>(c, n, e0, stream);
  }
}

}  // namespace

void launch_masked(const MaskedCall& c, u64 n, u64 e0, cudaStream_t stream) {
  if (n == 0) return;
  with_element(c.type, [&](auto type) { with_op<decltype(type)>(c, n, e0, stream); });
}

}  // namespace everett
