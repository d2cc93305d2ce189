// The CPU kernels compiled for AVX2; setup.py adds this file's compiler flags.
#define EVERETT_ISA 1
#include "cpu/fill.h"
#include "cpu/masked.h"

namespace everett {
const Kernels kAvx2 = {"avx2", masked, fill};
}  // namespace everett
