// Python names and checks of fused dropout, attention masks, additive noise and stochastic rounding on the GPU. Addresses are
// the device's.
#include <pybind11/pybind11.h>

#include "cuda/attention_mask.h"
#include "cuda/bindings_record.h"
#include "cuda/fused.h"
#include "cuda/launch.h"
#include "cuda/perturb.h"

namespace py = pybind11;

namespace everett {
namespace {

void fused_dropout(int op, const py::object& record, int generator, double p, int type, u64 x, u64 bias, u64 extra, u64 out,
                   i64 n, i64 columns, u64 e0, int device, u64 stream) {
  if (op < 0 || op > 4) throw py::value_error("op is 0 bias_dropout_add, 1 or 2 GELU (erf, tanh), 3 or 4 their backwards");
  if (type < 0 || type > 6 || type == static_cast<int>(DType::u32))
    throw py::value_error("type is 0 fp32, 2 bf16, 3 fp16, 5 e4m3 or 6 e5m2");
  if (!(p >= 0 && p <= 1)) throw py::value_error("p must be from 0 to 1");
  if (n < 0 || columns < 1 || n % columns != 0) throw py::value_error("n must be whole rows of `columns` elements");
  FusedCall c{};
  c.op = static_cast<FusedOp>(op);
  const bool takes_extra = c.op != FusedOp::gelu_erf && c.op != FusedOp::gelu_tanh;
  if (takes_extra != (extra != 0)) throw py::value_error("this op takes a residual or gradient, or must not have one");
  c.type = static_cast<DType>(type);
  c.generator = generator_named(generator);
  c.record = record_source(record);
  c.threshold = threshold_of(p);
  c.in = reinterpret_cast<const void*>(x);
  c.bias = reinterpret_cast<const void*>(bias);
  c.extra = reinterpret_cast<const void*>(extra);
  c.out = reinterpret_cast<void*>(out);
  c.columns = (u64)columns;
  DeviceGuard guard(device);
  launch_fused(c, (u64)n, e0, reinterpret_cast<cudaStream_t>(stream));
}

void perturb(PerturbOp op, const py::object& record, int generator, int type, double sigma, u64 x, u64 out, i64 n, u64 e0,
             int device, u64 stream) {
  if (type < 0 || type > 6) throw py::value_error("type is 0 fp32, 2 bf16 or 3 fp16");
  if (n < 0) throw py::value_error("n must not be negative");
  const PerturbCall c{op,
                      static_cast<DType>(type),
                      generator_named(generator),
                      record_source(record),
                      static_cast<float>(sigma),
                      reinterpret_cast<const void*>(x),
                      reinterpret_cast<void*>(out)};
  DeviceGuard guard(device);
  launch_perturb(c, (u64)n, e0, reinterpret_cast<cudaStream_t>(stream));
}

void attention_mask(const py::object& record, int generator, double p, int type, u64 x, u64 out, i64 heads, i64 queries,
                    i64 keys, u32 bh0, u64 q0, u64 k0, int device, u64 stream) {
  AttentionMaskCall c{};
  if (type < 0 || type > static_cast<int>(DType::f16)) throw py::value_error("type is 0 fp32, 1 fp64, 2 bf16 or 3 fp16");
  if (!(p > 0 && p < 1) || (c.threshold = threshold_of(p)).wide)
    throw py::value_error("p of attention must be from 1/256 to 31/32");
  if (heads < 0 || queries < 0 || keys < 0) throw py::value_error("sizes must not be negative");
  c.type = static_cast<DType>(type);
  c.generator = generator_named(generator);
  c.record = record_source(record);
  c.scale = c.type == DType::f64 ? c.threshold.scale64 : c.threshold.scale;
  c.in = reinterpret_cast<const void*>(x);
  c.out = reinterpret_cast<void*>(out);
  c.heads = (u64)heads, c.queries = (u64)queries, c.keys = (u64)keys, c.bh0 = bh0, c.q0 = q0, c.k0 = k0;
  DeviceGuard guard(device);
  launch_attention_mask(c, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

void bind_fused_cuda(py::module_& m) {
  m.def("fused_dropout", &fused_dropout, py::arg("op"), py::arg("record"), py::arg("generator"), py::arg("p"), py::arg("type"),
        py::arg("x"), py::arg("bias"), py::arg("extra"), py::arg("out"), py::arg("n"), py::arg("columns"), py::arg("e0"),
        py::arg("device"), py::arg("stream"),
        "Contiguous rows. op: 0 bias_dropout_add, 1 GELU (erf), 2 GELU (tanh), 3 and 4 their backwards. bias and extra are "
        "addresses or 0.");
  m.def("attention_mask", &attention_mask, py::arg("record"), py::arg("generator"), py::arg("p"), py::arg("type"),
        py::arg("x"), py::arg("out"), py::arg("heads"), py::arg("queries"), py::arg("keys"), py::arg("bh0"), py::arg("q0"),
        py::arg("k0"), py::arg("device"), py::arg("stream"),
        "Attention weights (heads, queries, keys), contiguous, dropped by the attention law; (bh0, q0, k0): the global "
        "indices of the first.");
  m.def("add_noise",
        [](const py::object& record, int generator, int type, double sigma, u64 x, u64 out, i64 n, u64 e0, int device,
           u64 stream) { perturb(PerturbOp::add_noise, record, generator, type, sigma, x, out, n, e0, device, stream); },
        py::arg("record"), py::arg("generator"), py::arg("type"), py::arg("sigma"), py::arg("x"), py::arg("out"), py::arg("n"),
        py::arg("e0"), py::arg("device"), py::arg("stream"), "x + sigma * normal, contiguous.");
  m.def("stochastic_round",
        [](const py::object& record, int generator, int type, u64 x, u64 out, i64 n, u64 e0, int device, u64 stream) {
          perturb(PerturbOp::stochastic_round, record, generator, type, 0, x, out, n, e0, device, stream);
        },
        py::arg("record"), py::arg("generator"), py::arg("type"), py::arg("x"), py::arg("out"), py::arg("n"), py::arg("e0"),
        py::arg("device"), py::arg("stream"), "fp32 to bf16 or fp16, contiguous.");
}

}  // namespace everett
