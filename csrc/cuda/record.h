// Where a kernel finds its subkey record: in its parameters, or in device memory where a CUDA graph derives one at each
// replay.
#pragma once

#include <cuda_runtime.h>

#include "law/subkey.h"

namespace everett {

struct RecordSource {
  Subkey value;
  const Subkey* address;  // null: `value` counts
};

__device__ __forceinline__ Subkey record_of(const RecordSource& source) {
  return source.address != nullptr ? *source.address : source.value;
}

}  // namespace everett
