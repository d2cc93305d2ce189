"""Compiles csrc/cuda for the CPU: the very .cu files under the headers beside this file, as a module that tests call with
addresses of CPU memory. The result is kept under build/ by the hash of everything that goes into it."""

import concurrent.futures
import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pybind11

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent.parent
FOLDER = ROOT / "build" / "emulation"
INCLUDES = [HERE, ROOT / "csrc", pybind11.get_include(), sysconfig.get_paths()["include"]]
# Optimised for a short compilation. Fortified longjmp refuses to switch stacks.
FLAGS = ["-std=c++17", "-O1", "-g0", "-fPIC", "-fvisibility=hidden", "-ffp-contract=off", "-U_FORTIFY_SOURCE", "-Wall",
         "-Wextra", "-Wno-unknown-pragmas"]  # fmt: skip


def compiler():
    """The C++ compiler, or None."""
    return shutil.which(os.environ.get("CXX", "g++"))


def _digest(paths, *texts):
    h = hashlib.sha256(repr(texts).encode())
    for path in paths:
        h.update(f"{path.name}\0{path.stat().st_size}\0".encode() + path.read_bytes())
    return h.hexdigest()[:20]


def build(name, sources):
    """Path of a shared object of these sources; compiles what has changed since it, or they, were last compiled."""
    headers = sorted([*ROOT.glob("csrc/**/*.h"), *HERE.glob("**/*.h")])
    version = subprocess.run([compiler(), "--version"], capture_output=True, text=True, check=True).stdout
    common = (version, FLAGS, sys.version, pybind11.__version__)
    library = FOLDER / _digest([*sources, *headers], *common) / name
    if library.exists():
        return library
    objects = FOLDER / "objects"
    objects.mkdir(parents=True, exist_ok=True)

    def compile_one(source):
        obj = objects / f"{source.stem}-{_digest([source, *headers], *common)}.o"
        if not obj.exists():
            partial = obj.with_suffix(f".{os.getpid()}.tmp")
            command = [compiler(), *FLAGS, "-c", "-x", "c++", source, "-o", partial, *(f"-I{d}" for d in INCLUDES)]
            subprocess.run(command, check=True)
            partial.replace(obj)
        return obj

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count() or 2) as pool:
        linked = list(pool.map(compile_one, sources))
    library.parent.mkdir(parents=True, exist_ok=True)
    partial = library.with_suffix(f".{os.getpid()}.tmp")
    subprocess.run([compiler(), "-shared", "-o", partial, *linked], check=True)
    partial.replace(library)
    return library


def load():
    """The emulated `_cuda` module. Its attribute `control` is a library of the functions of control.cpp."""
    sources = sorted([*ROOT.glob("csrc/cuda/*.cu"), *ROOT.glob("csrc/cuda/*.cpp"), HERE / "control.cpp"])
    path = build(f"_cuda{sysconfig.get_config_var('EXT_SUFFIX')}", sources)
    spec = importlib.util.spec_from_file_location("emulated._cuda", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.control = ctypes.CDLL(str(path))
    module.control.emulation_last_launch_stream.restype = ctypes.c_uint64
    module.control.emulation_error.restype = ctypes.c_char_p
    return module
