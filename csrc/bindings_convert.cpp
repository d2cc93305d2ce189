// Python names of the conversions: law_words, law_convert, law_bernoulli.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include "convert.h"

namespace py = pybind11;

namespace everett {

namespace {

Conversion conversion_of(const std::string& name) {
  const char* names[] = {"uniform", "uniform_open", "normal", "exponential", "gumbel"};
  for (int i = 0; i < 5; i++)
    if (name == names[i]) return (Conversion)i;
  throw py::value_error("unknown conversion '" + name + "'; one of uniform, uniform_open, normal, exponential, gumbel");
}

ValueType value_type_of(const std::string& name) {
  const char* names[] = {"float32", "float64", "bfloat16", "float16"};
  for (int i = 0; i < 4; i++)
    if (name == names[i]) return (ValueType)i;
  throw py::value_error("unknown dtype '" + name + "'; one of float32, float64, bfloat16, float16");
}

// A contiguous, one-dimensional view of any buffer, without a copy.
py::buffer_info flat(const py::buffer& b, const char* what, py::ssize_t itemsize, bool writable) {
  py::buffer_info info = b.request(writable);
  if (info.ndim != 1 || (info.shape[0] > 1 && info.strides[0] != info.itemsize))
    throw py::value_error(std::string(what) + " must be one-dimensional and contiguous");
  if (info.itemsize != itemsize)
    throw py::value_error(std::string(what) + " has items of " + std::to_string(info.itemsize) + " bytes; this needs " +
                          std::to_string(itemsize));
  return info;
}

void check_words(u64 have, u64 need, u64 n) {
  if (have < need)
    throw py::value_error(std::to_string(n) + " values take " + std::to_string(need) + " words of 32 bits, but only " +
                          std::to_string(have) + " were given; see law_words");
}

void convert(const std::string& kind, const std::string& dtype, const py::buffer& words, const py::buffer& out) {
  const Conversion c = conversion_of(kind);
  const ValueType t = value_type_of(dtype);
  const py::buffer_info w = flat(words, "words", 4, false), o = flat(out, "out", bytes_of(t), true);
  const u64 n = (u64)o.shape[0];
  check_words((u64)w.shape[0], words_for(c, t, n), n);
  py::gil_scoped_release unlocked;
  convert_words(c, t, (const u32*)w.ptr, n, o.ptr);
}

void convert_bernoulli(const py::buffer& words, const py::buffer& p, const py::buffer& out) {
  const py::buffer_info w = flat(words, "words", 4, false), q = flat(p, "p", 8, false), o = flat(out, "out", 1, true);
  const u64 n = (u64)o.shape[0];
  if ((u64)q.shape[0] != n) throw py::value_error("p and out must have the same length");
  if (q.format != py::format_descriptor<double>::format()) throw py::value_error("p must be float64");
  check_words((u64)w.shape[0], 2 * n, n);
  u64 bad;
  {
    py::gil_scoped_release unlocked;
    bad = bernoulli_words((const u32*)w.ptr, (const double*)q.ptr, n, (u8*)o.ptr);
  }
  if (bad < n)
    throw py::value_error("p[" + std::to_string(bad) + "] is " + std::to_string(((const double*)q.ptr)[bad]) +
                          "; a probability must be in [0, 1]");
}

}  // namespace

void bind_convert(py::module_& m) {
  m.def(
      "law_words",
      [](const std::string& kind, const std::string& dtype, u64 n) {
        return words_for(conversion_of(kind), value_type_of(dtype), n);
      },
      py::arg("kind"), py::arg("dtype"), py::arg("n"),
      "Number of 32-bit words that n values of a kind (uniform, uniform_open, normal, exponential, gumbel) and dtype "
      "(float32, float64, bfloat16, float16) take.");
  m.def("law_convert", &convert, py::arg("kind"), py::arg("dtype"), py::arg("words"), py::arg("out"),
        "Fills `out` (one-dimensional, contiguous; uint16 patterns for bfloat16) with the law's values of `words` "
        "(uint32, in keystream order). Raises ValueError for a wrong name, item size or too few words.");
  m.def("law_bernoulli", &convert_bernoulli, py::arg("words"), py::arg("p"), py::arg("out"),
        "out[i] (one byte) = 64-bit draw i of `words` < round(p[i] * 2^64). p: float64 in [0, 1], else ValueError and "
        "nothing is written.");
}

}  // namespace everett
