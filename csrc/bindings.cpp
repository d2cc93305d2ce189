// The Python names of the CPU module. Each part of the chain binds its own in bindings_<part>.cpp.
#include <pybind11/pybind11.h>

namespace everett {
void bind_entropy(pybind11::module_& m);
void bind_journal(pybind11::module_& m);
void bind_key(pybind11::module_& m);
void bind_broker(pybind11::module_& m);
void bind_convert(pybind11::module_& m);
void bind_stream(pybind11::module_& m);
void bind_eager(pybind11::module_& m);
void bind_fused(pybind11::module_& m);
void bind_entropy_estimate(pybind11::module_& m);
void bind_read_ahead(pybind11::module_& m);
void bind_usb(pybind11::module_& m);
}  // namespace everett

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ of everett_cuda: entropy path, keys, stream law and CPU kernels. Use the Python functions instead.";
  everett::bind_entropy(m);
  everett::bind_journal(m);
  everett::bind_key(m);
  everett::bind_broker(m);
  everett::bind_convert(m);
  everett::bind_stream(m);
  everett::bind_eager(m);
  everett::bind_fused(m);
  everett::bind_entropy_estimate(m);
  everett::bind_read_ahead(m);
  everett::bind_usb(m);
}
