"""Builds `everett_cuda._C` (CPU, always) and `everett_cuda._cuda` (where nvcc is found). Neither needs torch.

The CPU kernels are compiled once per instruction set from the same source; only the flags below differ, and the
choice between them is made at run time. EVERETT_CUDA_ARCHS names the GPU targets (default "80;90;100", as far as
nvcc knows them); the last one also goes in as PTX. EVERETT_NO_CUDA=1 skips the CUDA module. For a profiler's source view
set NVCC_APPEND_FLAGS=-lineinfo, which nvcc reads itself: it triples the module's size.
"""

import concurrent.futures
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CPU_FLAGS = ["-O3", "-g0", "-std=c++17", "-fvisibility=hidden", "-ffp-contract=off", "-fno-math-errno", "-Wall", "-Wextra"]
ISA_FLAGS = {
    "kernels_avx2.cpp": ["-mavx2", "-mfma", "-mf16c", "-mbmi2", "-mtune=haswell"],
    "kernels_avx512.cpp": [
        "-mavx512f", "-mavx512bw", "-mavx512vl", "-mavx512dq", "-mfma", "-mf16c", "-mbmi2",
        "-mprefer-vector-width=512", "-mtune=icelake-server", "-Wno-uninitialized",
    ],
}  # fmt: skip
X86 = platform.machine() in ("x86_64", "AMD64")


def cuda_home():
    """The toolkit's root, or None. nvcc on PATH may be a wrapper script, so nvcc itself is asked where it lives."""
    if os.environ.get("EVERETT_NO_CUDA") == "1":
        return None
    nvcc = os.environ.get("CUDA_HOME") and str(Path(os.environ["CUDA_HOME"]) / "bin" / "nvcc")
    nvcc = nvcc if nvcc and Path(nvcc).exists() else shutil.which("nvcc")
    if nvcc is None:
        return None
    dry = subprocess.run([nvcc, "--dryrun", "-E", "-x", "cu", os.devnull], capture_output=True, text=True)
    for line in (dry.stderr + dry.stdout).splitlines():
        if line.startswith("#$ TOP="):
            return Path(line.removeprefix("#$ TOP=").strip()).resolve()
    return Path(nvcc).resolve().parent.parent


def cuda_archs():
    """The GPU targets as numbers in text: what the environment names, or the default ones that this nvcc can compile."""
    if named := os.environ.get("EVERETT_CUDA_ARCHS"):
        return named.split(";")
    known = subprocess.run([cuda_home() / "bin" / "nvcc", "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    return [a for a in ("80", "90", "100") if f"compute_{a}" in known]


class BuildExt(build_ext):
    """build_ext with per-file flags, nvcc for .cu files, two or more compilers at once, and reuse of fresh objects."""

    def finalize_options(self):
        super().finalize_options()
        self.build_temp = str(ROOT / "build" / f"objects-{sys.implementation.cache_tag}")  # pip would take a fresh folder

    def build_extension(self, ext):
        headers = [*ROOT.glob("csrc/**/*.h"), *ROOT.glob("csrc/**/*.cuh"), ROOT / "setup.py"]
        newest_header = max(h.stat().st_mtime for h in headers)

        def compile_one(source):
            obj = Path(self.build_temp) / (source + ".o")
            obj.parent.mkdir(parents=True, exist_ok=True)
            if obj.exists() and obj.stat().st_mtime > max(newest_header, Path(source).stat().st_mtime):
                return str(obj)
            if source.endswith(".cu"):
                command = self._nvcc_command(source, obj)
            else:
                includes = [f"-I{d}" for d in [*ext.include_dirs, *self.include_dirs, *self.compiler.include_dirs]]
                flags = [*ext.extra_compile_args, *ISA_FLAGS.get(Path(source).name, [])]
                command = [os.environ.get("CXX", "g++"), "-c", source, "-o", str(obj), "-fPIC", *flags, *includes]
            print(" ".join(command), flush=True)
            subprocess.check_call(command)
            return str(obj)

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 2) as pool:
            ext.extra_objects = list(pool.map(compile_one, ext.sources))
        ext.sources = []
        # With no sources left, setuptools would not notice that an object changed: always link (it takes under a second).
        self.force = True
        super().build_extension(ext)

    def _nvcc_command(self, source, obj):
        archs = cuda_archs()
        gencode = [f for a in archs for f in ("-gencode", f"arch=compute_{a},code=sm_{a}")]
        gencode += ["-gencode", f"arch=compute_{archs[-1]},code=compute_{archs[-1]}"]
        return [
            str(cuda_home() / "bin" / "nvcc"), "-c", source, "-o", str(obj), "-O3", "-std=c++17", "--threads", "0",
            "--fmad=false", "-Icsrc", "-Xcompiler", "-fPIC,-fvisibility=hidden,-ffp-contract=off", *gencode,
        ]  # fmt: skip


def extensions():
    sources = sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("csrc/*.cpp"), *ROOT.glob("csrc/cpu/*.cpp")])
    if not X86:
        sources = [s for s in sources if Path(s).name not in ISA_FLAGS]
    cpu = Extension(
        "everett_cuda._C",
        sources,
        include_dirs=["csrc", pybind11.get_include()],
        extra_compile_args=CPU_FLAGS,
        extra_link_args=["-s", "-ldl", "-lpthread"],
        language="c++",
    )
    home = cuda_home()
    if home is None:
        return [cpu]
    cuda = Extension(
        "everett_cuda._cuda",
        sorted(str(p.relative_to(ROOT)) for p in [*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp")]),
        include_dirs=["csrc", pybind11.get_include(), str(home / "include")],
        extra_compile_args=CPU_FLAGS,
        extra_link_args=["-s", f"-L{home / 'lib64'}", "-l:libcudart_static.a", "-lrt", "-lpthread", "-ldl"],
        language="c++",
    )
    return [cpu, cuda]


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildExt})
