"""The three implementations of log-probs against float64 and against torch as one would write it, at odd shapes."""

from importlib import import_module
from importlib.util import find_spec

import pytest
import torch

from prlhf.errors import UserError
from prlhf.kernels import chunked
from prlhf.kernels import log_probs as logprobs
from prlhf.kernels.log_probs import IGNORED, log_probs

SHAPES = [(5, 7, 11), (70, 33, 300), (37, 65, 1031)]  # positions, width, vocabulary: sizes that divide by nothing
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the kernels compiled, or through Triton's interpreter
TRITON = pytest.param("triton", marks=pytest.mark.skipif(find_spec("triton") is None, reason="no Triton here"))
COMPUTED = ["chunked", TRITON]  # what is not the readable one
TYPES = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch):
    """Several chunks and tiles, and ragged last ones, at these sizes."""
    monkeypatch.setattr(chunked, "CHUNK_LOGITS", 5000)
    monkeypatch.setattr(logprobs, "KEPT_SLOPES", 800)
    monkeypatch.setattr(logprobs, "RECOMPUTED", 30)
    if find_spec("triton"):
        kernels = import_module("prlhf.kernels.triton")
        for name, size in (("ROWS", 16), ("TILE", 512), ("BLOCK_N", 16), ("BLOCK_V", 64), ("BLOCK_D", 32)):
            monkeypatch.setattr(kernels, name, size)


def inputs(shape, dtype, bias, device=DEVICE):
    """Hidden states, weight, bias and targets with peaked and flat distributions, and incoming gradients."""
    N, D, V = shape
    generator = torch.Generator().manual_seed(N)
    hidden = torch.randn(N, D, generator=generator) * torch.linspace(0.1, 3, N)[:, None]
    weight = torch.randn(V, D, generator=generator) / D**0.5
    tensors = [hidden, weight, torch.randn(V, generator=generator) if bias else None]
    targets = torch.randint(V, (N,), generator=generator)
    targets[::2] = (hidden @ weight.T).argmax(dim=1)[::2]  # likely ones, with small slopes
    tensors = [None if t is None else t.to(dtype).to(device) for t in tensors]
    return tensors, targets.to(device), torch.randn(N, generator=generator).to(device)


def computed(tensors, targets, grad, function):
    """log p and the gradients for hidden states, weight and bias."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in tensors]
    log_p = function(*leaves, targets)
    log_p.backward(grad.to(log_p))
    return [log_p.detach(), *(leaf.grad for leaf in leaves if leaf is not None)]


def as_one_writes_it(hidden, weight, bias, targets):
    """In the inputs' own type."""
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits.float().log_softmax(dim=-1)[torch.arange(len(targets)), targets]


def in_float64(hidden, weight, bias, targets):
    bias = None if bias is None else bias.double()
    logits = hidden.double() @ weight.double().T + (0 if bias is None else bias)
    return logits.log_softmax(dim=-1)[torch.arange(len(targets)), targets]


def errors(found, exact):
    return [((f.double() - e.double()).norm() / e.double().norm()).item() for f, e in zip(found, exact)]


def impl(name):
    return lambda *arguments: log_probs(*arguments, impl=name)


@pytest.mark.parametrize("name", COMPUTED)
@pytest.mark.parametrize("dtype", TYPES, ids=str)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_errors_are_no_larger_than_those_of_torch_at_the_same_type(name, dtype, bias, shape):
    """Values, and gradients of hidden states, weight and bias, by norm.

    At half precision torch rounds every logit and its gradient, and is never better. In float32 what is left is the order of
    sums, so a factor of 2 is allowed; and 1.5 beside torch on inputs widened to float32 first (the readable one), for values
    and the hidden states' gradient. The head's gradient rounds that of the logits, as torch at half precision does.
    """
    tensors, targets, grad = inputs(shape, dtype, bias)
    exact = computed([None if t is None else t.double() for t in tensors], targets, grad, in_float64)
    found = errors(computed(tensors, targets, grad, impl(name)), exact)
    plain = errors(computed(tensors, targets, grad, as_one_writes_it), exact)
    readable = errors(computed(tensors, targets, grad, impl("torch")), exact)
    factor = 2.0 if dtype == torch.float32 else 1.0
    assert all(f <= factor * p for f, p in zip(found, plain)), (found, plain)
    assert all(f <= 2e-7 + 1.5 * r for f, r in zip(found[:2], readable[:2])), (found, readable)
    assert found[0] < 1e-6  # half-precision inputs round no logit


@pytest.mark.parametrize("name", ["torch", "chunked"])
@pytest.mark.parametrize("bias", [False, True])
def test_float64_is_exact(name, bias):
    tensors, targets, grad = inputs(SHAPES[1], torch.float64, bias)
    exact = computed(tensors, targets, grad, in_float64)
    for found, expected in zip(computed(tensors, targets, grad, impl(name)), exact):
        assert torch.allclose(found, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["torch", "chunked"])
