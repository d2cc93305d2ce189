// The numbers by which Python names element types, masked ops and fills, the same for CPU and CUDA kernels.
#pragma once

namespace everett {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, u32 = 4, f8e4m3 = 5, f8e5m2 = 6 };

constexpr int bytes_of(DType t) {
  switch (t) {
    case DType::f64: return 8;
    case DType::bf16:
    case DType::f16: return 2;
    case DType::f8e4m3:
    case DType::f8e5m2: return 1;
    default: return 4;
  }
}

// out = keep ? in * scale : 0                   (dropout)
// out = (keep ? in * scale : 0) + extra         (dropout_add, one rounding at the end)
// out = keep ? in * scale + shift : dropped     (affine: alpha dropout)
enum class MaskedOp : int { dropout = 0, dropout_add = 1, affine = 2 };

enum class Fill : int { words = 0, uniform = 1, normal = 2, exponential = 3, gumbel = 4, bernoulli = 5 };

}  // namespace everett
