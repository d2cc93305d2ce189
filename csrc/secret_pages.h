// Memory for keys and unread bits: private anonymous pages that are wiped in a forked child, left out of core dumps,
// locked in memory where the system allows it, and zeroed before they go back.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#include <atomic>
#include <new>
#include <stdexcept>

namespace everett {

// Overwrites n bytes in a way that the compiler may not remove as a dead store.
inline void wipe(void* p, size_t n) {
  __builtin_memset(p, 0, n);
  __asm__ __volatile__("" : : "r"(p) : "memory");
}

class SecretPages {
 public:
  // lock = false: not worth a share of RLIMIT_MEMLOCK (8 MiB by default), such as the bytes of a recording.
  explicit SecretPages(size_t bytes, bool lock = true) : bytes_((bytes + 4095) & ~size_t(4095)) {
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(p);
    // Fail closed: without this a forked child would hold, and could use, the bits of its parent.
    if (madvise(data_, bytes_, MADV_WIPEONFORK) != 0) {
      munmap(data_, bytes_);
      throw std::runtime_error("the kernel cannot wipe memory in a forked child (MADV_WIPEONFORK, Linux 4.14 or later)");
    }
    madvise(data_, bytes_, MADV_DONTDUMP);
    locked_ = lock && mlock(data_, bytes_) == 0;
  }
  ~SecretPages() {
    wipe(data_, bytes_);
    munmap(data_, bytes_);
  }
  SecretPages(const SecretPages&) = delete;
  SecretPages& operator=(const SecretPages&) = delete;

  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool locked() const { return locked_; }  // false where RLIMIT_MEMLOCK is too small: said in the status, no error

 private:
  uint8_t* data_;
  size_t bytes_;
  bool locked_;
};

// Tells a forked child from its parent, also after a raw clone(): one word that the kernel wipes in the child.
class ForkMark {
 public:
  ForkMark() : page_(sizeof(uint64_t)) { word()->store(kMagic, std::memory_order_relaxed); }
  bool forked() const { return word()->load(std::memory_order_relaxed) != kMagic; }

 private:
  static constexpr uint64_t kMagic = 0x657665726574746bull;
  std::atomic<uint64_t>* word() const { return reinterpret_cast<std::atomic<uint64_t>*>(page_.data()); }
  SecretPages page_;
};

}  // namespace everett
