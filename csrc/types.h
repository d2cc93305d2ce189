// The numbers by which Python names element types, masked ops and fills, the same for CPU and CUDA kernels.
#pragma once

namespace everett {

enum class DType : int { f32 = 0, f64 = 1, bf16 = 2, f16 = 3, u32 = 4, f8e4m3 = 5, f8e5m2 = 6, i64 = 7 };

constexpr int bytes_of(DType t) {
  switch (t) {
    case DType::f64:
    case DType::i64: return 8;
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

// Keep masks can also be stored by themselves, a bit an element (the op keep_bits): bit i of the output, little endian
// within its byte, is 1 where element i is kept.

// Fills. The last four take a parameter of 8 bytes, one for each element or one for all: a probability (fp64), how many
// integers there are, 0, 1, ... (64 bits, 0 standing for 2^64), or the shape of a gamma distribution (fp64).
enum class Fill : int {
  words = 0, uniform = 1, normal = 2, exponential = 3, gumbel = 4, bernoulli = 5, integers = 6, gamma = 7, log_gamma = 8
};

// Contiguous rows of `columns` elements: v = in + bias (one row of it, or null), and then
//   bias_dropout_add     out = (keep ? v * scale : 0) + extra
//   gelu_erf, gelu_tanh  out = keep ? gelu(v) * scale : 0
//   ..._backward         out = keep ? extra * scale * gelu'(v) : 0, extra being the incoming gradient
// all in fp32 (so fp64 is not served), rounded once.
enum class FusedOp : int {
  bias_dropout_add = 0, gelu_erf = 1, gelu_tanh = 2, gelu_erf_backward = 3, gelu_tanh_backward = 4
};

// Contiguous: out = in + sigma * normal, or fp32 `in` rounded stochastically to `type`.
enum class PerturbOp : int { add_noise = 0, stochastic_round = 1 };

}  // namespace everett
