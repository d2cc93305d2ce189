// The pool of one GPU: direct words, copied ahead into device memory for ops outside of captured graphs.
//
// Words come in slabs. The host fills a slab's staging, a side stream copies it and an op's stream waits for the copy's
// event; staging is wiped once that event has passed. An op takes the next words of the oldest slab, each word at most
// once. A slab that is used up is zeroed on the side stream behind the events of all ops that read it, and only then, in
// the order of that stream, filled again. So no event is waited for by the host as long as a slab is ready.
#pragma once

#include <algorithm>
#include <deque>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/device_memory.h"
#include "cuda/staging.h"
#include "law/word.h"

namespace everett {

class Pool {
 public:
  // slabs of `slab_words` 64-bit words each. Throws std::runtime_error where there is no memory, or none can be pinned.
  Pool(int device, u64 slab_words, int slabs);
  ~Pool();

  // Where to write the next slab's words (slab_words at most), or null while all slabs are in use. `submit` or `abandon`
  // must follow.
  u8* open();
  void submit(u64 words);
  void abandon() { slabs_[(size_t)opened_]->staging.drop(); }

  // Calls op(words, n) once, for n words in a row that nothing else gets: at most `at_most`, in whole granules, from one
  // slab. The op launches its kernels on `stream` and nowhere else. Returns n; 0, without a call, when no slab is ready.
  template <class Op>
  u64 use(u64 at_most, u64 granule, cudaStream_t stream, Op op);

  u64 ready() const;    // words that can be used
  u64 skipped() const { return skipped_; }  // words at the end of slabs that made no whole granule, zeroed unused
  void reap();          // wipes staging whose copies are over
  void destroy();       // all words, at once for the host and behind their readers on the GPU
  u64 slab_words() const { return slab_words_; }
  bool forked() const { return memory_.forked(); }
  bool all_zero();      // host and device; waits for the GPU

 private:
  struct Slab {
    Slab(int device, size_t bytes) : staging(device, bytes) {}
    u64* words = nullptr;
    Staging staging;
    u64 filled = 0, taken = 0;  // words
    // The streams that read it, each with an event behind its last op.
    std::vector<std::pair<cudaStream_t, std::unique_ptr<Event>>> readers;
  };
  Event& reader(Slab& slab, cudaStream_t stream);
  void retire(int slab);

  DeviceMemory memory_;
  u64 slab_words_, skipped_ = 0;
  cudaStream_t side_ = nullptr;
  std::vector<std::unique_ptr<Slab>> slabs_;
  std::deque<int> empty_, ready_;  // oldest first
  int opened_ = -1;
};

template <class Op>
u64 Pool::use(u64 at_most, u64 granule, cudaStream_t stream, Op op) {
  if (at_most < granule) throw std::invalid_argument("fewer words than a granule");
  DeviceGuard guard(memory_.device());
  while (!ready_.empty()) {
    Slab& slab = *slabs_[(size_t)ready_.front()];
    const u64 left = slab.filled - slab.taken, n = std::min(at_most, left) / granule * granule;
    if (n == 0) {
      skipped_ += left;
      retire(ready_.front());
      continue;
    }
    slab.staging.copied().wait_in(stream);
    Event& read = reader(slab, stream);
    const u64* words = slab.words + slab.taken;
    slab.taken += n;  // before the launch: should it fail, the words are lost, not repeated
    op(words, n);
    read.record(stream);
    if (slab.taken == slab.filled) retire(ready_.front());
    return n;
  }
  return 0;
}

}  // namespace everett
