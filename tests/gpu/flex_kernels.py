"""FlexAttention's forward and backward kernels for a GPU that is not there, compiled; one JSON line a kernel.

    python tests/gpu/flex_kernels.py 80 64 128

Inductor writes their source for fake tensors on "cuda", Triton compiles it (`compiled_kernels` has how). In bfloat16, for rows
of any length and the preference tree's mask, heads of these widths. In a process of its own, since it changes torch.
"""

import functools
import importlib.util
import json
import re
import sys
import tempfile
import types

import no_gpu
import torch
import triton
from compiled_kernels import Driver, resources

no_gpu.register()

import torch._functorch.config as functorch_config
import torch._inductor.compile_fx as compile_fx
import torch._inductor.config as inductor_config
import torch._inductor.fx_passes.joint_graph as joint_graph
import torch._inductor.fx_passes.post_grad as post_grad
import torch._inductor.graph as inductor_graph
import torch._inductor.runtime.triton_heuristics as heuristics
import torch._subclasses.fake_tensor as fake_tensor
import torch.utils._triton
from torch._dynamo import device_interface
from torch.nn.attention.flex_attention import AuxRequest, create_block_mask, flex_attention
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from prlhf.backbone.attention import WIDE, WIDE_WARPS
from prlhf.batch.trees import sees

SHARED = {80: 166912, 90: 232448}
HEADS = {64: (8, 8), 128: (32, 8), 256: (16, 16)}  # width: query and key heads, as in small models, Llama 3, GPT-J


class Written(Exception):
    """The source is there; it cannot run."""


def pretend(capability: int) -> None:
    """Let torch see a GPU."""
    major, minor = divmod(capability, 10)
    properties = types.SimpleNamespace(
        name="GPU", major=major, minor=minor, multi_processor_count=108, total_memory=80 << 30, warp_size=32,
        shared_memory_per_block_optin=SHARED[capability], shared_memory_per_block=49152, L2_cache_size=40 << 20,
        shared_memory_per_multiprocessor=SHARED[capability] + 1024, regs_per_multiprocessor=65536, gcnArchName="", uuid="0",
        max_threads_per_multi_processor=2048, max_threads_per_block=1024, is_integrated=0, is_multi_gpu_board=0,
    )  # fmt: skip
    state = torch.zeros(16, dtype=torch.uint8)
    answers = {
        "is_available": True, "device_count": 1, "current_device": 0, "get_device_capability": (major, minor), "init": None,
        "get_device_properties": properties, "get_device_name": "GPU", "is_initialized": True, "_lazy_init": None,
        "synchronize": None, "_exchange_device": 0, "_maybe_exchange_device": 0, "is_bf16_supported": True,
        "get_rng_state": state, "set_rng_state": None, "get_arch_list": ["sm_80", "sm_90"],
    }  # fmt: skip
    for name, answer in answers.items():
        setattr(torch.cuda, name, lambda *_, answer=answer, **__: answer)
    torch.cuda.random.current_device = lambda: 0
    torch.version.cuda = torch.version.cuda or "13.0"
    torch.utils._triton.has_triton = lambda: True
    interface = device_interface.CudaInterface
    interface.is_available = interface.is_triton_capable = staticmethod(lambda *_, **__: True)
    interface.get_compute_capability = staticmethod(lambda *_: capability)
    interface.get_device_properties = interface.Worker.get_device_properties = staticmethod(lambda *_, **__: properties)
    interface.raise_if_triton_unavailable = staticmethod(lambda *_, **__: None)
    interface.Worker.current_device = staticmethod(lambda: 0)
    fake_tensor.init_gpu_context = lambda device: None
    driver = Driver(capability)
    driver.get_active_torch_device = lambda: torch.device("cuda", 0)
    driver.map_python_to_cpp_type = lambda kind: kind
    driver.get_current_device, driver.get_current_stream = lambda: 0, lambda device=0: 0
    triton.runtime.driver.set_active(driver)


def writing_backend(sources: list[str]):
    """Inductor that writes its sources into a list, and gives back outputs without values."""
    joint_graph.lazy_init = post_grad.lazy_init = lambda *_, **__: None  # they trace real tensors

    def write(graph):
        code, _ = graph.codegen()
        sources.append(getattr(code, "value", None) or str(code))
        raise Written

    inductor_graph.GraphLowering.compile_to_module = write
    own = compile_fx.compile_fx_inner

    def inner(graph, inputs, **options):
        try:
            return own(graph, inputs, **options)
        except Exception as error:
            chain = [error]
            while chain[-1] is not None:
                chain.append(chain[-1].__cause__ or chain[-1].__context__)
            if not any(isinstance(link, Written) for link in chain):
                raise
        outputs = next(node for node in graph.graph.nodes if node.op == "output").args[0]

        def run(_):
            return [o.meta["val"] if hasattr(o, "meta") and "val" in o.meta else o for o in outputs]

        run._boxed_call = True
        return run

    return functools.partial(compile_fx.compile_fx, inner_compile=inner)


def compiled(name: str, code: str, capability: int):
    """A template kernel of Inductor's source, compiled by Triton."""
    found = {}

    def template(num_stages, num_warps, triton_meta, **_):
        return lambda function: found.update(fn=function, meta=triton_meta, stages=num_stages, warps=num_warps)

    own, heuristics.template = heuristics.template, template
    with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:
        file.write(code)
    try:
        spec = importlib.util.spec_from_file_location(name, file.name)
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    finally:
        heuristics.template = own
    meta = found["meta"]
    source = ASTSource(found["fn"], meta["signature"], meta["constants"], meta["configs"][0])
    options = {"num_warps": found["warps"], "num_stages": found["stages"], "debug": False}
    return triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)


def main(capability: int, *widths: int) -> None:
    pretend(capability)
    inductor_config.compile_threads, inductor_config.fx_graph_cache = 1, False
    functorch_config.enable_autograd_cache = False
    sources: list[str] = []
    backend = writing_backend(sources)
    for width in widths:
        H, Hkv = HEADS[width]
        options = {"bwd_num_warps": WIDE_WARPS} if width >= WIDE else {}
        torch._dynamo.reset()
        sources.clear()
        with fake_tensor.FakeTensorMode(allow_non_fake_inputs=True):
            seen_until = torch.zeros(1, 3072, dtype=torch.long, device="cuda")

            def mask(row, _, query, key, seen_until=seen_until):
                return sees(seen_until, row, query, key)

            blocks = create_block_mask(mask, 1, None, 3072, 3072, device="cuda")
            q, k, v = (
                torch.empty(1, 3072, h, width, dtype=torch.bfloat16, device="cuda", requires_grad=True).transpose(1, 2)
                for h in (H, Hkv, Hkv)
            )
            run = torch.compile(flex_attention, backend=backend, dynamic=True)
            more = {"enable_gqa": True, "kernel_options": options, "return_aux": AuxRequest(lse=True)}
            out, _ = run(q, k, v, block_mask=blocks, **more)
            out.sum().backward()
        pattern = r"async_compile\.triton\('(\w+)', '''\n(.*?)\n''', device_str='cuda'\)"
        for name, code in (both for source in sources for both in re.findall(pattern, source, re.S)):
            if "_tem_" in name:
                kernel = compiled(name, code, capability)
                which = "backward" if "backward" in name else "forward"
                used = {"shared": kernel.metadata.shared, **resources(kernel.asm["cubin"])}
                print(json.dumps({"width": width, "kernel": which, **used}), flush=True)


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
