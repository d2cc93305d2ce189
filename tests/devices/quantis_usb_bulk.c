// The data endpoint of the emulated Quantis with libusb's calling convention, for readers that call libusb_bulk_transfer
// from a thread without the GIL. The fields of the device are set from Python (quantis_usb_native.py).
#include <stdint.h>
#include <time.h>

#include "seeded_bytes.h"

enum { kPacket = 512, kFifo = 4 * kPacket };
enum { kIo = -1, kNoDevice = -4, kTimeout = -7, kOverflow = -8, kPipe = -9 };  // libusb.h
enum fault { kNone, kShort, kStall, kOverflowFault, kIoFault, kSilence, kUnplug, kLate };

struct device {
  uint64_t seed, served, fault_at;
  double rate, made_at;
  int32_t fault, gone, silent, halted, running, calls;
};

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return t.tv_sec + t.tv_nsec * 1e-9;
}

static void sleep_s(double s) {
  struct timespec t = {(time_t)s, (long)((s - (time_t)s) * 1e9)};
  if (s > 0) nanosleep(&t, NULL);
}

static int transfer(volatile struct device* d, unsigned char* data, int length, int* got, unsigned timeout_ms) {
  const double deadline = now_s() + timeout_ms * 1e-3;
  int want = length;
  *got = 0;
  if (d->fault != kNone && d->served >= d->fault_at) {
    const int fault = d->fault;
    d->fault = kNone;
    if (fault == kShort) want -= 256;
    if (fault == kStall) d->halted = 1;
    if (fault == kSilence) d->silent = 1;
    if (fault == kUnplug) d->gone = 1;
    if (fault == kIoFault) return kIo;
    if (fault == kOverflowFault) return kOverflow;
    if (fault == kLate) {  // cancelled by its time limit when half of it was there
      seeded_bytes(d->seed, d->served, data, (size_t)length / 2);
      *got = length / 2;
      d->served += (uint64_t)length / 2;
      return kTimeout;
    }
  }
  if (d->halted) return kPipe;
  if (length % kPacket) return kOverflow;
  while (d->silent && !d->gone) {
    if (now_s() > deadline) return kTimeout;
    sleep_s(0.002);
  }
  if (d->rate > 0 && !d->gone) {
    const double oldest = now_s() - kFifo / d->rate;  // what found the buffer full was not made
    if (d->made_at < oldest) d->made_at = oldest;
    const double ready = d->made_at + want / d->rate;
    if (ready > deadline) {
      sleep_s(deadline - now_s());
      return kTimeout;
    }
    sleep_s(ready - now_s());
    d->made_at = ready;
  }
  if (d->gone) return kNoDevice;
  seeded_bytes(d->seed, d->served, data, (size_t)want);
  d->served += (uint64_t)want;
  *got = want;
  return 0;
}

int bulk_transfer(void* handle, unsigned char endpoint, unsigned char* data, int length, int* got, unsigned timeout_ms) {
  volatile struct device* d = handle;
  if (endpoint != 0x86) return kIo;
  d->running++;  // one transfer at a time: a second thread would show here
  d->calls++;
  const int answer = transfer(d, data, length, got, timeout_ms);
  d->running--;
  return answer;
}
