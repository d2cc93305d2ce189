// The CPU kernels compiled for AVX2; setup.py adds this file's compiler flags.
#define EVERETT_ISA 1
#include "cpu/attention.h"
#include "cpu/fill.h"
#include "cpu/fused.h"
#include "cpu/keep_bits.h"
#include "cpu/masked.h"
#include "cpu/perturb.h"

namespace everett {
const Kernels kAvx2 = {"avx2", masked, fill, fused, perturb, keep_bits, attention};
}  // namespace everett
