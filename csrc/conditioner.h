// The conditioner: block = SHA-256(raw[0:n]), n = ceil(320 / H) raw bytes to 32; non-overlapping, nothing chained, no
// prefix, no state. So every block has a raw offset, and sha256sum over a capture checks it. SHA-256 is a vetted
// conditioning function (SP 800-90B 3.1.5); 64 bits more than it gives out makes the output full entropy (90C).
#pragma once

#include <stddef.h>
#include <stdint.h>

#include <functional>

namespace everett {

constexpr size_t kBlock = 32;

// Hashes `blocks` pieces of `n` raw bytes each into 32 bytes each.
using HashBlocks = std::function<void(const uint8_t* raw, size_t n, size_t blocks, uint8_t* out)>;

// SHA-256 by libcrypto (sha256.h). Throws std::runtime_error where no libcrypto opens.
HashBlocks sha256_libcrypto();
// Raw bytes as they are (n = 32), for a source that declares full entropy. Asked for in the URI and shown in the status.
HashBlocks pass_through();

}  // namespace everett
