// The ring's takes and puts; see ring.h for the rules.
#include "ring.h"

#include <string.h>

#include <algorithm>
#include <chrono>
#include <stdexcept>

namespace everett {

Ring::Ring(size_t capacity) : capacity_(capacity), pages_(capacity) {
  if (capacity == 0 || (capacity & (capacity - 1)) != 0)
    throw std::invalid_argument("ring capacity must be a power of two");
}

void Ring::clear(uint64_t from, size_t n) {
  size_t at = from & (capacity_ - 1), first = std::min(n, capacity_ - at);
  wipe(pages_.data() + at, first);
  wipe(pages_.data(), n - first);
}

// A sleeper counts itself before it looks a last time, a waker publishes before it reads the count (both sequentially
// consistent), so one of the two always sees the other.
void Ring::wake(std::condition_variable& who, std::atomic<int>& waiting) {
  if (waiting.load() == 0) return;
  { std::lock_guard<std::mutex> lock(sleep_); }
  who.notify_all();
}

Take Ring::attempt(uint8_t* out, size_t n) {
  if (mark_.forked()) return Take::forked;  // before any mutex: the parent may have held it at the fork
  std::lock_guard<std::mutex> lock(consumer_);
  Take end = end_.load();
  if (end == Take::alarm || end == Take::closed) return end;
  uint64_t tail = tail_.load();
  if (head_.load() - tail < n) return end == Take::ok ? Take::empty : end;
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
  if (got == Take::ok) wake(writable_, writers_waiting_);
  return got;
}

Take Ring::take(uint8_t* out, size_t n, double timeout_s) {
  Take got = try_take(out, n);
  if (got != Take::empty || timeout_s == 0) return got;
  auto deadline = std::chrono::steady_clock::now() +
                  std::chrono::duration_cast<std::chrono::steady_clock::duration>(
                      std::chrono::duration<double>(std::min(timeout_s < 0 ? 1e9 : timeout_s, 1e9)));
  std::unique_lock<std::mutex> lock(sleep_);
  readers_waiting_++;
  while ((got = attempt(out, n)) == Take::empty)
    if (readable_.wait_until(lock, deadline) == std::cv_status::timeout && (got = attempt(out, n)) == Take::empty) break;
  readers_waiting_--;
  lock.unlock();
  if (got == Take::ok) wake(writable_, writers_waiting_);
  return got;
}

bool Ring::put(const uint8_t* data, size_t n) {
  while (n > 0) {
    if (mark_.forked() || end_.load() != Take::ok) return false;
    uint64_t head = head_.load();
    size_t room = capacity_ - size_t(head - tail_.load());
    if (room == 0) {
      std::unique_lock<std::mutex> lock(sleep_);
      writers_waiting_++;
      writable_.wait(lock, [&] { return end_.load() != Take::ok || head - tail_.load() < capacity_; });
      writers_waiting_--;
      continue;
    }
    size_t now = std::min(n, room), at = head & (capacity_ - 1), first = std::min(now, capacity_ - at);
    memcpy(pages_.data() + at, data, first);
    memcpy(pages_.data(), data + first, now - first);
    head_.store(head + now);
    wake(readable_, readers_waiting_);
    data += now;
    n -= now;
  }
  return true;
}

size_t Ring::destroy_unread() {
  if (mark_.forked()) return 0;
  size_t n;
  {
    std::lock_guard<std::mutex> lock(consumer_);
    uint64_t tail = tail_.load(), head = head_.load();
    n = size_t(head - tail);
    clear(tail, n);
    destroyed_ += n;
    tail_.store(head);
  }
  wake(writable_, writers_waiting_);
  return n;
}

void Ring::end(Take why) {
  if (mark_.forked()) return;
  end_.store(why);
  { std::lock_guard<std::mutex> lock(sleep_); }
  readable_.notify_all();
  writable_.notify_all();
}

}  // namespace everett
