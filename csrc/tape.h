// The tape: which key a draw used, so that a recomputation inside a backward finds the key of its forward.
//
// A draw is named by (family, device, generator, nonce): equal names mean equal torch RNG states. The law of `find`:
// 1. Outside a backward: within a step the same name always finds the same key, and nothing is ever overwritten. (Fresh
//    keys under no_grad gave silently wrong gradients: a reentrant checkpoint runs its forward with gradients off.)
// 2. Entries leave by count only, oldest first, never by age: a generator's graph may live over any number of steps of
//    the discriminator, and an optimizer inside the backward makes dozens of steps of one.
// 3. Inside a backward an unknown name is an error when gradients are on, because then it is a recomputation; with
//    gradients off (hooks, Function.backward) it is a new draw. With keep_graph it cannot be told: new, but counted.
// 4. An entry of an older step stays beside the new one. The backward takes the one in whose window of autograd
//    sequence numbers the node being evaluated lies. These numbers are per thread, and so are the windows.
//
// Beyond 4: a reentrant checkpoint inside another runs a backward inside the backward, over nodes that the outer
// recomputation has only just made, possibly steps after the draw; their numbers say nothing. There the entry that this
// thread's backward touched last is taken: the outer recomputation has drawn the same name right before. (Double
// backward needs nothing of the kind: a non-reentrant checkpoint is always asked through the nodes of its first
// forward.) Not seen: a Function whose backward runs the backward of an older graph, with one RNG state in several
// steps.
//
// Not thread-safe: the keyring's mutex guards it. Keys lie in secret pages, taken in chunks as the tape fills.
#pragma once

#include <deque>
#include <memory>
#include <unordered_map>
#include <vector>

#include "law/word.h"
#include "secret_pages.h"

namespace everett {

// What a draw decides, and so whose key it may take where several processes work on one model.
enum class Family : u32 {
  rank,   // masks, attention, added noise and rounding: each rank its own, but one group of tensor-parallel ranks the same
  world,  // numbers that may reach weights, permutations or control flow: all ranks whose torch states are equal the same
};
constexpr int kFamilies = 2;

struct DrawName {
  i32 device;     // -1 the CPU, else the CUDA index; equal states on two devices are two draws
  u32 generator;  // 0 the device's default generator
  u64 nonce[2];
  Family family = Family::rank;
};

// Where a draw happens, as torch told it on the calling thread.
struct Place {
  static constexpr u64 kNoNode = ~u64(0);
  bool in_backward = false;   // a graph task is running; what follows is read only then
  bool grad_enabled = false;
  bool keep_graph = false;
  bool nested = false;  // the backward was started by a node of another backward, on this thread
  u64 node = kNoNode;   // sequence number of the node being evaluated; AccumulateGrad has 2^64-1: no information either
};

enum class Found { nothing, reused, replayed, unverified, miss, ambiguous };

class Tape {
 public:
  explicit Tape(size_t capacity);

  // Copies the key for `reused` and `replayed`. `nothing` and `unverified` ask for a new key, to be recorded.
  Found find(const DrawName& name, const Place& place, u8 key[32]);
  void record(const DrawName& name, const Place& place, const u8 key[32]);
  // Ends the step; sequence: the number that the next node made on this thread will get.
  void boundary(u64 sequence);

  size_t entries() const { return size_t(recorded_ - evicted_); }
  u64 evicted() const { return evicted_; }
  size_t capacity() const { return capacity_; }

 private:
  struct Entry {
    u8 key[32];
    DrawName name;
    u64 step;
    u32 thread, epoch;  // of the draw
    u64 touched_at;     // tick of clock_ when a backward last drew or replayed it; 0 never
    u32 touched_thread;
    u32 older, newer;  // neighbours in the chain of the same bucket
  };
  // The windows of a thread: its epoch e begins at starts[e - dropped - 1]; epoch 0 is before its first boundary.
  struct Windows {
    struct Start {
      u64 sequence, step;
    };
    std::deque<Start> starts;
    u32 dropped = 0;
    u64 recorded = 0;  // draws recorded by this thread since its last boundary
  };

  Entry& at(u32 slot) const { return reinterpret_cast<Entry*>(chunks_[slot / kChunk]->data())[slot % kChunk]; }
  size_t bucket(const DrawName& name) const;
  u32 next_of(const DrawName& name, u32 slot) const;
  u32 epoch_of(u32 thread, u64 node) const;
  Found find_in_backward(const DrawName& name, const Place& place, u8 key[32]);
  static Found unknown(const Place& place);
  void touch(Entry& e);
  Found replay(Entry& e, u8 key[32]);
  void evict_oldest();

  static constexpr u32 kNone = ~u32(0), kChunk = 4096;
  size_t capacity_;
  int bucket_bits_ = 1;
  std::vector<u32> heads_;  // per bucket, its newest entry
  std::vector<std::unique_ptr<SecretPages>> chunks_;
  std::unordered_map<u32, Windows> threads_;
  u64 recorded_ = 0, evicted_ = 0;  // slot of the i-th entry ever recorded: i mod capacity
  u64 step_ = 0, recorded_before_step_ = 0;
  u64 clock_ = 0;  // counts the draws made inside backwards
};

}  // namespace everett
