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
#include "law/narrow.h"

namespace everett {
namespace {

// Four warps a block: with one tile a warp, 2^17 elements already fill the 32 warps of each of an H100's processors.
constexpr int kThreads = 128, kWarps = kThreads / 32;

template <class Type>
struct Parameters {
  RecordSource record;
  KeepRule rule;
  u32 s;
  Factors<Type> by;
  const typename Type::Stored* in;
  const typename Type::Stored* extra;
  typename Type::Stored* out;
  u64 n, e0;
};

// Registers decide how many warps hide the latency of memory: 64 a thread leave 32 warps a processor, 80 leave 24.
template <class Type, MaskedOp Op>
constexpr int kBlocksPerProcessor = sizeof(typename Type::Stored) <= 2 && Op != MaskedOp::dropout_add ? 8 : 6;

// Elements [first, last) of a tile, one at a time, 16 loads of a lane at once. `in` and so on point at the tile's
// element 0, which may lie before the tensor.
template <class Type, MaskedOp Op>
__device__ __forceinline__ void masked_by_element(const Parameters<Type>& p, i64 at, u32 first, u32 last, u32 lane,
                                                  const uint4* tile) {
  using Stored = typename Type::Stored;
  constexpr int kBatch = 16;
#pragma unroll 1
  for (u32 begin = 0; begin < kTile; begin += 32 * kBatch) {
    Stored in[kBatch], extra[kBatch];
    for (int k = 0; k < kBatch; k++) {
      const u32 i = begin + 32 * k + lane;
      in[k] = extra[k] = 0;
      if (i >= first && i < last) {
        in[k] = p.in[at + i];
        if (Op == MaskedOp::dropout_add) extra[k] = p.extra[at + i];
      }
    }
    for (int k = 0; k < kBatch; k++) {
      const u32 i = begin + 32 * k + lane;
      if (i >= first && i < last)
        p.out[at + i] = masked_element<Type, Op>(in[k], extra[k], tile_half(tile, i) != 0, p.by);
    }
  }
}

template <class Type, MaskedOp Op, Generator G, bool Wide>
__global__ void __launch_bounds__(kThreads, (kBlocksPerProcessor<Type, Op>)) masked_kernel(const Parameters<Type> p) {
  constexpr int kElements = kVector<Type>, kVectors = 32 / kElements;  // of a lane in a tile
  constexpr int kEarly = kVectors < 8 ? kVectors : 8;                  // loaded before the draws are made
  __shared__ uint4 tiles[kWarps * kTilePieces];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  uint4* tile = tiles + warp * kTilePieces;
  const Stream stream = {record_of(p.record), (u32)kTagKeep, p.s};
  const u32 phase = (u32)p.e0 & 31;
  const u64 first_block = p.e0 >> 5, total = p.n + phase;  // as if the tensor began where its first block does
  const bool aligned = phase == 0 && (((uintptr_t)p.in | (uintptr_t)p.extra | (uintptr_t)p.out) & 15) == 0;

  for (u64 at = ((u64)blockIdx.x * kWarps + warp) * kTile; at < total; at += (u64)gridDim.x * (kWarps * kTile)) {
    const bool whole = aligned && total - at >= kTile;
    const uint4* in = (const uint4*)(p.in + at) + lane;
    const uint4* extra = (const uint4*)(p.extra + at) + lane;
    uint4* out = (uint4*)(p.out + at) + lane;
    uint4 v[kEarly];
    if (whole)
      for (int q = 0; q < kEarly; q++) v[q] = __ldcs(in + 32 * q);
    keep_tile<G, Wide>(stream, p.rule, first_block + (at >> 5), lane, tile);
    if (whole) {
      for (int q = 0; q < kVectors; q++) {
        uint4 x = v[q % kEarly], r = {};
        if (q + kEarly < kVectors) v[q % kEarly] = __ldcs(in + 32 * (q + kEarly));
        if (Op == MaskedOp::dropout_add) r = __ldcs(extra + 32 * q);
        u32 halves[kElements / 2];
        tile_halves<kElements>(tile, (32 * q + lane) * kElements, halves);
        masked_vector<Type, Op>((u32*)&x, (const u32*)&r, halves, p.by);
        __stcs(out + 32 * q, x);
      }
    } else {
      const u32 first = at == 0 ? phase : 0, last = total - at < kTile ? (u32)(total - at) : kTile;
      masked_by_element<Type, Op>(p, (i64)at - phase, first, last, lane, tile);
    }
  }
}

template <class Type>
typename Type::Word repeated(double dropped);
template <>
u64 repeated<ElementF64>(double x) { return as_u64(x); }
template <>
u32 repeated<ElementF32>(double x) { return as_u32((float)x); }
template <>
u32 repeated<ElementBf16>(double x) { return bf16_of<u32>((float)x) * 0x10001u; }
template <>
u32 repeated<ElementF16>(double x) { return f16_of<u32>((float)x) * 0x10001u; }
template <>
u32 repeated<ElementE4m3>(double x) { return e4m3_of<u32>((float)x) * 0x1010101u; }
template <>
u32 repeated<ElementE5m2>(double x) { return e5m2_of<u32>((float)x) * 0x1010101u; }

template <class Type, MaskedOp Op, Generator G, bool Wide>
void launch_one(const MaskedCall& c, u64 n, u64 e0, cudaStream_t stream) {
  using Stored = typename Type::Stored;
  using Work = typename Type::Work;
  const Parameters<Type> p = {c.record,
                              keep_rule(c.threshold),
                              c.s,
                              {(Work)c.scale, (Work)c.shift, repeated<Type>(c.dropped)},
                              (const Stored*)c.in,
                              (const Stored*)c.extra,
                              (Stored*)c.out,
                              n,
                              e0};
  const u64 tiles = (n + (e0 & 31) + kTile - 1) / kTile, blocks = (tiles + kWarps - 1) / kWarps;
  const u64 resident = resident_blocks<masked_kernel<Type, Op, G, Wide>>(kThreads);
  launch("masked_kernel", masked_kernel<Type, Op, G, Wide>, (unsigned)(blocks < resident ? blocks : resident), kThreads,
         stream, p);
}

template <class Type, MaskedOp Op, Generator G>
void with_form(const MaskedCall& c, u64 n, u64 e0, cudaStream_t stream) {
  return c.threshold.wide ? launch_one<Type, Op, G, true>(c, n, e0, stream) : launch_one<Type, Op, G, false>(c, n, e0, stream);
}

template <class Type, MaskedOp Op>
void with_generator(const MaskedCall& c, u64 n, u64 e0, cudaStream_t stream) {
  switch (c.generator) {
    case kChaCha8: return with_form<Type, Op, kChaCha8>(c, n, e0, stream);
    case kChaCha12: return with_form<Type, Op, kChaCha12>(c, n, e0, stream);
    case kChaCha20: return with_form<Type, Op, kChaCha20>(c, n, e0, stream);
    case kPhilox: return with_form<Type, Op, kPhilox>(c, n, e0, stream);
  }
}

template <class Type>
void with_op(const MaskedCall& c, u64 n, u64 e0, cudaStream_t stream) {
  switch (c.op) {
    case MaskedOp::dropout: return with_generator<Type, MaskedOp::dropout>(c, n, e0, stream);
    case MaskedOp::dropout_add: return with_generator<Type, MaskedOp::dropout_add>(c, n, e0, stream);
    case MaskedOp::affine: return with_generator<Type, MaskedOp::affine>(c, n, e0, stream);
  }
}

}  // namespace

void launch_masked(const MaskedCall& c, u64 n, u64 e0, cudaStream_t stream) {
  if (n == 0) return;
  switch (c.type) {
    case DType::f32: return with_op<ElementF32>(c, n, e0, stream);
    case DType::f64: return with_op<ElementF64>(c, n, e0, stream);
    case DType::bf16: return with_op<ElementBf16>(c, n, e0, stream);
    case DType::f16: return with_op<ElementF16>(c, n, e0, stream);
    case DType::f8e4m3: return with_op<ElementE4m3>(c, n, e0, stream);
    case DType::f8e5m2: return with_op<ElementE5m2>(c, n, e0, stream);
    case DType::u32: throw std::invalid_argument("masked ops have no uint32 form");
  }
}

}  // namespace everett
