// The Python names of the CUDA module: names and checks only. It imports on machines without a GPU or a driver.
//
// Tensors come as device addresses, streams as handles. No call waits for the GPU but `law`, so none lets go of the GIL.
#include <pybind11/pybind11.h>

#include "bindings_layout.h"
#include "cuda/bindings_record.h"
#include "cuda/launch.h"
#include "cuda/law_check.h"
#include "cuda/masked.h"
#include "cuda/subkey.h"

namespace py = pybind11;
using namespace everett;

namespace everett {
void bind_pool(py::module_& m);
void bind_fills(py::module_& m);
void bind_fused_cuda(py::module_& m);
}  // namespace everett

namespace {

py::bytes law(int generator, const py::bytes& record, u32 tag, u32 s, double p, int what, u64 first_block, u32 blocks,
              u64 stream) {
  if (what < 0 || what > 5) throw py::value_error("what is 0 words, 1 keep, 2 uniform, 3 normal, 4 exponential, 5 gumbel");
  if (!(p >= 0 && p <= 1) || (what == 1 && threshold_of(p).wide))
    throw py::value_error("p: from 1/256 to 31/32, where decisions take 16-bit draws");
  const Generator g = generator_named(generator);
  const Stream t{record_from(record), tag, s};
  std::string out((size_t)blocks * values_per_block(static_cast<LawCheck>(what)) * sizeof(u32), '\0');
  {
    py::gil_scoped_release release;
    law_check(g, t, p, static_cast<LawCheck>(what), first_block, blocks, reinterpret_cast<u32*>(&out[0]),
              reinterpret_cast<cudaStream_t>(stream));
  }
  return out;
}

MaskedCall masked_call(int op, const py::object& record, int generator, double p, int type, const py::tuple& affine,
                       u64 in, u64 extra, u64 out, u32 s) {
  if (op < 0 || op > 2) throw py::value_error("op is 0 dropout, 1 dropout_add or 2 affine");
  if (type < 0 || type > 6 || type == static_cast<int>(DType::u32))
    throw py::value_error("type is 0 fp32, 1 fp64, 2 bf16, 3 fp16, 5 e4m3 or 6 e5m2");
  if (!(p >= 0 && p <= 1)) throw py::value_error("p must be from 0 to 1");
  MaskedCall c{};
  c.op = static_cast<MaskedOp>(op);
  c.type = static_cast<DType>(type);
  c.generator = generator_named(generator);
  c.record = record_source(record);
  c.s = s;
  c.threshold = threshold_of(p);
  c.scale = c.type == DType::f64 ? c.threshold.scale64 : c.threshold.scale;
  if (c.op == MaskedOp::affine) {
    if (py::len(affine) != 3) throw py::value_error("affine is (scale, shift, dropped)");
    c.scale = affine[0].cast<double>(), c.shift = affine[1].cast<double>(), c.dropped = affine[2].cast<double>();
  }
  c.in = reinterpret_cast<const void*>(in);
  c.extra = c.op == MaskedOp::dropout_add ? reinterpret_cast<const void*>(extra) : nullptr;
  c.out = reinterpret_cast<void*>(out);
  return c;
}

void masked(int op, const py::object& record, int generator, double p, int type, const py::tuple& affine, u64 x,
            u64 extra, u64 out, i64 n, u64 e0, u32 s, int device, u64 stream) {
  if (n < 0) throw py::value_error("n must not be negative");
  const MaskedCall call = masked_call(op, record, generator, p, type, affine, x, extra, out, s);
  DeviceGuard guard(device);
  launch_masked(call, (u64)n, e0, reinterpret_cast<cudaStream_t>(stream));
}

void masked_strided(int op, const py::object& record, int generator, double p, int type, const py::tuple& affine, u64 x,
                    u64 extra, u64 out, const py::tuple& size, const py::tuple& x_strides, const py::tuple& extra_strides,
                    const py::tuple& out_strides, const py::tuple& e_strides, u64 e0, u32 s, int device, u64 stream) {
  const MaskedCall call = masked_call(op, record, generator, p, type, affine, x, extra, out, s);
  const Layout layout = layout_of(size, x_strides, extra_strides, out_strides, e_strides, e0);
  DeviceGuard guard(device);
  launch_masked_strided(call, layout, reinterpret_cast<cudaStream_t>(stream));
}

void subkeys(u64 key, u64 nonces, u64 out, u32 n, int device, u64 stream) {
  if (n != 0 && (key == 0 || nonces == 0 || out == 0))
    throw py::value_error("key, nonces and out must be device addresses");
  if ((key | nonces | out) % alignof(u32) != 0) throw py::value_error("key, nonces and out must be multiples of 4");
  DeviceGuard guard(device);
  launch_subkeys(reinterpret_cast<const u32*>(key), reinterpret_cast<const u32*>(nonces),
                 reinterpret_cast<Subkey*>(out), n, reinterpret_cast<cudaStream_t>(stream));
}

}  // namespace

PYBIND11_MODULE(_cuda, m) {
  m.doc() = "CUDA side of everett_cuda: kernels on device memory.";
  bind_pool(m);
  m.def("device_count", &device_count, "GPUs that this process can use; RuntimeError where the driver is too old.");
  m.def("law", &law, py::arg("generator"), py::arg("record"), py::arg("tag"), py::arg("s"), py::arg("p"), py::arg("what"),
        py::arg("first_block"), py::arg("blocks"), py::arg("stream") = 0,
        "The law's values of keystream blocks, computed on the current GPU, as bytes of 32-bit words.");
  m.def("masked", &masked, py::arg("op"), py::arg("record"), py::arg("generator"), py::arg("p"), py::arg("type"),
        py::arg("affine"), py::arg("x"), py::arg("extra"), py::arg("out"), py::arg("n"), py::arg("e0"), py::arg("s"),
        py::arg("device"), py::arg("stream"),
        "A masked op on n contiguous elements, the first of logical index e0. record: 48 bytes, or their device address.");
  m.def("masked_strided", &masked_strided, py::arg("op"), py::arg("record"), py::arg("generator"), py::arg("p"),
        py::arg("type"), py::arg("affine"), py::arg("x"), py::arg("extra"), py::arg("out"), py::arg("size"),
        py::arg("x_strides"), py::arg("extra_strides"), py::arg("out_strides"), py::arg("e_strides"), py::arg("e0"),
        py::arg("s"), py::arg("device"), py::arg("stream"),
        "The general form: any layout (strides in elements), any shard of a larger logical tensor.");
  m.def("subkeys", &subkeys, py::arg("key"), py::arg("nonces"), py::arg("out"), py::arg("n"), py::arg("device"),
        py::arg("stream"), "n records of 48 bytes from a key of 32 bytes and n nonces of 16, all at device addresses.");
  bind_fills(m);
  bind_fused_cuda(m);
}
