// Memory for keys and unread bits: private anonymous pages that are wiped in a forked child, left out of core dumps,
// locked in memory where the system allows it, and zeroed before they go back.
#pragma once

#include <stddef.h>
#include <stdint.h>
#include <sys/mman.h>

#include <atomic>
#include <new>

namespace everett {

// Overwrites n bytes in a way that the compiler may not remove as a dead store.
inline void wipe(void* p, size_t n) {
  __builtin_memset(p, 0, n);
  __asm__ __volatile__("" : : "r"(p) : "memory");
}

class SecretPages {
 public:
  explicit SecretPages(size_t bytes) : bytes_((bytes + 4095) & ~size_t(4095)) {
    void* p = mmap(nullptr, bytes_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    data_ = static_cast<uint8_t*>(p);
    // A kernel before 4.14 does not know WIPEONFORK; then the child must not have the pages at all.
    if (madvise(data_, bytes_, MADV_WIPEONFORK) != 0 && madvise(data_, bytes_, MADV_DONTFORK) != 0) {
      munmap(data_, bytes_);
      throw std::bad_alloc();
    }
    madvise(data_, bytes_, MADV_DONTDUMP);
    locked_ = mlock(data_, bytes_) == 0;
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
