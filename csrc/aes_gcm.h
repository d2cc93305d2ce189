// AES-256-GCM by OpenSSL's libcrypto, found as sha256.h finds it. It encrypts only: what was written is read in Python
// with another library, so that each checks the other.
#pragma once

#include <stddef.h>

#include "law/word.h"

namespace everett {

class AesGcm {
 public:
  static constexpr size_t kTag = 16;

  // Whether there is a libcrypto with it, and it gave the known answer.
  static bool available();

  explicit AesGcm(const u8 key[32]);  // std::runtime_error where it is not available
  ~AesGcm();
  AesGcm(const AesGcm&) = delete;
  AesGcm& operator=(const AesGcm&) = delete;

  // Writes n bytes of ciphertext and, behind them, the tag. An iv must never come twice under one key: two messages then
  // give away their difference, and the key of the tags.
  void seal(const u8 iv[12], const u8* associated, size_t associated_n, const u8* plain, size_t n, u8* out);

 private:
  void* context_;
};

}  // namespace everett
