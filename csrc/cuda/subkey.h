// Subkey records derived on the GPU; see subkey.cu.
#pragma once

#include <cuda_runtime.h>

#include "law/subkey.h"

namespace everett {

// records[i] = derive_subkey(key, nonce i) for n nonces of four words each; all device memory. Launches on the current
// device; throws std::runtime_error with the kernel's name where that fails.
void launch_subkeys(const u32* key, const u32* nonces, Subkey* records, u32 n, cudaStream_t stream);

}  // namespace everett
