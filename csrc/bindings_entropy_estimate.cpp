// Python names of the min-entropy estimators.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <string>

#include "entropy_estimate.h"

namespace py = pybind11;

namespace everett {

void bind_entropy_estimate(py::module_& m) {
  m.def(
      "entropy_estimates",
      [](py::buffer samples, int k) {
        const py::buffer_info info = samples.request();
        if (info.ndim != 1 || info.itemsize != 1 || info.strides[0] != 1)
          throw py::value_error("samples: a contiguous row of bytes");
        if (k < 2 || k > 256) throw py::value_error("k: 2 to 256 symbols");
        const auto* s = static_cast<const uint8_t*>(info.ptr);
        const auto n = static_cast<size_t>(info.size);
        if (n >= (1u << 31) - 2) throw py::value_error("samples: fewer than 2^31 - 2");
        for (size_t i = 0; i < n; i++)
          if (s[i] >= k) throw py::value_error("samples: every symbol must be below k");
        std::map<std::string, double> out;
        py::gil_scoped_release release;
        out["most_common_value"] = most_common_value_estimate(s, n, k);
        if (k == 2) {
          out["collision"] = collision_estimate(s, n);
          out["markov"] = markov_estimate(s, n);
          out["compression"] = compression_estimate(s, n);
        }
        const TupleEstimates tuples = tuple_estimates(s, n);
        out["t_tuple"] = tuples.t_tuple;
        out["lrs"] = tuples.lrs;
        out["multi_mcw"] = multi_mcw_estimate(s, n, k);
        out["lag"] = lag_estimate(s, n, k);
        out["multi_mmc"] = multi_mmc_estimate(s, n, k);
        out["lz78y"] = lz78y_estimate(s, n, k);
        return out;
      },
      py::arg("samples"), py::arg("k"),
      "Min-entropy a symbol by each estimator of SP 800-90B 6.3 that serves k symbols; NaN: too few samples.");
}

}  // namespace everett