@pytest.mark.parametrize("bias", [False, True])
def test_capped_logits_in_float64(name, bias):
    """c tanh(z / c) as Gemma 2 has it, written out: values and the gradients of hidden states, weight and bias."""
    tensors, targets, grad = inputs(SHAPES[1], torch.float64, bias)

    def capped(hidden, weight, bias, targets):
        logits = hidden @ weight.T + (0 if bias is None else bias)
        return (1.5 * torch.tanh(logits / 1.5)).log_softmax(dim=-1)[torch.arange(len(targets)), targets]

    exact = computed(tensors, targets, grad, capped)
    found = computed(tensors, targets, grad, lambda *arguments: log_probs(*arguments, impl=name, softcap=1.5))
    for one, expected in zip(found, exact):
        assert torch.allclose(one, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", ["torch", *COMPUTED])
@pytest.mark.parametrize("dtype", TYPES, ids=str)
def test_values_without_a_gradient_are_those_with_one(name, dtype):
    """At half precision Triton has a kernel of its own for them."""
    (hidden, weight, bias), targets, _ = inputs(SHAPES[1], dtype, True)
    with torch.no_grad():
        alone = log_probs(hidden, weight, bias, targets, name)
    trained = log_probs(hidden.requires_grad_(), weight, bias, targets, name)
    assert torch.allclose(alone, trained.detach(), atol=1e-5)


@pytest.mark.parametrize("name", ["torch", *COMPUTED])
def test_a_frozen_head_gets_no_gradient_and_a_frozen_backbone_none_either(name):
    (hidden, weight, _), targets, grad = inputs(SHAPES[0], torch.float32, False)
    log_probs(hidden.requires_grad_(), weight, None, targets, name).backward(grad)
    assert weight.grad is None and hidden.grad is not None
    hidden = hidden.detach()
    log_probs(hidden, weight.requires_grad_(), None, targets, name).backward(grad)
    assert weight.grad is not None and hidden.grad is None


@pytest.mark.parametrize("name", ["torch", *COMPUTED])
def test_ignored_positions_count_nothing(name):
    (hidden, weight, bias), targets, _ = inputs(SHAPES[1], torch.float32, True)
    ignored = targets.clone()
    ignored[::3] = IGNORED
    kept = ignored != IGNORED
    found = computed((hidden, weight, bias), ignored, torch.ones(len(targets), device=DEVICE), impl(name))
    expected = computed(
        (hidden[kept], weight, bias), targets[kept], torch.ones(int(kept.sum()), device=DEVICE), impl("torch")
    )
    assert torch.all(found[0][~kept] == 0) and torch.all(found[1][~kept] == 0)
    assert torch.allclose(found[0][kept], expected[0], atol=1e-5)
    for one, other in zip((found[1][kept], *found[2:]), expected[1:]):
        assert torch.allclose(one, other, atol=1e-4)


@pytest.mark.parametrize("name", ["torch", *COMPUTED])
def test_no_positions_at_all(name):
    (hidden, weight, bias), targets, _ = inputs(SHAPES[0], torch.float32, True)
    found = computed((hidden[:0], weight, bias), targets[:0], torch.ones(0, device=DEVICE), impl(name))
    assert found[0].shape == (0,) and all(torch.all(g == 0) for g in found[1:])


@pytest.mark.parametrize("name", COMPUTED)
def test_no_tensor_of_all_logits_is_made(name):
    """The bytes of the largest tensor that any operation returns, forward and backward."""
    (hidden, weight, bias), targets, grad = inputs((150, 16, 1031), torch.float32, True)

    class Largest(torch.utils._python_dispatch.TorchDispatchMode):
        found = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            out = function(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.found = max(self.found, tensor.nbytes)
            return out

    with Largest() as largest:
        computed((hidden, weight, bias), targets, grad, impl(name))
    all_logits = len(hidden) * len(weight) * hidden.itemsize
    assert weight.nbytes <= largest.found < all_logits / 4

    with Largest() as largest:
        computed((hidden, weight, bias), targets, grad, impl("torch"))
    assert largest.found >= all_logits  # what the readable one does, so the measure measures


def test_bad_arguments_are_named(monkeypatch):
    (hidden, weight, _), targets, _ = inputs(SHAPES[0], torch.float32, False)
    with pytest.raises(ValueError, match="impl 'flash': expected one of torch, chunked, triton"):
        log_probs(hidden, weight, None, targets, "flash")
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    if DEVICE == "cpu":
        with pytest.raises(UserError, match="model.log_probs: found 'triton'"):
            log_probs(hidden, weight, None, targets, "triton")


@pytest.mark.skipif(find_spec("triton") is None, reason="no Triton here")
def test_inputs_that_the_kernels_do_not_take_are_named():
    (hidden, weight, _), targets, _ = inputs(SHAPES[0], torch.float32, False)
    with pytest.raises(ValueError, match="float64"):
        log_probs(hidden.double(), weight.double(), None, targets, "triton")
    with pytest.raises(ValueError, match="width 6, weight of width 7"):
        log_probs(hidden[:, :-1], weight, None, targets, "triton")
