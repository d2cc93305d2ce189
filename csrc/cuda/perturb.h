// Noise onto the elements of a tensor on the GPU: x + sigma * normal, and stochastic rounding of fp32.
#pragma once

#include <cuda_runtime.h>

#include "cuda/record.h"
#include "law/stream.h"
#include "types.h"

namespace everett {

struct PerturbCall {
  PerturbOp op;
  DType type;  // add_noise: of input and output, fp32, bf16 or fp16; stochastic_round: of the output, bf16 or fp16
  Generator generator;
  RecordSource record;
  float sigma;  // add_noise only
  const void* in;
  void* out;
};

// Elements 0 ... n-1 of contiguous memory, with logical indices e0, e0+1, ..., on the current device. Throws
// std::invalid_argument for a type that the op does not have, std::runtime_error with the kernel's name where the launch
// fails.
void launch_perturb(const PerturbCall& call, u64 n, u64 e0, cudaStream_t stream);

}  // namespace everett
