// libcrypto's EVP interface for AES-256-GCM, checked once against a known answer; see aes_gcm.h.
#include "aes_gcm.h"

#include <dlfcn.h>
#include <string.h>

#include <stdexcept>

#include "sha256.h"

namespace everett {
namespace {

constexpr int kGetTag = 0x10;  // EVP_CTRL_AEAD_GET_TAG

struct Evp {
  void* (*context_new)() = nullptr;
  void (*context_free)(void*) = nullptr;  // also wipes the key schedule
  const void* (*aes_256_gcm)() = nullptr;
  int (*init)(void*, const void*, void*, const u8*, const u8*) = nullptr;
  int (*update)(void*, u8*, int*, const u8*, int) = nullptr;
  int (*final)(void*, u8*, int*) = nullptr;
  int (*control)(void*, int, int, void*) = nullptr;
  bool works = false;

  Evp();
  bool seal(void* context, const u8 iv[12], const u8* associated, size_t associated_n, const u8* plain, size_t n,
            u8* out) const {
    int written = 0, rest = 0;
    return init(context, nullptr, nullptr, nullptr, iv) == 1 &&
           update(context, nullptr, &written, associated, int(associated_n)) == 1 &&
           update(context, out, &written, plain, int(n)) == 1 && final(context, out + written, &rest) == 1 &&
           size_t(written + rest) == n && control(context, kGetTag, int(AesGcm::kTag), out + n) == 1;
  }
};

template <class F>
bool find(void* library, const char* symbol, F& f) {
  f = reinterpret_cast<F>(dlsym(library, symbol));
  return f != nullptr;
}

// Test case 16 of McGrew and Viega, "The Galois/Counter Mode of Operation", appendix B.
const u8 kHalfKey[16] = {0xfe, 0xff, 0xe9, 0x92, 0x86, 0x65, 0x73, 0x1c,
                         0x6d, 0x6a, 0x8f, 0x94, 0x67, 0x30, 0x83, 0x08};
const u8 kIv[12] = {0xca, 0xfe, 0xba, 0xbe, 0xfa, 0xce, 0xdb, 0xad, 0xde, 0xca, 0xf8, 0x88};
const u8 kAssociated[20] = {0xfe, 0xed, 0xfa, 0xce, 0xde, 0xad, 0xbe, 0xef, 0xfe, 0xed,
                            0xfa, 0xce, 0xde, 0xad, 0xbe, 0xef, 0xab, 0xad, 0xda, 0xd2};
const u8 kPlain[60] = {0xd9, 0x31, 0x32, 0x25, 0xf8, 0x84, 0x06, 0xe5, 0xa5, 0x59, 0x09, 0xc5, 0xaf, 0xf5, 0x26,
                       0x9a, 0x86, 0xa7, 0xa9, 0x53, 0x15, 0x34, 0xf7, 0xda, 0x2e, 0x4c, 0x30, 0x3d, 0x8a, 0x31,
                       0x8a, 0x72, 0x1c, 0x3c, 0x0c, 0x95, 0x95, 0x68, 0x09, 0x53, 0x2f, 0xcf, 0x0e, 0x24, 0x49,
                       0xa6, 0xb5, 0x25, 0xb1, 0x6a, 0xed, 0xf5, 0xaa, 0x0d, 0xe6, 0x57, 0xba, 0x63, 0x7b, 0x39};
const u8 kSealed[76] = {0x52, 0x2d, 0xc1, 0xf0, 0x99, 0x56, 0x7d, 0x07, 0xf4, 0x7f, 0x37, 0xa3, 0x2a, 0x84, 0x42,
                        0x7d, 0x64, 0x3a, 0x8c, 0xdc, 0xbf, 0xe5, 0xc0, 0xc9, 0x75, 0x98, 0xa2, 0xbd, 0x25, 0x55,
                        0xd1, 0xaa, 0x8c, 0xb0, 0x8e, 0x48, 0x59, 0x0d, 0xbb, 0x3d, 0xa7, 0xb0, 0x8b, 0x10, 0x56,
                        0x82, 0x88, 0x38, 0xc5, 0xf6, 0x1e, 0x63, 0x93, 0xba, 0x7a, 0x0a, 0xbc, 0xc9, 0xf6, 0x62,
                        0x76, 0xfc, 0x6e, 0xce, 0x0f, 0x4e, 0x17, 0x68, 0xcd, 0xdf, 0x88, 0x53, 0xbb, 0x2d, 0x55, 0x1b};

Evp::Evp() {
  void* library = libcrypto_handle();
  if (!library || !find(library, "EVP_CIPHER_CTX_new", context_new) ||
      !find(library, "EVP_CIPHER_CTX_free", context_free) || !find(library, "EVP_aes_256_gcm", aes_256_gcm) ||
      !find(library, "EVP_EncryptInit_ex", init) || !find(library, "EVP_EncryptUpdate", update) ||
      !find(library, "EVP_EncryptFinal_ex", final) || !find(library, "EVP_CIPHER_CTX_ctrl", control))
    return;
  u8 key[32], out[sizeof(kSealed)] = {};
  memcpy(key, kHalfKey, 16);
  memcpy(key + 16, kHalfKey, 16);
  void* context = context_new();
  works = context && init(context, aes_256_gcm(), nullptr, key, nullptr) == 1 &&
          seal(context, kIv, kAssociated, sizeof(kAssociated), kPlain, sizeof(kPlain), out) &&
          memcmp(out, kSealed, sizeof(kSealed)) == 0;
  if (context) context_free(context);
}

const Evp& evp() {
  static const Evp found;
  return found;
}

}  // namespace

bool AesGcm::available() { return evp().works; }

AesGcm::AesGcm(const u8 key[32]) {
  if (!available()) throw std::runtime_error("AES-256-GCM is not available: no libcrypto that has it was found");
  context_ = evp().context_new();
  if (!context_ || evp().init(context_, evp().aes_256_gcm(), nullptr, key, nullptr) != 1) {
    if (context_) evp().context_free(context_);
    throw std::runtime_error("libcrypto gave no AES-256-GCM context");
  }
}

AesGcm::~AesGcm() { evp().context_free(context_); }

void AesGcm::seal(const u8 iv[12], const u8* associated, size_t associated_n, const u8* plain, size_t n, u8* out) {
  if (!evp().seal(context_, iv, associated, associated_n, plain, n, out))
    throw std::runtime_error("libcrypto failed to encrypt");
}

}  // namespace everett
