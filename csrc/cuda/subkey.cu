// Subkey records from a key and nonces in device memory, for CUDA graphs and compiled code: there the nonce is made by
// torch inside the graph, and the key is refreshed in place outside it. A thread a nonce; two ChaCha20 blocks each.
//
// Without a key (all zero: the source was closed) the kernel stops the GPU's work with an error, as a failed device
// assertion does. A replayed graph has no other way to say no: whatever it computed would pass for random.
#include "cuda/subkey.h"

#include <assert.h>

#include "cuda/launch.h"

namespace everett {
namespace {

constexpr int kThreads = 32;

__global__ void __launch_bounds__(kThreads) subkey_kernel(const u32* key, const u32* nonces, Subkey* records, u32 n) {
  const u32 i = blockIdx.x * kThreads + threadIdx.x;
  if (i >= n) return;
  u32 k[8], nonce[4];
  u32 any = 0;
  for (int j = 0; j < 8; j++) k[j] = key[j], any |= k[j];
  assert(any != 0 && "a CUDA graph was replayed without a key: open a source with ev.open(...) before the replay");
  for (int j = 0; j < 4; j++) nonce[j] = nonces[4 * (u64)i + j];
  records[i] = derive_subkey(k, nonce);
}

}  // namespace

void launch_subkeys(const u32* key, const u32* nonces, Subkey* records, u32 n, cudaStream_t stream) {
  if (n == 0) return;
  launch("subkey_kernel", subkey_kernel, (n + kThreads - 1) / kThreads, kThreads, stream, key, nonces, records, n);
}

}  // namespace everett
