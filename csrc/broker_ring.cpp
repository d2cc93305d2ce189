// Both ends of the ring that a broker shares with a client; see broker_ring.h for the rules.
#include "broker_ring.h"

#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <linux/futex.h>
#include <string.h>
#include <sys/eventfd.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <stdexcept>
#include <string>

#include "deadline.h"

namespace everett {

namespace {

constexpr double kSlice_s = 0.1;  // a reader looks at least so often whether it waits on memory that was replaced

void futex_wait(std::atomic<uint32_t>& word, uint32_t seen, double timeout_s) {
  const timespec t{time_t(timeout_s), long((timeout_s - double(time_t(timeout_s))) * 1e9)};
  syscall(SYS_futex, &word, FUTEX_WAIT, seen, &t, nullptr, 0);
}

void futex_wake(std::atomic<uint32_t>& word) { syscall(SYS_futex, &word, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

void signal_eventfd(int fd) {
  const uint64_t one = 1;
  if (write(fd, &one, sizeof one) < 0) {  // full: it has been woken before
  }
}

[[noreturn]] void fail(const char* what) { throw std::runtime_error(std::string(what) + ": " + strerror(errno)); }

}  // namespace

// --- the mapping ---

SharedPages::SharedPages(int memfd, size_t capacity) : capacity_(capacity) {
  void* p = mmap(nullptr, kSharedHeaderBytes + capacity, PROT_READ | PROT_WRITE, MAP_SHARED, memfd, 0);
  if (p == MAP_FAILED) fail("the shared ring cannot be mapped");
  base_ = static_cast<uint8_t*>(p);
  // Fail closed: without it a forked child could draw what its parent draws.
  if (madvise(base_, kSharedHeaderBytes + capacity, MADV_DONTFORK) != 0) {
    munmap(base_, kSharedHeaderBytes + capacity);
    fail("the shared ring cannot be kept from forked children");
  }
  madvise(base_, kSharedHeaderBytes + capacity, MADV_DONTDUMP);
  locked_ = mlock(base_, kSharedHeaderBytes + capacity) == 0;
}

SharedPages::~SharedPages() {
  if (mark_.forked()) return;  // nothing is mapped there in a child
  wipe(data(), capacity_);
  munmap(base_, kSharedHeaderBytes + capacity_);
}

// --- the broker's end ---

ServedRing::ServedRing(size_t capacity) {
  if (capacity < 4096 || (capacity & (capacity - 1)) != 0)
    throw std::invalid_argument("a client's ring has a power of two of bytes, at least 4096");
  try {
    memfd_ = memfd_create("everett", MFD_CLOEXEC | MFD_ALLOW_SEALING);
    if (memfd_ < 0) fail("no memory for a client's ring");
    if (ftruncate(memfd_, off_t(kSharedHeaderBytes + capacity)) != 0) fail("no memory for a client's ring");
    if (fcntl(memfd_, F_ADD_SEALS, F_SEAL_SHRINK | F_SEAL_GROW | F_SEAL_SEAL) != 0) fail("a client's ring cannot be sealed");
    eventfd_ = ::eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (eventfd_ < 0) fail("no descriptor for a client's eventfd");
    pages_ = std::make_unique<SharedPages>(memfd_, capacity);
  } catch (...) {
    if (memfd_ >= 0) close(memfd_);
    if (eventfd_ >= 0) close(eventfd_);
    throw;
  }
  pages_->header().magic = kSharedMagic;
  pages_->header().capacity = capacity;
}

ServedRing::~ServedRing() {
  destroy();
  forget_memfd();
  close(eventfd_);
}

void ServedRing::forget_memfd() {
  if (memfd_ >= 0) close(memfd_);
  memfd_ = -1;
}

bool ServedRing::look() {
  const uint64_t tail = pages_->header().tail.load();
  if (tail < tail_ || tail > head_) return false;  // so head_ - tail <= capacity as well
  tail_ = tail;
  return true;
}

uint8_t* ServedRing::place(size_t n, size_t* fill) const {
  const size_t at = head_ & (capacity() - 1);
  *fill = std::min({n, room(), capacity() - at});
  return pages_->data() + at;
}

void ServedRing::wake_readers() {
  SharedHeader& h = pages_->header();
  if (h.readers.load() == 0) return;
  h.wake.fetch_add(1);
  futex_wake(h.wake);
}

void ServedRing::publish(size_t n) {
  head_ += n;
  pages_->header().head.store(head_);
  wake_readers();
}

void ServedRing::set_state(Supply state) {
  pages_->header().state.store(uint32_t(state));
  wake_readers();
}

void ServedRing::destroy() {
  SharedHeader& h = pages_->header();
  h.destructions.fetch_add(1);  // first: words that were taken ahead under the old count are older than the alarm
  h.floor.store(head_);
  std::atomic_thread_fence(std::memory_order_seq_cst);  // the floor has moved before the first zero can be seen
  wipe(pages_->data(), capacity());
  wake_readers();
}

// The client publishes its tail before it reads `ask`, the broker asks before it reads the tail, both sequentially
// consistent: one of the two sees the other.
bool ServedRing::ask() {
  SharedHeader& h = pages_->header();
  h.ask.store(1);
  if (!look() || room() < capacity() / 4) return true;
  h.ask.store(0);
  return false;
}

// --- the client's end ---

struct BrokerRing::Shared {
  SharedPages pages;
  int eventfd;
  uint64_t tail = 0;  // ours, under the consumer's mutex
  Shared(int memfd, int event, size_t capacity) : pages(memfd, capacity), eventfd(event) {}
  ~Shared() { close(eventfd); }
  SharedHeader& header() const { return pages.header(); }
};

BrokerRing::BrokerRing(size_t capacity) : capacity_(capacity) {
  if (capacity < 4096 || (capacity & (capacity - 1)) != 0)
    throw std::invalid_argument("a broker's ring has a power of two of bytes, at least 4096");
}

BrokerRing::~BrokerRing() {
  if (mark_.forked()) {
    (void)consumer_.release();
    return;
  }
  destroy_unread();
}

void BrokerRing::attach(int memfd, int eventfd) {
  std::shared_ptr<Shared> next;
  try {
    if (mark_.forked()) throw std::runtime_error("a forked child needs a ring of its own");
    constexpr int kSeals = F_SEAL_SHRINK | F_SEAL_GROW;
    struct stat about;
    if (fstat(memfd, &about) != 0 || about.st_size != off_t(kSharedHeaderBytes + capacity_) ||
        (fcntl(memfd, F_GET_SEALS) & kSeals) != kSeals)
      throw std::invalid_argument("what the broker sent is not sealed memory of the announced size");
    next = std::make_shared<Shared>(memfd, eventfd, capacity_);
    if (next->header().magic != kSharedMagic || next->header().capacity != capacity_)
      throw std::invalid_argument("what the broker sent is no ring");
  } catch (...) {
    close(memfd);
    if (next == nullptr) close(eventfd);
    throw;
  }
  close(memfd);
  std::lock_guard<std::mutex> lock(*consumer_);
  leave();
  shared_ = std::move(next);
}

// Under the mutex: the memory so far is given up, and what is unread in it destroyed.
void BrokerRing::leave() {
  if (shared_ == nullptr) return;
  SharedHeader& h = shared_->header();
  const uint64_t head = std::max(h.head.load(), shared_->tail);
  destroyed_ += head - shared_->tail;
  past_in_ += head;
  past_destructions_ += h.destructions.load();
  wipe(shared_->pages.data(), capacity_);
  futex_wake(h.wake);
  shared_ = nullptr;
}

std::shared_ptr<BrokerRing::Shared> BrokerRing::shared() const {
  std::lock_guard<std::mutex> lock(*consumer_);
  return shared_;
}

// Moves the tail to the floor, where an alarm destroyed what was unread; returns the floor.
uint64_t BrokerRing::settle(Shared& s) {
  const uint64_t floor = s.header().floor.load(std::memory_order_acquire);
  if (floor > s.tail) {
    destroyed_ += floor - s.tail;
    s.tail = floor;
    s.header().tail.store(floor);
    if (s.header().ask.exchange(0) == 1) signal_eventfd(s.eventfd);
  }
  return floor;
}

Take BrokerRing::attempt(uint8_t* out, size_t n) {
  if (mark_.forked()) return Take::forked;  // before any mutex
  std::lock_guard<std::mutex> lock(*consumer_);
  const Take end = end_.load();
  if (end == Take::alarm || end == Take::closed || shared_ == nullptr) return end == Take::ok ? Take::empty : end;
  Shared& s = *shared_;
  SharedHeader& h = s.header();
  for (;;) {
    const uint64_t floor = settle(s);
    const Supply supply = Supply(h.state.load());
    if (supply == Supply::alarm) return Take::alarm;
    const uint64_t unread = h.head.load() - s.tail;
    if (unread > capacity_) return Take::failed;  // the broker has lost its senses
    if (unread < n) {
      if (supply == Supply::ended) return Take::ended;
      return end == Take::ok ? Take::empty : end;
    }
    const size_t at = s.tail & (capacity_ - 1), first = std::min(n, capacity_ - at);
    memcpy(out, s.pages.data() + at, first);
    memcpy(out + first, s.pages.data(), n - first);
    std::atomic_thread_fence(std::memory_order_acquire);
    if (h.floor.load(std::memory_order_relaxed) != floor) {  // destroyed under our hands: perhaps half of it is zeros
      wipe(out, n);
      continue;
    }
    wipe(s.pages.data() + at, first);
    wipe(s.pages.data(), n - first);
    s.tail += n;
    h.tail.store(s.tail);
    if (h.ask.load() == 1 && unread - n <= capacity_ / 4 * 3 && h.ask.exchange(0) == 1) signal_eventfd(s.eventfd);
    return Take::ok;
  }
}

Take BrokerRing::try_take(uint8_t* out, size_t n) {
  if (n > capacity()) throw std::invalid_argument("more bytes asked for than the ring holds");
  return attempt(out, n);
}

Take BrokerRing::take(uint8_t* out, size_t n, double timeout_s) {
  Take got = try_take(out, n);
  if (got != Take::empty || timeout_s == 0) return got;
  const auto deadline = deadline_in(timeout_s);
  for (;;) {
    const double left = seconds_left(deadline);
    if (left == 0) return got;
    const std::shared_ptr<Shared> now = shared();
    if (now == nullptr) {  // between two brokers
      const timespec pause{0, long(std::min(left, 0.01) * 1e9)};
      nanosleep(&pause, nullptr);
      if ((got = attempt(out, n)) != Take::empty) return got;
      continue;
    }
    SharedHeader& h = now->header();
    h.readers.fetch_add(1);
    const uint32_t seen = h.wake.load();
    got = attempt(out, n);
    if (got == Take::empty) {
      if (h.ask.exchange(0) == 1) signal_eventfd(now->eventfd);  // it may want more than is in
      futex_wait(h.wake, seen, std::min(left, kSlice_s));
      got = attempt(out, n);
    }
    h.readers.fetch_sub(1);
    if (got != Take::empty) return got;
  }
}

size_t BrokerRing::destroy_unread() {
  if (mark_.forked()) return 0;
  std::lock_guard<std::mutex> lock(*consumer_);
  past_destructions_++;
  if (shared_ == nullptr) return 0;
  Shared& s = *shared_;
  settle(s);
  const uint64_t head = std::max(s.header().head.load(), s.tail), n = head - s.tail;
  const size_t at = s.tail & (capacity_ - 1), first = std::min<size_t>(n, capacity_ - at);
  if (n <= capacity_) {
    wipe(s.pages.data() + at, first);
    wipe(s.pages.data(), n - first);
  }
  destroyed_ += n;
  s.tail = head;
  s.header().tail.store(head);
  return n;
}

uint64_t BrokerRing::destructions() const {
  if (mark_.forked()) return 0;
  std::lock_guard<std::mutex> lock(*consumer_);
  return past_destructions_ + (shared_ == nullptr ? 0 : shared_->header().destructions.load());
}

void BrokerRing::end(Take why) {
  if (mark_.forked()) return;
  Take now = end_.load();
  while (now < why && !end_.compare_exchange_weak(now, why)) {
  }
  const std::shared_ptr<Shared> s = shared();
  if (s == nullptr) return;
  s->header().wake.fetch_add(1);
  futex_wake(s->header().wake);
}

bool BrokerRing::locked() const {
  if (mark_.forked()) return false;
  const std::shared_ptr<Shared> s = shared();
  return s != nullptr && s->pages.locked();
}

Supply BrokerRing::supply() const {
  if (mark_.forked()) return Supply::flowing;
  const std::shared_ptr<Shared> s = shared();
  return s == nullptr ? Supply::flowing : Supply(s->header().state.load());
}

RingReader::Counts BrokerRing::counts() const {
  if (mark_.forked()) return {0, 0, 0, 0};
  std::lock_guard<std::mutex> lock(*consumer_);
  if (shared_ == nullptr) return {past_in_, past_in_ - destroyed_, destroyed_, 0};
  SharedHeader& h = shared_->header();
  const uint64_t tail = std::max(shared_->tail, h.floor.load()), head = std::max(h.head.load(), tail);
  const uint64_t destroyed = destroyed_ + (tail - shared_->tail);
  return {past_in_ + head, past_in_ + tail - destroyed, destroyed, head - tail};
}

}  // namespace everett
