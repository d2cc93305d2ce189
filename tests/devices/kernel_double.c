// A double of the kernel for tests: preloaded into a process, it puts character devices behind /dev/qrandomN, /dev/hwrng
// and /dev/chaoskeyN, and a folder of the test behind /sys and /proc/qrandom.
//
// How the devices behave is written from ID Quantique's drivers (module cards to 2010, their successor, chip cards
// 20.2.4) and Linux's hw_random core, not from the code under test. Their state lies in a file that the test maps too
// (kernel_double.py), so a test turns a module off, breaks a read or takes a card away while it is being read, and any
// number of processes may have a card open. The node itself is a file in the test's folder: locks and /proc/PID/fd are
// the real kernel's.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <sys/sysmacros.h>
#include <time.h>
#include <unistd.h>

enum { NODES = 16, NEVER_BYTES = -1 };
enum kind { NONE, MODULES_2010, MODULES_LATER, CHIPS, HWRNG, CHAOSKEY, FOREIGN };
enum fault { WELL, IO_ERROR, HANG, GONE, ZERO_READ };

// Mirrored in kernel_double.py.
struct node {
  uint64_t inode;
  uint32_t kind, major, minor;
  uint32_t driver_version, board_version, mask, status, mode, next_mode, ais31, busy;
  uint32_t fault, fault_times;  // what happens to the read that would pass fault_at, and how often
  uint64_t fault_at;
  uint64_t seed, offset;        // the next byte is number `offset` of the stream `seed`
  uint64_t stuck_at, biased_at; // from there on all bytes are 0x00, or each bit is 1 with probability 1/8
  uint64_t claims_more_at;      // from there on a read writes its first 4096 bytes only, and claims all
  uint64_t reads, zero_reads, first_read, smallest_read, largest_read, garbage;
  uint32_t armed, requests[16];
  double bytes_per_s, made_at;  // made_at: when the last byte that was read had been made
  char serial[256];
};

static struct node* nodes;
static char root[PATH_MAX];
static int (*real_ioctl)(int, unsigned long, ...);
static ssize_t (*real_read)(int, void*, size_t);
static int (*real_fstat)(int, struct stat*);

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

