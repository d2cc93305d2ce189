// Where the elements of a strided or sharded tensor lie, and which logical index e each of them has.
#pragma once

#include "law/word.h"

namespace everett {

constexpr int kMaxDims = 16;

// Strides are in elements. `e` strides and `e0` place the tensor in the logical, unsharded one: element (i0, i1, ...)
// has logical index e0 + i0*e[0] + i1*e[1] + ... A stride of 0 repeats one decision along a dimension (Dropout2d).
struct Layout {
  int dims = 1;
  i64 size[kMaxDims] = {0};
  i64 in[kMaxDims] = {1}, extra[kMaxDims] = {1}, out[kMaxDims] = {1}, e[kMaxDims] = {1};
  u64 e0 = 0;
};

inline i64 elements(const Layout& l) {
  i64 n = 1;
  for (int d = 0; d < l.dims; d++) n *= l.size[d];
  return n;
}

// Merges neighbouring dimensions that one stride describes, and drops those of size 1.
inline Layout coalesced(const Layout& l) {
  Layout r;
  r.e0 = l.e0;
  r.dims = 0;
  for (int d = 0; d < l.dims; d++) {
    if (l.size[d] == 1) continue;
    int last = r.dims - 1;
    if (last >= 0 && r.in[last] == l.in[d] * l.size[d] && r.extra[last] == l.extra[d] * l.size[d] &&
        r.out[last] == l.out[d] * l.size[d] && r.e[last] == l.e[d] * l.size[d]) {
      r.size[last] *= l.size[d];
    } else {
      last = r.dims++;
      r.size[last] = l.size[d];
    }
    r.in[last] = l.in[d], r.extra[last] = l.extra[d], r.out[last] = l.out[d], r.e[last] = l.e[d];
  }
  if (r.dims == 0) r.dims = 1, r.size[0] = 1;
  return r;
}

// A stretch of `n` elements along the innermost dimension: offsets of its first element, in elements.
struct Run {
  i64 in, extra, out, n;
  u64 e;
};

// Calls body(Run) for elements [begin, end) of the layout in row-major order.
template <class Body>
EV_FN void for_runs(const Layout& l, i64 begin, i64 end, Body body) {
  const int last = l.dims - 1;
  i64 at[kMaxDims], rest = begin;
  for (int d = last; d >= 0; d--) at[d] = rest % l.size[d], rest /= l.size[d];
  while (begin < end) {
    Run r = {0, 0, 0, l.size[last] - at[last], l.e0};
    if (r.n > end - begin) r.n = end - begin;
    for (int d = 0; d <= last; d++) {
      r.in += at[d] * l.in[d], r.extra += at[d] * l.extra[d], r.out += at[d] * l.out[d];
      r.e += (u64)(at[d] * l.e[d]);
    }
    body(r);
    begin += r.n;
    at[last] = 0;
    for (int d = last - 1; d >= 0 && ++at[d] == l.size[d]; d--) at[d] = 0;
  }
}

}  // namespace everett
