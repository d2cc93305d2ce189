// The ring's takes and puts; see ring.h for the rules.
#include "ring.h"

#include <string.h>

#include <unistd.h>

#include <algorithm>
#include <stdexcept>

#include "deadline.h"

namespace everett {

namespace {

size_t power_of_two(size_t n) {
  if (n == 0 || (n & (n - 1)) != 0) throw std::invalid_argument("ring capacity must be a power of two");
  return n;
}

}  // namespace

Ring::Ring(size_t capacity) : capacity_(power_of_two(capacity)), pages_(capacity) {}

Ring::~Ring() {
  if (mark_.forked()) (void)locks_.release();
}

void Ring::clear(uint64_t from, size_t n) {
  size_t at = from & (capacity_ - 1), first = std::min(n, capacity_ - at);
  wipe(pages_.data() + at, first);
  wipe(pages_.data(), n - first);
}

// A sleeper counts itself before it looks a last time, a waker publishes before it reads the count (both sequentially
// consistent), so one of the two always sees the other.
// A reader is woken only when its bytes may be there: woken at each put, one that draws as fast as bits come cost a fifth
// of a core in context switches.
void Ring::wake_readers() {
  if (size_t at = armed_.load(); head_.load() - tail_.load() >= at && armed_.compare_exchange_strong(at, SIZE_MAX))
    signal_now();
  if (readers_waiting_.load() == 0 || head_.load() - tail_.load() < least_wanted_.load()) return;
  { std::lock_guard<std::mutex> lock(locks_->sleep); }
  locks_->readable.notify_all();
}

void Ring::signal_now() {
  const uint64_t one = 1;
  if (const int fd = signal_fd_.load(); fd >= 0 && write(fd, &one, sizeof one) < 0) {  // full: it has been woken before
  }
}

void Ring::arm(size_t n) {
  armed_.store(n);
  wake_readers();  // they may be there already
}

// A writer that found the ring full sleeps until a quarter of it is free: woken at each take of 32 bytes, every draw
// from a full ring would cost its consumer a system call. A reader that waits lets the writer go at once, because it may
// want more bytes than are in.
bool Ring::writer_may_go(uint64_t head) const {
  size_t room = capacity_ - size_t(head - tail_.load());
  return end_.load() != Take::ok || room >= std::max<size_t>(capacity_ / 4, 1) ||
         (room > 0 && readers_waiting_.load() > 0);
}

void Ring::wake_writer() {
  if (writers_waiting_.load() == 0 || !writer_may_go(head_.load())) return;
  { std::lock_guard<std::mutex> lock(locks_->sleep); }
  locks_->writable.notify_all();
}

Take Ring::attempt(uint8_t* out, size_t n) {
  if (mark_.forked()) return Take::forked;  // before any mutex
  std::lock_guard<std::mutex> lock(locks_->consumer);
  Take end = end_.load();
  if (end == Take::alarm || end == Take::closed) return end;
  uint64_t tail = tail_.load();
  if (head_.load() - tail < n) {
    // The producer ends the ring after its last put, so an end that is seen only now may have come with more bytes.
    end = end_.load();
    if (end == Take::ok) return Take::empty;
    if (end == Take::alarm || end == Take::closed || head_.load() - tail < n) return end;
  }
  size_t at = tail & (capacity_ - 1), first = std::min(n, capacity_ - at);
  memcpy(out, pages_.data() + at, first);
  memcpy(out + first, pages_.data(), n - first);
  clear(tail, n);
  tail_.store(tail + n);
  return Take::ok;
}

Take Ring::try_take(uint8_t* out, size_t n) {
  if (n > capacity_) throw std::invalid_argument("more bytes asked for than the ring holds");
  Take got = attempt(out, n);
  if (got == Take::ok) wake_writer();
  return got;
}

Take Ring::take(uint8_t* out, size_t n, double timeout_s) {
  Take got = try_take(out, n);
  if (got != Take::empty || timeout_s == 0) return got;
  const auto deadline = deadline_in(timeout_s);
  std::unique_lock<std::mutex> lock(locks_->sleep);
  least_wanted_.store(std::min(least_wanted_.load(), n));  // before the count: see wake_readers
  readers_waiting_++;
  locks_->writable.notify_all();
  for (bool late = false; (got = attempt(out, n)) == Take::empty && !late;)
    late = locks_->readable.wait_until(lock, deadline) == std::cv_status::timeout;  // then looks once more
  if (--readers_waiting_ == 0) least_wanted_.store(SIZE_MAX);
  lock.unlock();
  if (got == Take::ok) wake_writer();
  return got;
}

bool Ring::put(const uint8_t* data, size_t n) {
  while (n > 0) {
    if (mark_.forked() || end_.load() != Take::ok) return false;
    const uint64_t head = head_.load();
    const size_t room = capacity_ - size_t(head - tail_.load());
    if (room == 0) {
      std::unique_lock<std::mutex> lock(locks_->sleep);
      writers_waiting_++;
      locks_->writable.wait(lock, [&] { return writer_may_go(head); });
      writers_waiting_--;
      continue;
    }
    const size_t now = std::min(n, room), at = head & (capacity_ - 1), first = std::min(now, capacity_ - at);
    memcpy(pages_.data() + at, data, first);
    memcpy(pages_.data(), data + first, now - first);
    head_.store(head + now);
    wake_readers();
    data += now;
    n -= now;
  }
  return true;
}

size_t Ring::destroy_unread() {
  if (mark_.forked()) return 0;
  size_t n;
  {
    std::lock_guard<std::mutex> lock(locks_->consumer);
    destructions_++;  // first, and under the lock: bytes of a take that saw the old count are older than the alarm
    const uint64_t tail = tail_.load(), head = head_.load();
    n = size_t(head - tail);
    clear(tail, n);
    destroyed_ += n;
    tail_.store(head);
  }
  wake_writer();
  signal_now();
  return n;
}

void Ring::end(Take why) {
  if (mark_.forked()) return;
  Take now = end_.load();
  while (now < why && !end_.compare_exchange_weak(now, why)) {
  }
  { std::lock_guard<std::mutex> lock(locks_->sleep); }
  locks_->readable.notify_all();
  locks_->writable.notify_all();
  signal_now();
}

bool Ring::reopen() {
  if (mark_.forked()) return false;
  destroy_unread();
  Take now = end_.load();
  while (now != Take::closed)
    if (end_.compare_exchange_weak(now, Take::ok)) {
      signal_now();
      return true;
    }
  return false;
}

Ring::Counts Ring::counts() const {
  if (mark_.forked()) return {0, 0, 0, 0};
  std::lock_guard<std::mutex> lock(locks_->consumer);
  const uint64_t tail = tail_.load(), head = head_.load();
  return {head, tail - destroyed_, destroyed_, head - tail};
}

bool Ring::all_zero() const {
  for (size_t i = 0; i < capacity_; i++)
    if (pages_.data()[i] != 0) return false;
  return true;
}

}  // namespace everett
