// Attention's keep/drop: who owns which random bits of the weights (bh, q, k), and their threshold.
//
// Indices are global: bh = batch * heads + head, which is also the stream id s. A tile of 16 queries and 16 (Philox) or 64
// (ChaCha) keys takes 32 units of random words: unit i, a Philox call of 4 words or a ChaCha block of 16, decides what lane
// i of a warp holds of the tile's m16n8 MMA fragments, so that a fused kernel draws in registers. Word j of unit i decides
// keys 2*(i&3) and the next one (its low and its high half) of column group j mod W/2, of 8 keys each, in query i>>2, or
// that plus 8 for the words from W/2 on.
//
// The decision is keepdrop.h's 15-bit form, with one threshold for each query.
#pragma once

#include "law/keepdrop.h"
#include "law/stream.h"

namespace everett {

constexpr int kTileQueries = 16, kTileUnits = 32;

EV_FN constexpr int unit_words(Generator g) { return g == kPhilox ? 4 : 16; }
EV_FN constexpr int tile_keys(Generator g) { return 4 * unit_words(g); }

// The query, within its tile, that word j of unit i decides, and the first of the two keys.
EV_FN constexpr u32 unit_query(u32 i, u32 j, u32 words) { return (i >> 2) + (j >= words / 2 ? 8 : 0); }
EV_FN constexpr u32 unit_key(u32 i, u32 j, u32 words) { return 8 * (j % (words / 2)) + 2 * (i & 3); }

// The words of a unit. number = 32 * (the tile's number along the keys) + i; s of the stream is bh.
template <Generator G, class W>
EV_FN void attention_unit(const Stream& t, W number, u32 query_tile, W x[]) {
  if constexpr (G == kPhilox) {
    const u32* k = t.subkey.words;
    x[0] = number, x[1] = splat(query_tile, W{}), x[2] = splat(k[2] ^ t.tag, W{}), x[3] = splat(k[3] ^ t.s, W{});
    philox4x32_10(k[0], k[1], x);
  } else {
    constexpr int rounds = G == kChaCha8 ? 8 : G == kChaCha12 ? 12 : 20;
    chacha_block<rounds>(t.subkey.words, number, splat(query_tile, W{}), t.tag, t.s, x);
  }
}

// Keep iff the low 15 bits of the half-word are at least this.
EV_FN u32 attention_threshold(const Threshold& h, u32 d, u32 bh, u32 q) {
  return h.t + (d + q * 0x9E3779B9u + bh * 0x85EBCA6Bu < h.f);
}

}  // namespace everett
