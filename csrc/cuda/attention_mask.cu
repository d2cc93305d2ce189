// Attention's keep mask: a warp takes a tile of 16 queries and 16 or 64 keys, a lane the pairs of weights that its unit of
// random words decides, which lie as in an MMA fragment. Made for correctness: the fused kernels are where speed is.
#include "cuda/attention_mask.h"

#include <stdexcept>

#include "cuda/elements.h"
#include "cuda/keystream.h"
#include "cuda/launch.h"

namespace everett {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

template <class Type>
struct Parameters {
  RecordSource record;
  Threshold threshold;
  int rounds;
  Factors<Type> by;
  const typename Type::Stored* in;
  typename Type::Stored* out;
  u64 queries, keys;
  u32 bh0;
  u64 q0, k0;
  u64 first_stripe, stripes, first_tile, tiles;  // tiles along the queries and along the keys
  u64 all;                                       // tiles in all
};

template <class Type, Engine E>
__global__ void __launch_bounds__(kThreads) attention_mask_kernel(const Parameters<Type> p) {
  constexpr u32 kWords = E == Engine::philox ? 4 : 16;
  const Subkey subkey = record_of(p.record);
  const u32 lane = threadIdx.x & 31;
  const u64 step = (u64)gridDim.x * kWarps;
  for (u64 at = (u64)blockIdx.x * kWarps + (threadIdx.x >> 5); at < p.all; at += step) {
    const u64 stripe = at / p.tiles % p.stripes + p.first_stripe, tile = at % p.tiles + p.first_tile;
    const u64 head = at / p.tiles / p.stripes;
    const u32 bh = p.bh0 + (u32)head;
    u32 x[kWords];
    attention_words<E>({subkey, (u32)kTagAttention, bh}, p.rounds, (u32)tile * kTileUnits + lane, (u32)stripe, x);
    EV_UNROLL
    for (u32 j = 0; j < kWords; j++) {
      const u64 q = stripe * kTileQueries + unit_query(lane, j, kWords), k = tile * 4 * kWords + unit_key(lane, j, kWords);
      if (q - p.q0 >= p.queries) continue;  // also before q0, by wrapping around
      const u32 threshold = attention_threshold(p.threshold, subkey.dither, bh, (u32)q);
      for (u32 half = 0; half < 2; half++) {
        if (k + half - p.k0 >= p.keys) continue;
        const u64 i = (head * p.queries + (q - p.q0)) * p.keys + (k + half - p.k0);
        const bool keep = (x[j] >> 16 * half & 0x7FFFu) >= threshold;
        p.out[i] = masked_element<Type, MaskedOp::dropout>(p.in[i], 0, keep, p.by);
      }
    }
  }
}

template <class Type, Engine E>
void launch_one(const AttentionMaskCall& c, cudaStream_t stream) {
  const u64 tile = tile_keys(c.generator), first_stripe = c.q0 / kTileQueries, first_tile = c.k0 / tile;
  const u64 stripes = (c.q0 + c.queries + kTileQueries - 1) / kTileQueries - first_stripe;
  const u64 tiles = (c.k0 + c.keys + tile - 1) / tile - first_tile;
  using Stored = typename Type::Stored;
  const Parameters<Type> p = {c.record, c.threshold, rounds_of(c.generator), factors<Type>(c.scale, 0, 0),
                              (const Stored*)c.in, (Stored*)c.out, c.queries, c.keys, c.bh0, c.q0, c.k0,
                              first_stripe, stripes, first_tile, tiles, c.heads * stripes * tiles};
  const u64 blocks = (p.all + kWarps - 1) / kWarps, resident = resident_blocks<attention_mask_kernel<Type, E>>(kThreads);
  launch("attention_mask_kernel", attention_mask_kernel<Type, E>, (unsigned)(blocks < resident ? blocks : resident), kThreads,
         stream, p);
}

template <class Type>
void with_engine(const AttentionMaskCall& c, cudaStream_t stream) {
  if (c.generator == kPhilox) return launch_one<Type, Engine::philox>(c, stream);
  launch_one<Type, Engine::chacha>(c, stream);
}

}  // namespace

void launch_attention_mask(const AttentionMaskCall& c, cudaStream_t stream) {
  if (c.heads == 0 || c.queries == 0 || c.keys == 0) return;
  switch (c.type) {
    case DType::f32: return with_engine<ElementF32>(c, stream);
    case DType::f64: return with_engine<ElementF64>(c, stream);
    case DType::bf16: return with_engine<ElementBf16>(c, stream);
    case DType::f16: return with_engine<ElementF16>(c, stream);
    default: throw std::invalid_argument("attention weights are fp32, fp64, bf16 or fp16");
  }
}

}  // namespace everett
