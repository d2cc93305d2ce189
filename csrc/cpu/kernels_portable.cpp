// The CPU kernels compiled for any CPU; setup.py adds this file's compiler flags.
#define EVERETT_ISA 0
#include "cpu/attention.h"
#include "cpu/fill.h"
#include "cpu/fused.h"
#include "cpu/keep_bits.h"
#include "cpu/masked.h"
#include "cpu/perturb.h"

namespace everett {
const Kernels kPortable = {"portable", masked, fill, fused, perturb, keep_bits, attention};
}  // namespace everett
