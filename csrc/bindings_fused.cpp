// Python names and checks of the CPU's fused dropout, attention masks, additive noise and stochastic rounding. Tensors come
// as addresses.
#include <pybind11/pybind11.h>

#include "bindings_stream.h"
#include "cpu/kernels.h"

namespace py = pybind11;

namespace everett {
namespace {

DType half_or_single(int type) {
  const DType t = static_cast<DType>(type);
  if (t != DType::f32 && t != DType::bf16 && t != DType::f16) throw py::value_error("type is fp32, bf16 or fp16");
  return t;
}

DType type_of_fused(int type) {
  if (type < 0 || type > 6 || type == static_cast<int>(DType::f64) || type == static_cast<int>(DType::u32))
    throw py::value_error("type is 0 fp32, 2 bf16, 3 fp16, 5 e4m3 or 6 e5m2");
  return static_cast<DType>(type);
}

void fused_dropout(int op, py::bytes record, int generator, double p, int type, u64 x, u64 bias, u64 extra, u64 out,
                   i64 n, i64 columns, u64 e0, int threads) {
  if (op < 0 || op > 4) throw py::value_error("unknown fused op");
  if (columns < 1 || n % columns != 0) throw py::value_error("n must be whole rows of `columns` elements");
  const FusedOp what = static_cast<FusedOp>(op);
  const bool takes_extra = what != FusedOp::gelu_erf && what != FusedOp::gelu_tanh;
  if (takes_extra != (extra != 0)) throw py::value_error("this op takes a residual or gradient, or must not have one");
  FusedJob job{};
  job.fused = what;
  job.type = type_of_fused(type);
  job.generator = generator_named(generator);
  job.stream = stream_of(record, kTagKeep, 0);
  job.threshold = threshold_of(p);
  job.scale = job.threshold.scale;
  job.in = reinterpret_cast<const void*>(x);
  job.bias = reinterpret_cast<const void*>(bias);
  job.extra = reinterpret_cast<const void*>(extra);
  job.out = reinterpret_cast<void*>(out);
  job.columns = columns;
  job.layout.size[0] = n;
  job.layout.e0 = e0;
  without_gil(n, [&] { run_fused(job, threads); });
}

PerturbJob perturb_job(PerturbOp op, const py::bytes& record, u32 tag, int generator, int type, u64 x, u64 out, i64 n,
                       u64 e0) {
  PerturbJob job{};
  job.op = op;
  job.type = half_or_single(type);
  job.generator = generator_named(generator);
  job.stream = stream_of(record, tag, 0);
  job.in = reinterpret_cast<const void*>(x);
  job.out = reinterpret_cast<void*>(out);
  job.n = n;
  job.e0 = e0;
  return job;
}

void attention_mask(py::bytes record, int generator, double p, int type, u64 in, u64 out, i64 heads, i64 queries, i64 keys,
                    u32 bh0, u64 q0, u64 k0, int threads) {
  AttentionJob job{};
  job.type = static_cast<DType>(type);
  if (type < 0 || type > static_cast<int>(DType::f16)) throw py::value_error("type is 0 fp32, 1 fp64, 2 bf16 or 3 fp16");
  if (!(p > 0 && p < 1) || (job.threshold = threshold_of(p)).wide)
    throw py::value_error("p of attention must be from 1/256 to 31/32");
  if (heads < 0 || queries < 0 || keys < 0) throw py::value_error("sizes must not be negative");
  if (heads == 0 || queries == 0 || keys == 0) return;
  job.generator = generator_named(generator);
  job.stream = stream_of(record, kTagAttention, bh0);
  job.scale = job.type == DType::f64 ? job.threshold.scale64 : job.threshold.scale;
  job.in = reinterpret_cast<const void*>(in);
  job.out = reinterpret_cast<void*>(out);
  job.layout.size[0] = heads;
  job.queries = queries, job.keys = keys, job.bh0 = bh0, job.q0 = q0, job.k0 = k0;
  without_gil(heads * queries * keys, [&] { run_attention(job, threads); });
}

}  // namespace

void bind_fused(py::module_& m) {
  m.def("fused_dropout", &fused_dropout, py::arg("op"), py::arg("record"), py::arg("generator"), py::arg("p"), py::arg("type"),
        py::arg("x"), py::arg("bias"), py::arg("extra"), py::arg("out"), py::arg("n"), py::arg("columns"), py::arg("e0"),
        py::arg("threads"),
        "Contiguous rows. op: 0 bias_dropout_add, 1 GELU (erf), 2 GELU (tanh), 3 and 4 their backwards. bias and extra "
        "are addresses or 0.");
  m.def("attention_mask", &attention_mask, py::arg("record"), py::arg("generator"), py::arg("p"), py::arg("type"),
        py::arg("x"), py::arg("out"), py::arg("heads"), py::arg("queries"), py::arg("keys"), py::arg("bh0"), py::arg("q0"),
        py::arg("k0"), py::arg("threads"),
        "Attention weights (heads, queries, keys), contiguous, dropped by the attention law; (bh0, q0, k0): the global "
        "indices of the first.");
  m.def("add_noise",
        [](py::bytes record, int generator, int type, double sigma, u64 x, u64 out, i64 n, u64 e0, int threads) {
          PerturbJob job = perturb_job(PerturbOp::add_noise, record, kTagNormal, generator, type, x, out, n, e0);
          job.sigma = sigma;
          without_gil(n, [&] { run_perturb(job, threads); });
        },
        "x + sigma * normal, contiguous.");
  m.def("stochastic_round",
        [](py::bytes record, int generator, int type, u64 x, u64 out, i64 n, u64 e0, int threads) {
          PerturbJob job = perturb_job(PerturbOp::stochastic_round, record, kTagRounding, generator, type, x, out, n, e0);
          if (job.type == DType::f32) throw py::value_error("type is bf16 or fp16");
          without_gil(n, [&] { run_perturb(job, threads); });
        },
        "fp32 to bf16 or fp16, contiguous.");
}

}  // namespace everett
