"""Compile the project's Triton kernels, as its launchers launch them, for a GPU that is not there; one JSON line a kernel.

    python tests/gpu/compiled_kernels.py 80

The launchers run on fake tensors on "cuda"; a launch compiles (Triton's own `warmup`) in place of running. Triton ships ptxas
and cuobjdump, so neither CUDA nor a driver is needed. In a process of its own, without TRITON_INTERPRET.
"""

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

os.environ.pop("TRITON_INTERPRET", None)
sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).parent)]

import no_gpu
import torch
import triton
from torch._subclasses.fake_tensor import FakeTensorMode
from triton.backends.compiler import GPUTarget

import prlhf.kernels.triton as kernels
from prlhf.kernels.log_probs import log_probs

SHAPES = [(560, 4096, 50400, True), (1500, 4096, 128256, False), (560, 576, 49152, False)]  # N, D, V, with a bias


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, capability):
        self.capability = capability

    def get_current_target(self):
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self):
        return self.capability

    def get_current_stream(self, device):
        return 0


class Compile:
    """A kernel of which a launch compiles it."""

    def __init__(self, kernel, found):
        self.kernel, self.found = kernel, found

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            assert all(t.is_cuda for t in args if isinstance(t, torch.Tensor))
            plain = [t.dtype if isinstance(t, torch.Tensor) else t for t in args]
            compiled = self.kernel.warmup(*plain, grid=grid, **kwargs)
            self.found[id(compiled)] = self.kernel.__name__, compiled

        return launch


def resources(cubin: bytes) -> dict[str, int]:
    """Registers of a thread, and bytes of its stack, where what spills goes."""
    tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [tool, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {name: int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK")}


def main(capability: int) -> None:
    no_gpu.register()
    triton.runtime.driver.set_active(Driver(capability))
    found = {}
    for name in ("_fused_values", "_softmax_step", "_logits_gradient"):
        setattr(kernels, name, Compile(getattr(kernels, name), found))
    with FakeTensorMode():
        for N, D, V, bias in SHAPES:
            for dtype in (torch.bfloat16, torch.float32):
                h, w = (torch.empty(n, D, dtype=dtype, device="cuda", requires_grad=True) for n in (N, V))
                b = torch.empty(V, dtype=dtype, device="cuda", requires_grad=True) if bias else None
                t = torch.zeros(N, dtype=torch.long, device="cuda")
                log_probs(h, w, b, t).sum().backward()  # values, slopes and the head's gradients
                with torch.no_grad():
                    log_probs(h, w, b, t)  # values alone
    for name, compiled in found.values():
        print(json.dumps({"kernel": name, "shared": compiled.metadata.shared, **resources(compiled.asm["cubin"])}))


if __name__ == "__main__":
    main(int(sys.argv[1]))
