// The ring: conditioned bytes from one producer to the consumers of this process. A byte is handed out at most once, and
// its place is overwritten with zeros before the producer may use it again.
//
// Single producer, lock-free on its side. Consumers (main thread, autograd threads) take turns under a mutex of about
// 20 ns: a lock-free consumer side that also zeroes is not worth its bugs. Order of a take: copy out, zero, publish.
//
// In a forked child the ring answers `forked` and touches no lock: its parent may have held one at the fork.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

#include "secret_pages.h"

namespace everett {

// What a take answers. Every answer but `ok` leaves the caller's buffer untouched and takes nothing.
// From `ended` to `closed` in order of rank: a later end replaces an earlier one only if it ranks higher.
enum class Take {
  ok,
  empty,   // not enough bytes now (try_take) or in time (take)
  ended,   // the source is exhausted, and fewer bytes are left than were asked for
  failed,  // the source broke, and fewer bytes are left than were asked for
  alarm,   // a permanent health alarm stands
  closed,  // the source was closed
  forked,  // this process is a forked child of the one that opened the source
};

class Ring {
 public:
  // capacity: bytes, a power of two; throws std::invalid_argument otherwise.
  explicit Ring(size_t capacity);
  ~Ring();
  Ring(const Ring&) = delete;
  Ring& operator=(const Ring&) = delete;

  // Consumers. All n bytes or nothing; n may not exceed the capacity (std::invalid_argument).
  Take try_take(uint8_t* out, size_t n);
  // Waits up to timeout_s seconds (negative: as long as it takes). Call without Python's GIL.
  Take take(uint8_t* out, size_t n, double timeout_s);
  // Takes n bytes piece by piece and destroys them; returns how many there were before a take failed or timed out.
  size_t discard(size_t n, double timeout_s);

  // Producer. Waits for room; false when the ring was ended or closed before all bytes were in (the rest is dropped).
  bool put(const uint8_t* data, size_t n);
  // Zeroes and drops all unread bytes (an alarm); returns how many there were.
  size_t destroy_unread();
  // How often that happened, also with nothing unread. Who keeps bytes that were taken ahead, such as words on a GPU, must
  // destroy them when this has changed since the take.
  uint64_t destructions() const { return destructions_.load(); }
  // From now on takes answer `why` (for `ended` and `failed`: once the unread bytes do not suffice). Wakes everybody.
  void end(Take why);
  // An operator starts over after any end but `closed`: unread bytes are destroyed, counts go on. False when closed.
  bool reopen();

  bool forked() const { return mark_.forked(); }
  size_t capacity() const { return capacity_; }
  bool locked() const { return pages_.locked(); }
  // Counts of one instant; all zero in a forked child.
  struct Counts {
    uint64_t in, out, destroyed, unread;  // in = out + destroyed + unread
  };
  Counts counts() const;
  // Unread bytes are zero where nothing is unread: for tests.
  bool all_zero() const;

 private:
  // Locks that a forked child must neither take nor destroy (destroying a condition variable waits for its waiters, and
  // the parent's waiters do not exist in the child), so the child leaves them behind.
  struct Locks {
    std::mutex consumer, sleep;
    std::condition_variable readable, writable;
  };
  Take attempt(uint8_t* out, size_t n);
  void clear(uint64_t from, size_t n);
  void wake_readers();
  void wake_writer();
  bool writer_may_go(uint64_t head) const;

  size_t capacity_;
  SecretPages pages_;
  ForkMark mark_;
  // Positions count bytes since the start and never wrap (2^64 bytes); head_ belongs to the producer, tail_ to the
  // consumer that holds `consumer`.
  alignas(64) std::atomic<uint64_t> head_{0};
  alignas(64) std::atomic<uint64_t> tail_{0};
  uint64_t destroyed_ = 0;  // under `consumer`
  std::atomic<uint64_t> destructions_{0};
  std::atomic<Take> end_{Take::ok};
  std::atomic<int> readers_waiting_{0}, writers_waiting_{0};
  std::atomic<size_t> least_wanted_{SIZE_MAX};  // bytes; at most what any waiting reader wants
  std::unique_ptr<Locks> locks_{std::make_unique<Locks>()};
};

}  // namespace everett
