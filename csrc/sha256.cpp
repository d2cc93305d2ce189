// Finds libcrypto's EVP interface, checks it against a known answer, and keeps one context per thread; see sha256.h.
#include "sha256.h"

#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>

#include <atomic>
#include <stdexcept>

namespace everett {
namespace {

struct Libcrypto {
  const char* soname = nullptr;
  void* library = nullptr;
  void* (*context_new)() = nullptr;
  void (*context_free)(void*) = nullptr;
  const void* (*sha256_type)() = nullptr;
  int (*init)(void*, const void*, void*) = nullptr;
  int (*update)(void*, const void*, size_t) = nullptr;
  int (*final)(void*, u8*, unsigned*) = nullptr;

  bool open(const char* name, int flags);
  bool digest(void* context, const u8* data, size_t n, u8 out[32]) const {
    // No type given again: naming EVP_sha256() at each start costs an implicit fetch (391 ns instead of 150).
    return init(context, nullptr, nullptr) == 1 && update(context, data, n) == 1 && final(context, out, nullptr) == 1;
  }
};

template <class F>
bool find(void* library, const char* symbol, F& f) {
  f = reinterpret_cast<F>(dlsym(library, symbol));
  return f != nullptr;
}

bool Libcrypto::open(const char* name, int flags) {
  library = dlopen(name, RTLD_NOW | RTLD_LOCAL | flags);  // never closed: contexts live in every thread
  if (!library) return false;
  if (!find(library, "EVP_MD_CTX_new", context_new) || !find(library, "EVP_MD_CTX_free", context_free) ||
      !find(library, "EVP_sha256", sha256_type) || !find(library, "EVP_DigestInit_ex", init) ||
      !find(library, "EVP_DigestUpdate", update) || !find(library, "EVP_DigestFinal_ex", final))
    return false;
  // FIPS 180-4's example "abc".
  static const u8 expected[32] = {0xba, 0x78, 0x16, 0xbf, 0x8f, 0x01, 0xcf, 0xea, 0x41, 0x41, 0x40,
                                  0xde, 0x5d, 0xae, 0x22, 0x23, 0xb0, 0x03, 0x61, 0xa3, 0x96, 0x17,
                                  0x7a, 0x9c, 0xb4, 0x10, 0xff, 0x61, 0xf2, 0x00, 0x15, 0xad};
  u8 got[32] = {};
  void* context = context_new();
  bool right = context && init(context, sha256_type(), nullptr) == 1 &&
               digest(context, reinterpret_cast<const u8*>("abc"), 3, got) && memcmp(got, expected, 32) == 0;
  if (context) context_free(context);
  if (right) soname = name;
  return right;
}

// EVERETT_NO_LIBCRYPTO=1 leaves libcrypto alone, so that the fallback can be tested and used on purpose.
const Libcrypto& libcrypto() {
  static const Libcrypto found = [] {
    const char* off = getenv("EVERETT_NO_LIBCRYPTO");
    if (off && strcmp(off, "1") == 0) return Libcrypto();
    // First the one that Python's own hashlib has loaded: two versions in one process are asking for trouble.
    for (int flags : {RTLD_NOLOAD, 0})
      for (const char* name : {"libcrypto.so.3", "libcrypto.so.1.1"}) {
        Libcrypto candidate;
        if (candidate.open(name, flags)) return candidate;
      }
    return Libcrypto();
  }();
  return found;
}

struct Context {
  void* evp;
  Context() : evp(libcrypto().context_new()) {
    if (!evp || libcrypto().init(evp, libcrypto().sha256_type(), nullptr) != 1)
      throw std::runtime_error("libcrypto gave no SHA-256 context");
  }
  ~Context() { libcrypto().context_free(evp); }
};

std::atomic<Sha256Function> fallback{nullptr};

}  // namespace

void set_sha256_fallback(Sha256Function f) { fallback = f; }

void* libcrypto_handle() { return libcrypto().soname ? libcrypto().library : nullptr; }

std::string libcrypto_name() { return libcrypto().soname ? libcrypto().soname : ""; }

void sha256(const u8* data, size_t n, u8 out[32]) {
  if (libcrypto().soname) {
    thread_local Context context;
    if (!libcrypto().digest(context.evp, data, n, out)) throw std::runtime_error("libcrypto failed to hash");
    return;
  }
  Sha256Function slow = fallback;
  if (!slow) throw std::runtime_error("no libcrypto was found and no fallback for SHA-256 was set");
  slow(data, n, out);
}

}  // namespace everett
