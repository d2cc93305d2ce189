// Purpose tags of stream law 1. A tag fixes the meaning of a draw and its width: a 16-bit and a 32-bit draw under one tag
// would share keystream bits, so each row below is one width for good.
#pragma once

#include "law/word.h"

namespace everett {

enum Tag : u32 {
  kTagDerivation = 0,   // the dither word of a subkey record
  kTagKeep = 1,         // keep/drop, 16-bit draws (32-bit draws where p is nearer to 0 or 1 than 16 bits can serve)
  kTagUniform = 2,      // uniforms: 32-bit draws, fp64: 64-bit draws
  kTagNormal = 3,       // normals: pairs of 32-bit draws, fp64: pairs of 64-bit draws
  kTagExponential = 4,  // exponential and Gumbel: 64-bit draws
  kTagAttention = 5,    // attention keep/drop, its own tile-shaped order
  kTagBernoulli = 6,    // Bernoulli with a tensor of p: 64-bit draws
  kTagRounding = 7,     // stochastic rounding: 16-bit draws
  kTagInteger = 8,      // integers: 64-bit draws (uint32 words: 32-bit draws)
  kTagGamma = 9,        // gamma variates: 64-bit draws, eight an element and round
};

}  // namespace everett
