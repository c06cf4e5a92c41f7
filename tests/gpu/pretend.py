"""A pretended GPU: tensors that say they are on "cuda", hold real values on the CPU, and follow CUDA's rules about devices.

Whole trainings, evaluations and generations run on it, with real numbers. Mixing devices raises what a GPU's kernels raise.
Copies, waits and operators are counted. Triton's kernels run in its interpreter, FlexAttention as attention with a dense mask.
"""

import collections
import contextlib
import sys
from collections.abc import Iterator

import no_gpu
import torch
import transformers.integrations.flex_attention as hf_flex
from torch.nn.attention.flex_attention import create_mask
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

import prlhf.kernels.triton as kernels

aten = torch.ops.aten
CUDA = torch.device("cuda", 0)
# Indices of these may be on the CPU where the indexed tensor is on the GPU: they are copied, which blocks.
INDEXED = {aten.index.Tensor, aten.index_put.default, aten.index_put_.default, aten._unsafe_index.Tensor}
INDEXED |= {aten._index_put_impl_.default}
COPIES = {aten._to_copy.default, aten.copy_.default, aten.copy.default}
WAITS = {aten._local_scalar_dense.default, aten.nonzero.default, aten._coalesce.default, aten.masked_select.default}
WAITS |= {aten._unique2.default, aten.equal.default, aten.is_nonzero.default}


class Counts:
    """What happened: operators on the GPU, and by line of prlhf copies that block, copies that do not, and waits."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.ops, self.blocking, self.flowing, self.waits = (collections.Counter() for _ in range(4))


counts = Counts()


def where() -> str:
    """The innermost line of prlhf that asks."""
    frame = sys._getframe(1)
    while frame is not None:
        _, package, name = frame.f_code.co_filename.rpartition("/prlhf/")
        if package:
            return f"{name}:{frame.f_lineno}"
        frame = frame.f_back
    return "elsewhere"


class CudaTensor(torch.Tensor):
    """A tensor on the pretended GPU."""

    @staticmethod
    def __new__(cls, real):
        options = {"dtype": real.dtype, "device": CUDA, "layout": real.layout, "requires_grad": False}
        if real.layout == torch.strided:
            options |= {"strides": real.stride(), "storage_offset": real.storage_offset()}
        self = torch.Tensor._make_wrapper_subclass(cls, real.shape, **options)
        self.host = real
        return self

    __torch_function__ = torch._C._disabled_torch_function_impl

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})

    def __repr__(self):
        return f"CudaTensor({self.host!r})"

    def tolist(self):
        counts.waits[where()] += 1
        return self.host.tolist()


def is_cuda(device) -> bool:
    return device is not None and torch.device(device).type == "cuda"


pinned: set[int] = set()  # addresses; pinned tensors are kept, so that no other gets one
kept = []


def dispatch(func, args, kwargs):
    """Do an operation on the real tensors, by CUDA's rules."""
    leaves = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    gpu = [t for t in leaves if isinstance(t, CudaTensor)]
    device = kwargs.get("device")
    if func is torch.ops.prim.device.default:
        return CUDA
    if kwargs.get("pin_memory"):
        tensor = func(*args, **kwargs | {"pin_memory": False})
        kept.append(tensor)
        pinned.add(tensor.untyped_storage().data_ptr())
        return tensor
    if not gpu and not is_cuda(device):
        return func(*args, **kwargs)
    to_gpu = is_cuda(device) if device is not None else bool(gpu)
    if func in COPIES:
        to_gpu = to_gpu if device is not None else isinstance(args[0], CudaTensor)
        count_copy(func, args, kwargs, device)
    else:
        check_devices(func, args, leaves, gpu)
        if func in WAITS:
            counts.waits[where()] += 1
        counts.ops[str(func)] += 1
    real_args, real_kwargs = tree_map(lambda t: t.host if isinstance(t, CudaTensor) else t, (args, kwargs))
    if device is not None:
        real_kwargs = {**real_kwargs, "device": torch.device("cpu")}
    out = compute(func, real_args, real_kwargs)
    if not to_gpu:
        return out.clone() if func is aten._to_copy.default and gpu and out is gpu[0].host else out
    own = {id(t.host): t for t in gpu}

    def wrapped(t):
        if not isinstance(t, torch.Tensor):
            return t
        return own[id(t)] if id(t) in own else CudaTensor(t)

    return tree_map(wrapped, out)


