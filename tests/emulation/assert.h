// A device assertion that fails stops the GPU's work with an error; here it throws, so that a test can see it.
#pragma once

#include <stdexcept>
#include <string>

[[noreturn]] inline void emulation_assertion_failed(const char* what) {
  throw std::runtime_error(std::string("device-side assert: ") + what);
}
#undef assert
#define assert(condition) ((condition) ? (void)0 : emulation_assertion_failed(#condition))
