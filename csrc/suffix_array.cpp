// Suffix sorting by induction; see suffix_array.h.
//
// A suffix is S-type when it is smaller than the one after it, else L-type; an S-type suffix behind an L-type one is a
// "leftmost S" (LMS). Once the LMS suffixes are in order, one sweep to the right orders the L-types and one to the left
// the S-types. The order of the LMS suffixes comes from the same two sweeps, on their substrings, and from recursion
// where two of these are equal.
#include "suffix_array.h"

#include <algorithm>

namespace everett {
namespace {

// The text of one level of the recursion: symbols 0 .. k-1, with an end smaller than all of them at position n.
template <class Symbol>
struct Level {
  const Symbol* s;
  int32_t n, k;
  std::vector<bool> s_type;            // of positions 0 .. n
  std::vector<int32_t> first, last;    // of each symbol's bucket, end excluded

  Level(const Symbol* text, int32_t length, int32_t symbols) : s(text), n(length), k(symbols), s_type(length + 1) {
    s_type[n] = true;
    for (int32_t i = n - 2; i >= 0; i--) s_type[i] = s[i] < s[i + 1] || (s[i] == s[i + 1] && s_type[i + 1]);
    std::vector<int32_t> count(k);
    for (int32_t i = 0; i < n; i++) count[s[i]]++;
    first.resize(k), last.resize(k);
    for (int32_t c = 0, at = 0; c < k; c++) first[c] = at, last[c] = at += count[c];
  }

  bool is_lms(int32_t i) const { return i > 0 && s_type[i] && !s_type[i - 1]; }

  // Orders everything from the LMS suffixes at the ends of their buckets; -1 marks an empty place. The end's own suffix
  // is not stored: it only induces position n-1, which is L-type.
  void induce(std::vector<int32_t>& sa) const {
    std::vector<int32_t> at = first;
    if (n > 0) sa[at[s[n - 1]]++] = n - 1;
    for (int32_t i = 0; i < n; i++) {
      const int32_t j = sa[i] - 1;
      if (sa[i] > 0 && !s_type[j]) sa[at[s[j]]++] = j;
    }
    at = last;
    for (int32_t i = n - 1; i >= 0; i--) {
      const int32_t j = sa[i] - 1;
      if (sa[i] > 0 && s_type[j]) sa[--at[s[j]]] = j;
    }
  }

  // Puts LMS suffixes, given in ascending order, at the ends of their buckets.
  void place(std::vector<int32_t>& sa, const std::vector<int32_t>& lms) const {
    std::fill(sa.begin(), sa.end(), -1);
    std::vector<int32_t> at = last;
    for (size_t i = lms.size(); i-- > 0;) sa[--at[s[lms[i]]]] = lms[i];
  }

  // Whether the LMS substrings (up to and with the next LMS position) at a and b are equal.
  bool equal(int32_t a, int32_t b) const {
    for (int32_t i = 0;; i++) {
      if (a + i == n || b + i == n) return false;  // only one of them can end here
      if (s[a + i] != s[b + i] || s_type[a + i] != s_type[b + i]) return false;
      if (i > 0 && (is_lms(a + i) || is_lms(b + i))) return is_lms(a + i) && is_lms(b + i);
    }
  }
};

template <class Symbol>
std::vector<int32_t> sort_suffixes(const Symbol* s, int32_t n, int32_t k) {
  const Level<Symbol> level(s, n, k);
  std::vector<int32_t> sa(n), lms;
  for (int32_t i = 1; i < n; i++)
    if (level.is_lms(i)) lms.push_back(i);
  level.place(sa, lms);
  level.induce(sa);  // LMS substrings are in order now

  const int32_t m = (int32_t)lms.size();
  std::vector<int32_t> sorted;
  sorted.reserve(m);
  for (int32_t i = 0; i < n; i++)
    if (level.is_lms(sa[i])) sorted.push_back(sa[i]);
  // Name the substrings by rank; sa is free to hold the names at half their positions (LMS are never neighbours).
  std::fill(sa.begin(), sa.end(), -1);
  int32_t names = 0;
  for (int32_t i = 0; i < m; i++) {
    if (i > 0 && !level.equal(sorted[i - 1], sorted[i])) names++;
    sa[sorted[i] / 2] = names;
  }
  if (m > 0 && names + 1 < m) {
    std::vector<int32_t> shorter;
    shorter.reserve(m);
    for (int32_t i : lms) shorter.push_back(sa[i / 2]);
    const std::vector<int32_t> order = sort_suffixes(shorter.data(), m, names + 1);
    for (int32_t i = 0; i < m; i++) sorted[i] = lms[order[i]];
  }
  level.place(sa, sorted);
  level.induce(sa);
  return sa;
}

}  // namespace

std::vector<int32_t> suffix_array(const uint8_t* text, int32_t n) { return sort_suffixes(text, n, 256); }

std::vector<int32_t> common_prefixes(const uint8_t* text, int32_t n, const std::vector<int32_t>& sa) {
  std::vector<int32_t> rank(n), lcp(n);
  for (int32_t i = 0; i < n; i++) rank[sa[i]] = i;
  for (int32_t i = 0, h = 0; i < n; i++, h = std::max(h - 1, 0)) {
    if (rank[i] == 0) {
      h = 0;
      continue;
    }
    const int32_t j = sa[rank[i] - 1];
    while (i + h < n && j + h < n && text[i + h] == text[j + h]) h++;
    lcp[rank[i]] = h;
  }
  return lcp;
}

}  // namespace everett
