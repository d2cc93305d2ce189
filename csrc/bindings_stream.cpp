// Python names and argument checks of the CPU kernels. Tensors come as addresses, so that torch is not linked.
#include <pybind11/pybind11.h>

#include "bindings_layout.h"
#include "bindings_stream.h"
#include "cpu/kernels.h"
#include "parallel.h"

namespace py = pybind11;

namespace everett {
namespace {

Layout flat(i64 n, u64 e0) {
  Layout l;
  l.size[0] = n;
  l.e0 = e0;
  return l;
}

MaskedJob masked_job(MaskedOp op, const py::bytes& record, int generator, double p, int type, u32 s, u64 in, u64 extra,
                     u64 out) {
  MaskedJob job{};
  job.op = op;
  job.type = static_cast<DType>(type);
  job.generator = generator_named(generator);
  job.stream = stream_of(record, kTagKeep, s);
  job.threshold = threshold_of(p);
  job.scale = job.type == DType::f64 ? job.threshold.scale64 : job.threshold.scale;
  job.in = reinterpret_cast<const void*>(in);
  job.extra = reinterpret_cast<const void*>(extra);
  job.out = reinterpret_cast<void*>(out);
  return job;
}

}  // namespace

void bind_stream(py::module_& m) {
  m.def("instruction_set", &instruction_set, "The instruction set in use.");
  m.def("use_instruction_set", [](const std::string& name) {
    if (!use_instruction_set(name.c_str()))
      throw py::value_error("no instruction set '" + name + "' on this CPU; see instruction_sets()");
  });
  m.def("instruction_sets", [] {
    const char* names[3];
    int n = available_instruction_sets(names);
    py::list r;
    for (int i = 0; i < n; i++) r.append(names[i]);
    return r;
  });
  m.def("openmp_library", &openmp_library, "Path of the OpenMP runtime that runs the threads; empty: own threads.");

  m.def("derive_record", [](py::bytes key, py::bytes nonce) {
    std::string k = key, n = nonce;
    if (k.size() != 32 || n.size() != 16) throw py::value_error("a key is 32 bytes and a nonce is 16");
    u32 words[8], nonce_words[4];
    memcpy(words, k.data(), 32);
    memcpy(nonce_words, n.data(), 16);
    Subkey r = derive_subkey(words, nonce_words);
    return py::bytes(reinterpret_cast<const char*>(&r), sizeof r);
  });

  m.def("dropout",
        [](py::bytes record, int generator, double p, int type, u64 in, u64 out, i64 n, u64 e0, int threads) {
          MaskedJob job = masked_job(MaskedOp::dropout, record, generator, p, type, 0, in, 0, out);
          job.layout = flat(n, e0);
          without_gil(n, [&] { run_masked(job, threads); });
        },
        "Contiguous dropout of n elements whose first has logical index e0.");
  m.def("dropout_add",
        [](py::bytes record, int generator, double p, int type, u64 in, u64 extra, u64 out, i64 n, u64 e0, int threads) {
          MaskedJob job = masked_job(MaskedOp::dropout_add, record, generator, p, type, 0, in, extra, out);
          job.layout = flat(n, e0);
          without_gil(n, [&] { run_masked(job, threads); });
        });
  m.def("masked_strided",
        [](int op, py::bytes record, int generator, double p, int type, py::tuple scale_shift_dropped, u64 in, u64 extra,
           u64 out, py::tuple size, py::tuple in_stride, py::tuple extra_stride, py::tuple out_stride, py::tuple e_stride,
           u64 e0, u32 s, int threads) {
          if (op < 0 || op > 2) throw py::value_error("op is 0 dropout, 1 dropout_add or 2 affine");
          MaskedJob job = masked_job(static_cast<MaskedOp>(op), record, generator, p, type, s, in, extra, out);
          if (job.op == MaskedOp::affine) {
            job.scale = scale_shift_dropped[0].cast<double>();
            job.shift = scale_shift_dropped[1].cast<double>();
            job.dropped = scale_shift_dropped[2].cast<double>();
          }
          job.layout = layout_of(size, in_stride, extra_stride, out_stride, e_stride, e0);
          without_gil(elements(job.layout), [&] { run_masked(job, threads); });
        },
        "The general form: any layout, any shard of a larger logical tensor.");

  m.def("keep_bits",
        [](py::bytes record, int generator, double p, u64 out, i64 n, u64 e0, u32 s, int threads) {
          MaskedJob job = masked_job(MaskedOp::dropout, record, generator, p, 0, s, 0, 0, out);
          job.layout = flat(n, e0);
          without_gil(n, [&] { run_keep_bits(job, threads); });
        },
        "Keep masks as packed bits: bit i%8 of byte i//8 is 1 where element i, with logical index e0 + i, is kept; the bits "
        "of the last byte beyond n are 0.");

  m.def("fill",
        [](int kind, py::bytes record, int generator, u32 tag, int type, u64 p, u64 out, py::tuple size,
           py::tuple p_stride, py::tuple out_stride, py::tuple e_stride, u64 e0, u32 s, int threads) {
          if (kind < 0 || kind > 8) throw py::value_error("unknown kind of fill");
          FillJob job{};
          job.kind = static_cast<Fill>(kind);
          job.type = static_cast<DType>(type);
          if ((job.kind == Fill::integers) != (job.type == DType::i64)) throw py::value_error("integers are int64");
          if (job.kind >= Fill::gamma && job.type != DType::f64) throw py::value_error("gamma variates are fp64");
          if (job.kind >= Fill::bernoulli && p == 0) throw py::value_error("this fill takes parameters");
          job.generator = generator_named(generator);
          job.stream = stream_of(record, tag, s);
          job.p = reinterpret_cast<const void*>(p);
          job.out = reinterpret_cast<void*>(out);
          job.layout = layout_of(size, p_stride, out_stride, out_stride, e_stride, e0);
          without_gil(elements(job.layout), [&] { run_fill(job, threads); });
        });
}

}  // namespace everett
