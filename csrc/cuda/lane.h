// A lane: direct words for captured graphs of one GPU. They lie in a ring in device memory; a captured op reserves the
// next n of them on the GPU at every replay, and the host tops the ring up between replays. No kernel waits, polls or
// writes to the host.
//
// Positions count words since the start and never wrap; position i lies at i mod capacity. On the GPU:
//   reserved  positions below are taken   finished  how many of these were read   limit  positions from here on are empty
// An op is three kernels: reserve (gives it [start, start+n), or nothing and sets `failed`), the op itself, finish. What is
// reserved stays untouched until it is finished, in whatever order streams run.
#pragma once

#include "cuda/device_memory.h"
#include "cuda/direct.h"
#include "cuda/staging.h"

namespace everett {

struct LaneState {
  u64 reserved, finished, limit;
  u64 failed;  // ops that found too few words, and gave NaN
};

class Lane {
 public:
  // capacity: words, a power of two.
  Lane(int device, u64 capacity);

  // Captured: an op takes n words, between these two; *start lies in device memory of the op's own. The same kernels serve
  // outside a capture.
  WordSource reserve(u64 n, u64* start, cudaStream_t stream);
  void finish(u64 n, const u64* start, cudaStream_t stream);

  // The host, between replays, on the stream that replays (which it waits for).
  LaneState read(cudaStream_t stream);
  // Words that can be put in after `read`: none while an op of another stream is under way.
  u64 room() const { return seen_.reserved == seen_.finished ? capacity_ - (seen_.limit - seen_.reserved) : 0; }
  // Where there is room: zeroes what ops have read, in the order of `stream`, and says where to write up to `room` words.
  // `submit` or `abandon` must follow.
  u8* open(cudaStream_t stream);
  void submit(u64 words, cudaStream_t stream);
  void abandon() { staging_.drop(); }
  // The ops that failed have been told of.
  void forgive(cudaStream_t stream);
  // Ops find no words from here on, in the order of `stream`, and those left are zeroed (as in `open`, not while an op of
  // another stream is under way). Waits for the stream.
  void destroy(cudaStream_t stream);
  u64 capacity() const { return capacity_; }
  bool forked() const { return memory_.forked(); }

 private:
  u64* words() const { return reinterpret_cast<u64*>(memory_.data() + kStateBytes); }
  LaneState* state() const { return reinterpret_cast<LaneState*>(memory_.data()); }
  void zero(u64 from, u64 n, cudaStream_t stream);
  template <class Piece>
  void for_pieces(u64 from, u64 n, Piece piece) const;

  static constexpr size_t kStateBytes = 256;  // words begin on a line of their own
  u64 capacity_;
  DeviceMemory memory_;
  Staging staging_;
  LaneState seen_ = {};
  u64 zeroed_ = 0;  // positions below were zeroed
};

}  // namespace everett
