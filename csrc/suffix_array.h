// The suffix array of a byte string by induced sorting, and the longest common prefixes of its neighbours.
//
// Sources: Nong, Zhang and Chan, "Linear Suffix Array Construction by Almost Pure Induced-Sorting" (2009); Kasai et al.,
// "Linear-Time Longest-Common-Prefix Computation in Suffix Arrays and Its Applications" (2001).
#pragma once

#include <cstdint>
#include <vector>

namespace everett {

// Start positions of the suffixes of text[0, n) in lexicographic order; a suffix precedes those that it is a prefix of.
// Takes about 5n 32-bit words of memory; n < 2^31 - 2.
std::vector<int32_t> suffix_array(const uint8_t* text, int32_t n);

// lcp[i] = symbols that suffixes sa[i-1] and sa[i] have in common; lcp[0] = 0.
std::vector<int32_t> common_prefixes(const uint8_t* text, int32_t n, const std::vector<int32_t>& sa);

}  // namespace everett
