// The ring that a broker shares with one client: a sealed memfd of which each side distrusts what the other may write.
//
// The broker keeps its own head and only ever *writes* head, floor, state and data; the client's tail is the one word that
// it reads, once a turn, and a tail that cannot be true ends the client. The seals (shrink, grow, seal) keep a client from
// truncating the file under the broker, which would be a SIGBUS there.
//
// An alarm: `floor` says up to where bytes must not be used any more, then the data are zeroed. A client that was copying
// sees that the floor has moved, destroys its copy and begins again. Only the client moves the tail, up to the floor too:
// the broker must not write where the client may still be zeroing.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <atomic>
#include <memory>
#include <mutex>

#include "ring_reader.h"
#include "secret_pages.h"

namespace everett {

constexpr size_t kSharedBlock = 32;        // a block goes to one client, whole
constexpr size_t kSharedHeaderBytes = 4096;
constexpr uint64_t kSharedMagic = 0x31676e6972627665ull;  // "evbring1"

// What bits a client may expect, in the header and in messages.
enum class Supply : uint32_t { flowing = 0, ended = 1, alarm = 2 };

struct SharedHeader {
  uint64_t magic, capacity;  // broker, once
  // broker
  alignas(64) std::atomic<uint64_t> head;  // bytes written since the start
  std::atomic<uint64_t> floor;             // bytes before it were destroyed
  std::atomic<uint64_t> destructions;
  std::atomic<uint32_t> state;             // Supply
  std::atomic<uint32_t> wake;              // futex word, changed whenever waiting readers should look
  std::atomic<uint32_t> ask;               // 1: write the eventfd when a quarter is free, or when a reader waits
  // client
  alignas(64) std::atomic<uint64_t> tail;
  std::atomic<uint32_t> readers;           // how many wait on `wake`
};
static_assert(sizeof(SharedHeader) <= kSharedHeaderBytes, "the header is one page");
static_assert(std::atomic<uint64_t>::is_always_lock_free && std::atomic<uint32_t>::is_always_lock_free,
              "another process sees them");

// A mapping of the memfd: never in a forked child or a core dump, locked where allowed. Zeroed by whoever unmaps it.
class SharedPages {
 public:
  // Throws std::runtime_error when it cannot be mapped.
  SharedPages(int memfd, size_t capacity);
  ~SharedPages();
  SharedPages(const SharedPages&) = delete;
  SharedPages& operator=(const SharedPages&) = delete;
  SharedHeader& header() const { return *reinterpret_cast<SharedHeader*>(base_); }
  uint8_t* data() const { return base_ + kSharedHeaderBytes; }
  size_t capacity() const { return capacity_; }
  bool locked() const { return locked_; }

 private:
  uint8_t* base_;
  size_t capacity_;
  bool locked_;
  ForkMark mark_;
};

// The broker's end. One thread.
class ServedRing {
 public:
  // capacity: a power of two, at least 4096. Throws std::runtime_error when there is no memory or no descriptor.
  explicit ServedRing(size_t capacity);
  ~ServedRing();
  ServedRing(const ServedRing&) = delete;
  ServedRing& operator=(const ServedRing&) = delete;

  int memfd() const { return memfd_; }
  int eventfd() const { return eventfd_; }
  void forget_memfd();  // the client has it: one descriptor less

  // Reads the tail. False when the client broke the rules: it must be dropped.
  bool look();
  // As of the last look, in whole blocks. Bytes that were destroyed count as unread until the client has moved on.
  size_t room() const { return size_t(capacity() - (head_ - tail_)) / kSharedBlock * kSharedBlock; }
  size_t unread() const { return size_t(head_ - tail_); }
  size_t capacity() const { return pages_->capacity(); }
  uint64_t written() const { return head_; }
  // Up to n bytes of consecutive room, as of the last look, to be written to; `fill` gets how many.
  uint8_t* place(size_t n, size_t* fill) const;
  void publish(size_t n);
  void set_state(Supply state);
  // An alarm, or the end: nothing unread may be used any more.
  void destroy();
  // Asks the client to write the eventfd when a quarter is free; false when it is free already.
  bool ask();

 private:
  void wake_readers();
  int memfd_ = -1, eventfd_ = -1;
  std::unique_ptr<SharedPages> pages_;
  uint64_t head_ = 0, tail_ = 0;
};

// The client's end: what keys and direct words are drawn from. It outlives its broker: attach() gives it the next one's
// memory, counts go on, and takes answer `empty` in between.
class BrokerRing final : public RingReader {
 public:
  explicit BrokerRing(size_t capacity);
  ~BrokerRing() override;

  // Takes over both descriptors. Unread bytes of the broker before are destroyed. Throws std::runtime_error, or
  // std::invalid_argument for memory that is not sealed or not of the right size.
  void attach(int memfd, int eventfd);

  Take try_take(uint8_t* out, size_t n) override;
  Take take(uint8_t* out, size_t n, double timeout_s) override;
  size_t destroy_unread() override;
  uint64_t destructions() const override;
  void end(Take why) override;
  bool forked() const override { return mark_.forked(); }
  // One block less than the memory holds: with a tail inside a block, the broker cannot fill the last one.
  size_t capacity() const override { return capacity_ - kSharedBlock; }
  bool locked() const override;
  Counts counts() const override;
  // What the broker says of its sources; `flowing` between two brokers.
  Supply supply() const;

 private:
  struct Shared;
  Take attempt(uint8_t* out, size_t n);
  uint64_t settle(Shared& s);
  void leave();
  std::shared_ptr<Shared> shared() const;

  size_t capacity_;
  ForkMark mark_;
  // Left behind in a forked child, as in Ring.
  std::unique_ptr<std::mutex> consumer_{std::make_unique<std::mutex>()};
  std::shared_ptr<Shared> shared_;  // under consumer_
  std::atomic<Take> end_{Take::ok};
  // Of the brokers before this one; under consumer_.
  uint64_t past_in_ = 0, past_destructions_ = 0, destroyed_ = 0;
};

}  // namespace everett
