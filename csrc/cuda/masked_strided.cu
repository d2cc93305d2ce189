// Masked ops on any layout and any shard. A warp takes 1024 positions in row-major order; lane g makes the masks of the
// block in which the first of positions 32g ... 32g+31 lies, and most positions find their decision there or in the
// masks of lane g+1. A position whose logical index lies elsewhere makes its block by itself.
#include "cuda/elements.h"
#include "cuda/launch.h"
#include "cuda/masked.h"
#include "cuda/tile.h"

namespace everett {
namespace {

constexpr int kThreads = 128, kWarps = kThreads / 32;

template <class Type>
struct Parameters {
  RecordSource record;
  KeepRule rule;
  u32 s;
  int rounds;
  bool wide;
  MaskedOp op;
  Factors<Type> by;
  const typename Type::Stored* in;
  const typename Type::Stored* extra;
  typename Type::Stored* out;
  u64 n;
  Layout layout;
};

// Offsets in elements, and the logical index, of a position.
struct Place {
  i64 in, extra, out;
  u64 e;
};

__device__ __forceinline__ Place place_of(const Layout& l, u64 position) {
  Place p = {0, 0, 0, l.e0};
  for (int d = l.dims - 1; d >= 0; d--) {
    const u64 size = (u64)l.size[d];
    u64 next = 0;  // the position among dimensions 0 ... d-1
    if (d > 0) next = (position | size) >> 32 ? position / size : (u32)position / (u32)size;  // 32 bits divide 4x faster
    const i64 at = (i64)(position - next * size);
    p.in += at * l.in[d], p.extra += at * l.extra[d], p.out += at * l.out[d], p.e += (u64)(at * l.e[d]);
    position = next;
  }
  return p;
}

// The decision of one logical index, from a block made for it alone.
template <Engine E>
__device__ __forceinline__ bool keep_alone(const Keystream<E>& t, const KeepRule& rule, bool wide, u64 e) {
  u32 x[16];
  t.block(wide ? e >> 4 : e >> 5, x);
  const u32 index = wide ? (u32)e & 15 : (u32)e >> 1 & 15;
  u32 word = 0;
  EV_UNROLL  // an index that is known only at run time would put x in memory
  for (u32 j = 0; j < 16; j++) word = j == index ? x[j] : word;
  const u32 draw = wide ? word : word >> 16 * ((u32)e & 1) & 0x7FFFu;
  const bool more = dither_of(t.stream.subkey.dither, (u32)(e >> 5)) < rule.f;
  return (draw > rule.t || (draw == rule.t && !more)) && rule.possible != 0;
}

template <class Type>
__device__ __forceinline__ typename Type::Stored masked_element_of(MaskedOp op, typename Type::Stored in,
                                                                   typename Type::Stored extra, bool keep,
                                                                   const Factors<Type>& by) {
  switch (op) {
    case MaskedOp::dropout_add: return masked_element<Type, MaskedOp::dropout_add>(in, extra, keep, by);
    case MaskedOp::affine: return masked_element<Type, MaskedOp::affine>(in, extra, keep, by);
    default: return masked_element<Type, MaskedOp::dropout>(in, extra, keep, by);
  }
}

template <class Type, Engine E>
__global__ void __launch_bounds__(kThreads) masked_strided_kernel(const Parameters<Type> p) {
  alignas(64) __shared__ u8 shared[kWarps * kWarpBytes];
  const u32 lane = threadIdx.x & 31, warp = threadIdx.x >> 5;
  const Shared tile = shared_address(shared) + warp * kWarpBytes;
  const Keystream<E> stream({record_of(p.record), (u32)kTagKeep, p.s}, p.rounds, tile + kTileBytes, lane);
  const u64 step = (u64)gridDim.x * kWarps * kTile;
  for (u64 begin = ((u64)blockIdx.x * kWarps + warp) * kTile; begin < p.n; begin += step) {
    const u64 leader = begin + 32 * lane;
    const u64 block = place_of(p.layout, leader < p.n ? leader : p.n - 1).e >> 5;
    if (p.wide)
      keep_tile<E, true>(stream, p.rule, block, lane, tile_row<true>(tile, lane));
    else
      keep_tile<E, false>(stream, p.rule, block, lane, tile_row<false>(tile, lane));
#pragma unroll 1
    for (u32 g = 0; g < 32; g++) {
      const u64 block_g = __shfl_sync(~0u, block, g), block_next = __shfl_sync(~0u, block, (g + 1) & 31);
      const u64 position = begin + 32 * g + lane;
      if (position >= p.n) continue;
      const Place at = place_of(p.layout, position);
      const bool here = at.e >> 5 == block_g, there = at.e >> 5 == block_next;
      bool keep;
      if (here || there) {
        const u32 row = here ? g : (g + 1) & 31, i = (u32)at.e & 31;
        keep = load_shared_half(piece_at(tile, row, i >> 3) + (i & 7) * 2) != 0;
      } else {
        keep = keep_alone(stream, p.rule, p.wide, at.e);
      }
      const typename Type::Stored extra = p.op == MaskedOp::dropout_add ? p.extra[at.extra] : 0;
      p.out[at.out] = masked_element_of<Type>(p.op, p.in[at.in], extra, keep, p.by);
    }
  }
}

template <class Type, Engine E>
void launch_one(const MaskedCall& c, const Layout& layout, cudaStream_t stream) {
  using Stored = typename Type::Stored;
  const u64 n = (u64)elements(layout), blocks = (n + kWarps * kTile - 1) / (kWarps * kTile);
  const u64 resident = resident_blocks<masked_strided_kernel<Type, E>>(kThreads);
  const Parameters<Type> p = {c.record,
                              keep_rule(c.threshold),
                              c.s,
                              rounds_of(c.generator),
                              c.threshold.wide,
                              c.op,
                              factors<Type>(c.scale, c.shift, c.dropped),
                              (const Stored*)c.in,
                              (const Stored*)c.extra,
                              (Stored*)c.out,
                              n,
                              layout};
  const unsigned grid = (unsigned)(blocks < resident ? blocks : resident);
  launch("masked_strided_kernel", masked_strided_kernel<Type, E>, grid, kThreads, stream, p);
}

}  // namespace

void launch_masked_strided(const MaskedCall& c, const Layout& layout, cudaStream_t stream) {
  if (elements(layout) == 0) return;
  const Layout merged = coalesced(layout);
  with_element(c.type, [&](auto type) {
    using Type = decltype(type);
    if (c.generator == kPhilox)
      launch_one<Type, Engine::philox>(c, merged, stream);
    else
      launch_one<Type, Engine::chacha>(c, merged, stream);
  });
}

}  // namespace everett
