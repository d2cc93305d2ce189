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

#include "ring_reader.h"
#include "secret_pages.h"

namespace everett {

class Ring final : public RingReader {
 public:
  // capacity: bytes, a power of two; throws std::invalid_argument otherwise.
  explicit Ring(size_t capacity);
  ~Ring() override;

  // Consumers.
  Take try_take(uint8_t* out, size_t n) override;
  Take take(uint8_t* out, size_t n, double timeout_s) override;

  // Producer. Waits for room; false when the ring was ended or closed before all bytes were in (the rest is dropped).
  bool put(const uint8_t* data, size_t n);
  size_t destroy_unread() override;
  uint64_t destructions() const override { return destructions_.load(); }
  void end(Take why) override;
  // How it was ended; `ok` while it was not.
  Take ended() const { return end_.load(); }
  // An operator starts over after any end but `closed`: unread bytes are destroyed, counts go on. False when closed.
  bool reopen();

  bool forked() const override { return mark_.forked(); }
  size_t capacity() const override { return capacity_; }
  bool locked() const override { return pages_.locked(); }
  Counts counts() const override;

  // For a consumer that waits for several rings at once. `fd`, an eventfd that outlives the ring or the next call of this
  // (-1: none), is written when the ring ends, begins anew or is emptied by an alarm, and once after each arm(n), as soon
  // as n bytes or more are unread.
  void signal(int fd) { signal_fd_.store(fd); }
  void arm(size_t n);
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
  void signal_now();
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
  std::atomic<int> signal_fd_{-1};
  std::atomic<size_t> armed_{SIZE_MAX};  // bytes at which signal_fd_ is written
  std::unique_ptr<Locks> locks_{std::make_unique<Locks>()};
};

}  // namespace everett