__attribute__((constructor)) static void begin(void) {
  const char* folder = getenv("KERNEL_DOUBLE");
  real_ioctl = (__typeof__(real_ioctl))dlsym(RTLD_NEXT, "ioctl");
  real_read = (__typeof__(real_read))dlsym(RTLD_NEXT, "read");
  real_fstat = (__typeof__(real_fstat))dlsym(RTLD_NEXT, "fstat");
  if (!folder) return;
  snprintf(root, sizeof root, "%s", folder);
  char state[PATH_MAX + 16];
  snprintf(state, sizeof state, "%s/state", root);
  int fd = REAL(open)(state, O_RDWR | O_CLOEXEC);
  if (fd < 0) fd = REAL(open)(state, O_RDONLY | O_CLOEXEC);
  struct stat about;
  if (fd < 0 || real_fstat(fd, &about) < 0 || (size_t)about.st_size < NODES * sizeof *nodes) abort();
  void* at = mmap(NULL, NODES * sizeof *nodes, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
  close(fd);
  if (at != MAP_FAILED) nodes = at;
}

// --- paths ---

static int begins(const char* path, const char* with) { return strncmp(path, with, strlen(with)) == 0; }

static const char* place(const char* path, char* room) {
  if (!nodes || !path) return path;
  const int ours = begins(path, "/dev/qrandom") || begins(path, "/dev/hwrng") || begins(path, "/dev/chaoskey") ||
                   begins(path, "/proc/qrandom") ||
                   (begins(path, "/sys/") && !begins(path, "/sys/devices/system") && !begins(path, "/sys/fs"));
  if (!ours) return path;
  snprintf(room, PATH_MAX, "%s%s", root, path);
  return room;
}

static struct node* node_of(const struct stat* about) {
  if (nodes && S_ISREG(about->st_mode))
    for (int i = 0; i < NODES; i++)
      if (nodes[i].kind != NONE && nodes[i].inode == about->st_ino) return &nodes[i];
  return NULL;
}

static struct node* node_behind(int fd) {
  struct stat about;
  return nodes && real_fstat(fd, &about) == 0 ? node_of(&about) : NULL;
}

static int as_device(int result, struct stat* about) {
  struct node* node = result == 0 ? node_of(about) : NULL;
  if (node) {
    about->st_mode = (about->st_mode & 07777) | S_IFCHR;
    about->st_rdev = makedev(node->major, node->minor);
  }
  return result;
}

#define OPENS(name)                                                       \
  int name(const char* path, int flags, ...) {                            \
    char room[PATH_MAX];                                                  \
    mode_t mode = 0;                                                      \
    if (flags & (O_CREAT | O_TMPFILE)) {                                  \
      va_list more;                                                       \
      va_start(more, flags);                                              \
      mode = va_arg(more, mode_t);                                        \
      va_end(more);                                                       \
    }                                                                     \
    return REAL(name)(place(path, room), flags, mode);                    \
  }
#define OPENS_AT(name)                                                    \
  int name(int at, const char* path, int flags, ...) {                    \
    char room[PATH_MAX];                                                  \
    mode_t mode = 0;                                                      \
    if (flags & (O_CREAT | O_TMPFILE)) {                                  \
      va_list more;                                                       \
      va_start(more, flags);                                              \
      mode = va_arg(more, mode_t);                                        \
      va_end(more);                                                       \
    }                                                                     \
    return REAL(name)(at, place(path, room), flags, mode);                \
  }
// struct stat64 is struct stat on 64-bit Linux.
#define STATS(name, type)                                                 \
  int name(const char* path, struct type* about) {                        \
    char room[PATH_MAX];                                                  \
    return as_device(REAL(name)(place(path, room), about), (struct stat*)about); \
  }
OPENS(open)
OPENS(open64)
OPENS_AT(openat)
OPENS_AT(openat64)
STATS(stat, stat)
STATS(lstat, stat)
STATS(stat64, stat64)
STATS(lstat64, stat64)
int fstat(int fd, struct stat* about) { return as_device(REAL(fstat)(fd, about), about); }
int fstat64(int fd, struct stat64* about) { return as_device(REAL(fstat64)(fd, about), (struct stat*)about); }
int fstatat(int at, const char* path, struct stat* about, int flags) {
  char room[PATH_MAX];
  return as_device(REAL(fstatat)(at, place(path, room), about, flags), about);
}
int fstatat64(int at, const char* path, struct stat64* about, int flags) {
  char room[PATH_MAX];
  return as_device(REAL(fstatat64)(at, place(path, room), about, flags), (struct stat*)about);
}
int access(const char* path, int mode) {
  char room[PATH_MAX];
  return REAL(access)(place(path, room), mode);
}
int faccessat(int at, const char* path, int mode, int flags) {
  char room[PATH_MAX];
  return REAL(faccessat)(at, place(path, room), mode, flags);
}
ssize_t readlink(const char* path, char* out, size_t n) {
  char room[PATH_MAX];
  return REAL(readlink)(place(path, room), out, n);
}
DIR* opendir(const char* path) {
  char room[PATH_MAX];
  return REAL(opendir)(place(path, room));
}

// --- devices ---

static void pause_s(double s) {
  struct timespec t = {(time_t)s, (long)((s - (double)(time_t)s) * 1e9)};
  nanosleep(&t, NULL);
}

static uint64_t word(uint64_t seed, uint64_t i) {  // SplitMix64 as a function of (seed, i)
  uint64_t z = seed + (i + 1) * 0x9E3779B97F4A7C15u;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  return z ^ (z >> 31);
}

static uint8_t byte_at(const struct node* node, uint64_t at) {
  if (at >= node->stuck_at) return 0;
  uint8_t byte = (uint8_t)(word(node->seed, at / 8) >> at % 8 * 8);
  if (at >= node->biased_at)
    for (uint64_t k = 1; k < 3; k++) byte &= (uint8_t)(word(node->seed + k, at / 8) >> at % 8 * 8);
  return byte;
}

static void produce(struct node* node, uint8_t* out, size_t n) {
  uint64_t at = node->offset;
  size_t i = 0;
  while (i < n) {
    if (at % 8 == 0 && n - i >= 8 && at + 8 <= node->stuck_at && at + 8 <= node->biased_at) {
      const uint64_t w = word(node->seed, at / 8);
      memcpy(out + i, &w, 8);
      at += 8;
      i += 8;
    } else {
      out[i++] = byte_at(node, at++);
    }
  }
}

// Whether the device is still there; a card that hangs holds its mutex, and with it everybody who asks it something.
static int take_mutex(struct node* node) {
  while (__atomic_exchange_n(&node->busy, 1, __ATOMIC_ACQUIRE)) pause_s(0.0002);
  if (node->fault != GONE || node->offset < node->fault_at) return 1;
  __atomic_store_n(&node->busy, 0, __ATOMIC_RELEASE);
  return 0;
}

static void give_mutex(struct node* node) { __atomic_store_n(&node->busy, 0, __ATOMIC_RELEASE); }

static double now_s(void) {
  struct timespec t;
  clock_gettime(CLOCK_MONOTONIC, &t);
  return (double)t.tv_sec + (double)t.tv_nsec * 1e-9;
}

// What a device keeps while nobody reads: the module cards' FIFO, the chip cards' DMA ring, a cache line.
static double kept_bytes(const struct node* node) {
  return node->kind == CHIPS ? 1 << 20 : node->kind == HWRNG || node->kind == CHAOSKEY ? 64 : 4096;
}

// Waits until the device has made n bytes more, at its rate.
static void wait_for(struct node* node, size_t n) {
  const double rate = node->bytes_per_s;
  if (rate <= 0) return;
  const double earliest = now_s() - kept_bytes(node) / rate;
  if (node->made_at < earliest) node->made_at = earliest;
  node->made_at += (double)n / rate;
  for (double left; (left = node->made_at - now_s()) > 0 && node->bytes_per_s > 0;) {
    if (node->fault == GONE && node->offset >= node->fault_at) return;
    pause_s(left < 0.002 ? left : 0.002);
  }
}

// Fills out[0, n) at the device's rate, or answers the errno of what happens meanwhile. Nobody gets the bytes of a read
// that fails.
static int fill(struct node* node, uint8_t* out, size_t n) {
  wait_for(node, n);
  if (node->fault != WELL && node->offset + n > node->fault_at) {
    while (node->fault == HANG) pause_s(0.001);
    if (node->fault == GONE) {
      node->offset = node->offset > node->fault_at ? node->offset : node->fault_at;
      return ENODEV;
    }
    if (node->fault != WELL) {
      const int zero = node->fault == ZERO_READ;
      node->offset += zero ? 0 : n;
      if (node->fault_times > 0 && --node->fault_times == 0) node->fault = WELL;
      return zero ? NEVER_BYTES : EIO;
    }
  }
  size_t wrote = node->offset >= node->claims_more_at && n > 4096 ? 4096 : n;
  if (out) produce(node, out, wrote);
  node->offset += n;
  return 0;
}

static ssize_t device_read(struct node* node, uint8_t* out, size_t n) {
  if (!take_mutex(node)) return errno = ENODEV, -1;
  node->reads++;
  if (node->reads == 1) node->first_read = n;
  if (n == 0) node->zero_reads++;  // on a chip card that is armed this would spin in the kernel for ever
  if (node->reads == 1 || n < node->smallest_read) node->smallest_read = n;
  if (n > node->largest_read) node->largest_read = n;
  int error = 0;
  if (node->kind == CHIPS) {
    if (node->armed && n > 0) {  // throws its own start-up bytes away, in pieces of what the caller asked for
      for (uint64_t left = node->mode ? 16809984 : 65536; left > 0 && !error;) {
        const uint64_t piece = left < n ? left : n;
        error = fill(node, NULL, piece);
        node->garbage += error ? 0 : piece;
        left -= piece;
      }
      node->armed = error != 0;
    }
  } else if (node->kind == MODULES_2010 || node->kind == MODULES_LATER) {
    if (n > 65536) n = 65536;
    if ((node->status & 0xF) == 0) error = EIO;
  }
  if (!error && n > 0) error = fill(node, out, n);
  give_mutex(node);
  if (error == NEVER_BYTES) return 0;
  return error ? (errno = error, -1) : (ssize_t)n;
}

ssize_t read(int fd, void* out, size_t n) {
  struct node* node = node_behind(fd);
  return node ? device_read(node, out, n) : real_read(fd, out, n);
}

static int answer(struct node* node, unsigned long request, void* argument) {
  const unsigned number = request & 0xFF;
  const int chips = node->kind == CHIPS, later = node->kind == MODULES_LATER;
  const int unknown = chips ? EINVAL : ENOTTY;
  if (node->kind == HWRNG || node->kind == CHAOSKEY || node->kind == FOREIGN) return ENOTTY;
  if ((request >> 8 & 0xFF) != 'q' || number > 15) return unknown;
  node->requests[number]++;
  uint32_t value;
  switch (number) {
    case 0: value = node->driver_version; break;
    case 1: value = 1; break;
    case 2: value = node->mask; break;
    case 3: value = node->board_version; break;
    case 4:
      node->mode = node->next_mode;
      node->armed = 1;
      return request == 0x00007104 ? 0 : unknown;
    case 8:
      if (chips) pause_s(0.001);  // the driver spins for 1 ms
      value = node->status;
      break;
    case 10:
      if (!later) return unknown;
      value = node->ais31;
      break;
    case 11:
      if (!later || request != 0x4004710B) return unknown;
      if (node->ais31 == 1) node->ais31 = 0;  // 2: a card that keeps its flag
      return 0;
    case 12:
      if (!later && !chips) return unknown;
      if (request != 0x8100710C) return unknown;
      memset(argument, 0xAB, 256);  // what lay on the stack
      memcpy(argument, node->serial, strnlen(node->serial, 255) + 1);
      return 0;
    case 13:
      if (!chips || request != 0x4004710D) return unknown;
      memcpy(&node->next_mode, argument, 4);
      return 0;
    case 14:
      if (!chips) return unknown;
      value = node->next_mode;
      break;
    case 15:
      if (!chips) return unknown;
      value = node->mode;
      break;
    default: return unknown;
  }
  if (request != (0x80047100u | number)) return unknown;
  memcpy(argument, &value, 4);
  return 0;
}

int ioctl(int fd, unsigned long request, ...) {
  va_list more;
  va_start(more, request);
  void* argument = va_arg(more, void*);
  va_end(more);
  struct node* node = node_behind(fd);
  if (!node) return real_ioctl(fd, request, argument);
  if (!take_mutex(node)) return errno = ENODEV, -1;
  const int error = answer(node, request, argument);
  give_mutex(node);
  return error ? (errno = error, -1) : 0;
}
