// Reads a bulk endpoint ahead of Python: one thread, one transfer after the other, into a queue that Python empties.
//
// A Python thread waits up to 5 ms for the GIL whenever another one spins, several times a read. A device that makes a
// packet of 512 bytes each millisecond and holds four of them loses data in that time; this thread needs no GIL.
// libusb is not linked: the address of its libusb_bulk_transfer comes from the library that pyusb has open.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <condition_variable>
#include <memory>
#include <mutex>
#include <thread>

#include "secret_pages.h"

namespace everett {

// libusb.h: int libusb_bulk_transfer(handle, endpoint, data, length, transferred, timeout in ms); < 0 is an error.
using BulkTransfer = int (*)(void*, unsigned char, unsigned char*, int, int*, unsigned int);

class UsbReader {
 public:
  // Why a take gave nothing, beside libusb's own negative codes.
  static constexpr int kShort = 1;    // a transfer brought fewer bytes than it asked for
  static constexpr int kStopped = 2;  // stop() was called, or this is a forked child
  struct Taken {
    size_t bytes;
    int status;  // 0: bytes are good, and may be none when the time was over
  };

  // Starts reading at once. The first discard_bytes are thrown away. At most ahead_bytes (in whole transfers, at least
  // two) wait in the queue; while it is full nothing is read. A transfer may wait timeout_ms for its data.
  UsbReader(BulkTransfer transfer, void* handle, uint8_t endpoint, size_t transfer_bytes, unsigned timeout_ms,
            size_t discard_bytes, size_t ahead_bytes);
  ~UsbReader();
  UsbReader(const UsbReader&) = delete;
  UsbReader& operator=(const UsbReader&) = delete;

  // Waits until `enough` bytes are there, or timeout_s is over, then moves up to n of them to `out`. After a failed
  // transfer what waits in the queue is destroyed and every take gives its status: make a new reader.
  Taken take(uint8_t* out, size_t n, size_t enough, double timeout_s);
  // Ends the thread; returns when it has left libusb, so that the device may be closed. Any thread may call it.
  void stop();

 private:
  void run();

  const BulkTransfer transfer_;
  void* const handle_;
  const uint8_t endpoint_;
  const size_t transfer_bytes_, capacity_;
  const unsigned timeout_ms_;
  SecretPages queue_;
  ForkMark mark_;
  // Left behind in a forked child, where the thread does not exist and a lock may be held for ever.
  struct Machinery {
    std::mutex lock;
    std::condition_variable changed;
    std::thread thread;
    std::mutex joining;  // stop() may be called by several threads
  };
  std::unique_ptr<Machinery> machinery_{std::make_unique<Machinery>()};
  // Under machinery_->lock. Counts of bytes since the start; a byte lies at its count modulo capacity_.
  uint64_t in_ = 0, out_ = 0;
  size_t discard_;
  int status_ = 0;
};

}  // namespace everett
