// The read-ahead's thread and its slots; see read_ahead.h.
#include "read_ahead.h"

#include <errno.h>
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <signal.h>
#include <sys/eventfd.h>
#include <sys/ioctl.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <mutex>
#include <system_error>
#include <thread>

namespace everett {

namespace {

using Clock = std::chrono::steady_clock;

double seconds_since(Clock::time_point then) { return std::chrono::duration<double>(Clock::now() - then).count(); }

int checked(int result, const char* what) {
  if (result < 0) throw std::system_error(errno, std::generic_category(), what);
  return result;
}

}  // namespace

// Slot k of read number i is i % slots. Counts only grow: taken <= proven <= filled <= taken + slots. A slot belongs to the
// thread until it is proven, then to the taker until it is taken; so bytes are copied without holding the lock.
struct ReadAhead::Shared {
  Shared(int device, const ReadPlan& p)
      : plan(p), pages(p.slots * p.slot_bytes, p.lock), lengths(p.slots), fd(-1), wake(-1) {
    fd = checked(fcntl(device, F_DUPFD_CLOEXEC, 3), "duplicating the descriptor");
    wake = eventfd(0, EFD_CLOEXEC | EFD_NONBLOCK);
    if (wake < 0) {
      const int error = errno;
      ::close(fd);
      throw std::system_error(error, std::generic_category(), "eventfd");
    }
  }
  ~Shared() { close_both(); }
  void close_both() {
    if (fd >= 0) ::close(fd);
    if (wake >= 0) ::close(wake);
    fd = wake = -1;
  }
  uint8_t* slot(uint64_t number) { return pages.data() + number % plan.slots * plan.slot_bytes; }

  const ReadPlan plan;
  SecretPages pages;
  std::vector<size_t> lengths;
  int fd, wake;
  std::thread thread;

