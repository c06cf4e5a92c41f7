"""Fake and pretended tensors on "cuda" through autograd, without a GPU. Needs g++, half a minute once."""

import ctypes
import hashlib
import os
import pathlib
import subprocess
import tempfile

import torch

SOURCE = pathlib.Path(__file__).with_name("guard.cpp")


def register() -> None:
    """Give autograd's engine a device guard for "cuda" that does nothing (guard.cpp)."""
    assert not torch.cuda.is_available()
    root = pathlib.Path(torch.__file__).parent
    key = hashlib.sha1((torch.__version__ + SOURCE.read_text() + str(root)).encode()).hexdigest()[:12]
    library = pathlib.Path(tempfile.gettempdir()) / f"no_gpu-{os.getuid()}-{key}.so"
    if not library.exists():
        aside = library.with_suffix(f".{os.getpid()}")
        places = [f"-I{root}/include", str(SOURCE), f"-L{root}/lib", "-lc10", "-ltorch_cpu", "-o", str(aside)]
        subprocess.run(["g++", "-std=c++20", "-O0", "-shared", "-fPIC", *places], check=True)
        aside.rename(library)
    ctypes.CDLL(str(library), ctypes.RTLD_GLOBAL).pretend()
    torch._C._ensureCUDADeviceGuardSet = lambda: None  # what FakeTensorMode enters would replace the guard
