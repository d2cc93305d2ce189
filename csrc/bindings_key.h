// The keyring as Python holds it, for the bindings that draw from it.
#pragma once

#include <pybind11/pybind11.h>

#include "key.h"

namespace everett {

struct PyKeyring : Keyring {
  PyKeyring(RingReader* ring, size_t tape_entries, pybind11::function refuse)
      : Keyring(ring, tape_entries),
        on_refusal(std::move(refuse)),
        on_repeat(pybind11::none()),
        on_unscripted(pybind11::none()) {}
  pybind11::function on_refusal;  // called with the reason; raises
  pybind11::object on_repeat;     // called without arguments after a `reused` draw, unless None
  pybind11::object on_unscripted; // called by a draw of a replay that needs more records; hands some in, or raises
};

// The record of one draw whose nonce lies at an address; waits without the GIL; a refusal becomes a Python exception.
void draw_or_raise(PyKeyring& keyring, uintptr_t nonce_address, KeyRequest& request, Subkey& record);

}  // namespace everett