  mutable std::mutex lock;
  std::condition_variable changed;
  // Under the lock.
  uint64_t filled = 0, proven = 0, taken = 0;
  bool quit = false, ended = false;
  Halted halted;
  // The taker's own.
  size_t offset = 0;  // taken from slot number `taken` so far
};

ReadAhead::ReadAhead(int fd, const ReadPlan& plan) {
  auto shared = std::make_shared<Shared>(fd, plan);
  // Python's signal handlers belong to its main thread: this one takes no signals.
  sigset_t all, before;
  sigfillset(&all);
  pthread_sigmask(SIG_SETMASK, &all, &before);
  try {
    shared->thread = std::thread(&ReadAhead::run, shared);
  } catch (...) {
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    throw;
  }
  pthread_sigmask(SIG_SETMASK, &before, nullptr);
  pthread_setname_np(shared->thread.native_handle(), "everett read");
  shared_ = std::make_unique<std::shared_ptr<Shared>>(std::move(shared));
}

ReadAhead::~ReadAhead() {
  if (mark_.forked())
    (void)shared_.release();
  else
    close(0);
}

void ReadAhead::run(std::shared_ptr<Shared> shared) {
  Shared& s = *shared;
  const ReadPlan& plan = s.plan;
  Halted halted;
  bool first = true;
  uint64_t filled = 0;
  size_t unproven_bytes = 0;
  Clock::time_point last_check = Clock::now();

  const auto stop = [&](Halt why, int code) {
    halted.why = why;
    halted.code = code;
  };
  while (halted.why == Halt::running) {
    {
      std::unique_lock<std::mutex> lock(s.lock);
      s.changed.wait(lock, [&] { return s.quit || filled - s.taken < plan.slots; });
      if (s.quit) break;
    }
    // Devices that cannot be polled count as readable; for a pipe this is where a close finds the thread.
    pollfd ready[2] = {{s.fd, POLLIN, 0}, {s.wake, POLLIN, 0}};
    if (poll(ready, 2, -1) < 0 && errno != EINTR) {
      stop(Halt::error, errno);
      break;
    }
    if (ready[1].revents != 0) break;
    const size_t want = first ? plan.first_read_bytes : plan.slot_bytes;
    const ssize_t got = read(s.fd, s.slot(filled), want);
    if (got < 0) {
      if (errno != EINTR) stop(Halt::error, errno);
      continue;
    }
    if (got == 0) {
      stop(Halt::end_of_file, 0);
      continue;
    }
    if (first) {
      first = false;
      wipe(s.slot(0), size_t(got));
      continue;
    }
    s.lengths[filled % plan.slots] = size_t(got);
    filled++;
    unproven_bytes += size_t(got);

    bool full;
    {
      std::lock_guard<std::mutex> lock(s.lock);
      s.filled = filled;
      full = filled - s.taken == plan.slots;
    }
    if (!plan.checks.empty() && !full && unproven_bytes < plan.check_bytes && seconds_since(last_check) < plan.check_s)
      continue;
    for (size_t i = 0; i < plan.checks.size() && halted.why == Halt::running; i++) {
      const DeviceCheck& check = plan.checks[i];
      uint32_t answer = 0;
      if (ioctl(s.fd, check.request, &answer) < 0) {
        stop(Halt::error, errno);
      } else if ((answer & check.care) != check.expected) {
        stop(Halt::deviation, 0);
        halted.check = i;
        halted.answer = answer;
      }
    }
    if (halted.why != Halt::running) break;
    last_check = Clock::now();
    unproven_bytes = 0;
    std::lock_guard<std::mutex> lock(s.lock);
    s.proven = filled;
    s.changed.notify_all();
  }

  std::lock_guard<std::mutex> lock(s.lock);
  if (halted.why == Halt::running) halted.why = Halt::closed;
  s.close_both();
  s.halted = halted;
  s.ended = true;
  s.changed.notify_all();
}

size_t ReadAhead::take(uint8_t* out, size_t n, double timeout_s) {
  if (mark_.forked()) return 0;
  const std::shared_ptr<Shared> keep = *shared_;
  Shared& s = *keep;
  uint64_t proven, taken;
  {
    std::unique_lock<std::mutex> lock(s.lock);
    s.changed.wait_for(lock, std::chrono::duration<double>(timeout_s),
                       [&] { return s.quit || s.ended || s.proven != s.taken; });
    if (s.quit || s.ended) return 0;
    proven = s.proven;
    taken = s.taken;
  }
  size_t done = 0;
  for (; taken != proven && done < n;) {
    const size_t length = s.lengths[taken % s.plan.slots];
    const size_t piece = std::min(length - s.offset, n - done);
    uint8_t* from = s.slot(taken) + s.offset;
    std::memcpy(out + done, from, piece);
    wipe(from, piece);  // so that a driver that claims more than it wrote is seen as zeros, which alarm
    done += piece;
    s.offset += piece;
    if (s.offset == length) {
      s.offset = 0;
      taken++;
    }
  }
  std::lock_guard<std::mutex> lock(s.lock);
  s.taken = taken;
  s.changed.notify_all();
  return done;
}

Halted ReadAhead::halted() const {
  Halted closed;
  closed.why = Halt::closed;
  if (mark_.forked()) return closed;
  Shared& s = **shared_;
  std::lock_guard<std::mutex> lock(s.lock);
  return s.quit && !s.ended ? closed : s.halted;
}

bool ReadAhead::close(double wait_s) {
  if (mark_.forked()) return true;
  Shared& s = **shared_;
  bool ended;
  {
    std::unique_lock<std::mutex> lock(s.lock);
    s.quit = true;
    s.changed.notify_all();
    const uint64_t one = 1;
    if (!s.ended && write(s.wake, &one, sizeof one) < 0) {  // full: it has been woken before
    }
    s.changed.wait_for(lock, std::chrono::duration<double>(wait_s), [&] { return s.ended; });
    ended = s.ended;
  }
  if (s.thread.joinable()) {
    if (ended)
      s.thread.join();
    else
      s.thread.detach();
  }
  return ended;
}

}  // namespace everett
