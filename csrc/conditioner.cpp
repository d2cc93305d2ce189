// The conditioner's two ways of making blocks; see conditioner.h for the construction.
#include "conditioner.h"

#include <string.h>

#include <stdexcept>

#include "sha256.h"

namespace everett {

HashBlocks sha256_libcrypto() {
  if (libcrypto_name().empty()) throw std::runtime_error("no libcrypto.so.3 or libcrypto.so.1.1 with a working SHA-256");
  return [](const uint8_t* raw, size_t n, size_t blocks, uint8_t* out) {
    for (size_t i = 0; i < blocks; i++) sha256(raw + i * n, n, out + i * kBlock);
  };
}

HashBlocks pass_through() {
  return [](const uint8_t* raw, size_t n, size_t blocks, uint8_t* out) {
    if (n != kBlock) throw std::invalid_argument("pass-through takes 32 raw bytes a block");
    memcpy(out, raw, blocks * kBlock);
  };
}

}  // namespace everett
