// SHA-256 by OpenSSL's libcrypto, opened at run time: no header, no link, no hash code of our own. Where none opens,
// the function set as the fallback (Python's hashlib) gives the same bytes, slower.
#pragma once

#include <stddef.h>

#include <string>

#include "law/word.h"

namespace everett {

using Sha256Function = void (*)(const u8* data, size_t n, u8 out[32]);

// out may overlap data. Any thread may call; without libcrypto the fallback runs, which takes Python's GIL: call with
// no mutex held.
void sha256(const u8* data, size_t n, u8 out[32]);

// The soname that was opened; empty where there is none and the fallback serves.
std::string libcrypto_name();

// What dlopen gave for it, for others that need more of it; null where there is none.
void* libcrypto_handle();

// Set once, before the first call; sha256() throws std::runtime_error where it is needed and missing.
void set_sha256_fallback(Sha256Function f);

}  // namespace everett
