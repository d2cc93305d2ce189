// Keep masks as packed bits on the GPU: bit i of the output, little endian within its byte, is 1 where element i is kept.
#pragma once

#include <cuda_runtime.h>

#include "cuda/record.h"
#include "law/keepdrop.h"
#include "law/stream.h"

namespace everett {

struct KeepBitsCall {
  Generator generator;
  RecordSource record;
  u32 s;
  Threshold threshold;
  u8* out;  // (n + 7) / 8 bytes, at any address; the bits of the last byte beyond n become 0
};

// Elements 0 ... n-1, with logical indices e0, e0+1, ..., on the current device.
// Throws std::runtime_error with the kernel's name where the launch fails.
void launch_keep_bits(const KeepBitsCall& call, u64 n, u64 e0, cudaStream_t stream);

}  // namespace everett
