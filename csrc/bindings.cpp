// The Python names of the CPU module. Each part of the chain binds its own in bindings_<part>.cpp.
#include <pybind11/pybind11.h>

namespace py = pybind11;

namespace everett {
void bind_stream(py::module_& m);
}

PYBIND11_MODULE(_C, m) {
  m.doc() = "C++ of everett_cuda: entropy path, keys, stream law and CPU kernels. Use the Python functions instead.";
  everett::bind_stream(m);
}
