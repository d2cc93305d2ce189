// Reading ahead: a thread without Python reads a descriptor whose read(2) may block for seconds, and asks the device
// between reads whether it is well.
//
// What was read can be taken only once the device has answered every check well *after* it was read; an answer that
// deviates, or an error, destroys what is there. The first read is thrown away: it holds what the device had buffered
// from before, and some drivers discard their own start-up bytes in the pieces that the first read asks for.
//
// Why a thread of its own: the kernel drivers served here know no time-out, ignore O_NONBLOCK and cannot be polled. Why
// without Python: a thread that needs the GIL after each read gets it after 5 ms when another one spins, and the device
// overflows meanwhile. The copy out of the slots is one memcpy at 5-10 GB/s beside health tests at 1 GB/s.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <memory>
#include <vector>

#include "secret_pages.h"

namespace everett {

// An ioctl that answers a 32-bit word, of which the bits in `care` must be as in `expected`.
struct DeviceCheck {
  unsigned long request;
  uint32_t care, expected;
};

struct ReadPlan {
  size_t slot_bytes;        // what one read asks for, always
  size_t slots;             // how many reads may be waiting to be taken
  size_t first_read_bytes;  // what the first read asks for; at most slots * slot_bytes
  std::vector<DeviceCheck> checks;
  size_t check_bytes;  // checks are due after so many bytes ...
  double check_s;      // ... or after that time, and whenever all slots are full
  bool lock;           // keep the slots out of swap (see SecretPages)
};

enum class Halt { running, error, end_of_file, deviation, closed };

// Why the thread stopped: an errno in `code`, or the check that deviated and what the device answered.
struct Halted {
  Halt why = Halt::running;
  int code = 0;
  size_t check = 0;
  uint32_t answer = 0;
};

class ReadAhead {
 public:
  // Begins to read. `fd` stays the caller's: a duplicate of it is read, and closed once the last read has returned.
  ReadAhead(int fd, const ReadPlan& plan);
  ~ReadAhead();
  ReadAhead(const ReadAhead&) = delete;
  ReadAhead& operator=(const ReadAhead&) = delete;

  // Up to n bytes that have been checked, in order; their slots are zeroed. Waits up to timeout_s for the first of them;
  // 0 when none came, or when the thread has halted. One thread at a time.
  size_t take(uint8_t* out, size_t n, double timeout_s);
  Halted halted() const;

  // Asks the thread to stop, and waits up to wait_s. False when it is still inside a read: it is left behind, and closes
  // its descriptor when that read returns (a kernel driver without a time-out may never; the process can still exit).
  bool close(double wait_s);

 private:
  struct Shared;
  static void run(std::shared_ptr<Shared> shared);

  ForkMark mark_;
  std::unique_ptr<std::shared_ptr<Shared>> shared_;  // left behind in a forked child, where the thread does not exist
};

}  // namespace everett