def count_copy(func, args, kwargs, device) -> None:
    source = args[0] if func is aten._to_copy.default else args[1]
    target_on_gpu = is_cuda(device) if func is aten._to_copy.default else isinstance(args[0], CudaTensor)
    if func is aten._to_copy.default and device is None or target_on_gpu == isinstance(source, CudaTensor):
        return
    asked = kwargs.get("non_blocking") or (func is not aten._to_copy.default and len(args) > 2 and args[2])
    flows = asked and target_on_gpu and source.untyped_storage().data_ptr() in pinned
    (counts.flowing if flows else counts.blocking)[where()] += 1


def check_devices(func, args, leaves, gpu) -> None:
    cpu = [t for t in leaves if not isinstance(t, CudaTensor) and t.dim() > 0]
    if func in INDEXED:
        indices = [t for t in tree_leaves(args[1]) if isinstance(t, torch.Tensor)]
        if gpu and not isinstance(args[0], CudaTensor):
            raise RuntimeError(f"{func}: indices should be on the same device as the indexed tensor (cpu)")
        counts.blocking[where()] += any(t.dim() and not isinstance(t, CudaTensor) for t in indices)
        counts.waits[where()] += any(isinstance(t, CudaTensor) and t.dtype == torch.bool for t in indices)
    elif gpu and cpu and func is not aten._fused_adamw_.default:
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, found cuda:0 and cpu ({where()})")


def compute(func, args, kwargs):
    """The operation on a CPU; two products that only a GPU has are written out."""
    if func is aten.mm.dtype:
        return args[0].to(args[2]) @ args[1].to(args[2])
    if func is aten.addmm.dtype_out:
        summand, a, b, dtype = args
        assert summand.dtype in (dtype, a.dtype) and a.dtype == b.dtype and kwargs["out"].dtype == dtype
        return kwargs["out"].copy_(summand.to(dtype) + a.to(dtype) @ b.to(dtype))
    return func(*args, **kwargs)


class PretendedGPU(TorchDispatchMode):
    supports_higher_order_operators = True

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return dispatch(func, args, kwargs or {})


class Launch:
    """One of Triton's kernels, launched with the real tensors in its interpreter."""

    def __init__(self, kernel):
        self.kernel = kernel

    def __getitem__(self, grid):
        def launch(*args, **kwargs):
            assert {isinstance(t, CudaTensor) for t in args if isinstance(t, torch.Tensor)} == {True}
            return self.kernel[grid](*(t.host if isinstance(t, CudaTensor) else t for t in args), **kwargs)

        return launch


def flex_attention(q, k, v, block_mask=None, scale=None, enable_gqa=False, **_):
    """FlexAttention with a dense mask; its rules of types and sizes are checked."""
    assert q.dtype == k.dtype == v.dtype and q.device == k.device == v.device
    R, _, T, _ = q.shape
    assert block_mask.shape[0] == R and block_mask.shape[-2:] == (T, T)
    dense = create_mask(block_mask.mask_mod, R, 1, T, T, device=q.device)
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense, scale=scale, enable_gqa=enable_gqa)
    return out, type("Aux", (), {"lse": torch.zeros((), device=q.device)})


@contextlib.contextmanager
def pretended_gpu() -> Iterator[Counts]:
    """Within the context, in a process of its own, tensors may be on "cuda"."""
    no_gpu.register()
    torch.cuda._lazy_init = lambda: None
    torch.compile = lambda function, **_: function
    hf_flex.compile_friendly_flex_attention = flex_attention
    for name in ("_fused_values", "_softmax_step", "_logits_gradient"):
        setattr(kernels, name, Launch(getattr(kernels, name)))
    torch.__future__.set_overwrite_module_params_on_conversion(True)  # Module.to makes new parameters
    torch._C._set_only_lift_cpu_tensors(True)  # torch.tensor(..., device="cuda") is made on the CPU and copied
    with torch.autograd.set_multithreading_enabled(False), PretendedGPU():
        yield counts
