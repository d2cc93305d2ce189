// CRC-32C (Castagnoli, RFC 3720 appendix B.4): finds torn and damaged records. No protection against anybody: that is
// the encryption's business.
#pragma once

#include <stddef.h>

#include "law/word.h"

namespace everett {

// crc: of the bytes before, 0 at the start, so that crc32c(b, crc32c(a)) is that of a and b joined.
u32 crc32c(const u8* data, size_t n, u32 crc = 0);

}  // namespace everett
