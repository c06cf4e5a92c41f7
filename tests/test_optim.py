"""RowAdamW against torch.optim.AdamW on dense gradients, whose weights it must give for less work."""

import copy
import io
import math

import pytest
import torch
from helpers import random_comparisons, tiny_config, tiny_model
from torch.utils._python_dispatch import TorchDispatchMode

from prlhf.data.users import UserIndex
from prlhf.method.users import IndividualUsers
from prlhf.score.score import score
from prlhf.score.task import Task
from prlhf.store.runs import open_run
from prlhf.train import loop, row_adamw
from prlhf.train.optimizer import Optimizers, clip
from prlhf.train.row_adamw import NEGLECTED, RowAdamW, momentum_steps

ROWS, STEPS = 12, 300
BETAS = (0.9, 0.999)


def rate(step):
    """A learning rate that rises, falls and rises again."""
    return 1e-2 * (1.1 + torch.tensor(step / 20.0).sin().item())


def gradients_of(step, absent, shape=(2, 3), dtype=torch.float64):
    """Rows with a gradient at `step` and the gradient: none in some steps, a few of those that are not absent otherwise."""
    generator = torch.Generator().manual_seed(step)
    rows = torch.randperm(ROWS, generator=generator)[: step % 4]
    rows = torch.tensor([r for r in rows.tolist() if r not in absent(step)], dtype=torch.long)
    return rows, torch.randn(len(rows), *shape, generator=generator, dtype=dtype)


def never(step):
    """Row 0 never has a gradient; row 1 has one in early steps and in late ones only."""
    return {0, 1} if 20 < step < 290 else {0}


def started(total_steps=STEPS, shape=(2, 3), dtype=torch.float64, **more):
    table = torch.nn.Parameter(torch.randn(ROWS, *shape, generator=torch.Generator().manual_seed(99), dtype=dtype))
    return table, RowAdamW([table], total_steps, betas=BETAS, **more)


def take_step(table, optimizer, step, absent=never):
    rows, values = gradients_of(step, absent, table.shape[1:], table.dtype)
    table.grad = None
    if len(rows):
        table.grad = torch.sparse_coo_tensor(rows[None], values, table.shape, check_invariants=True)
    optimizer.param_groups[0]["lr"] = rate(step)
    optimizer.step()


def dense_adamw(steps, absent=never, shape=(2, 3), **more):
    """The oracle: torch's AdamW, every row at every step."""
    start, _ = started(shape=shape)
    table = torch.nn.Parameter(start.detach().clone())
    optimizer = torch.optim.AdamW([table], betas=BETAS, fused=False, foreach=False, **more)
    for step in range(steps):
        rows, values = gradients_of(step, absent, shape)
        table.grad = torch.zeros_like(table).index_copy(0, rows, values)
        optimizer.param_groups[0]["lr"] = rate(step)
        optimizer.step()
    return table.detach()


def far_apart(found, expected):
    return (found.detach() - expected).abs().flatten(1).max(1).values


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("shape", [(2, 3), (5,), ()])
def test_tables_are_those_of_dense_adamw(weight_decay, shape):
    """Rows with short gaps to rounding, one with a gap past the last momentum step to what is then neglected."""
    table, optimizer = started(weight_decay=weight_decay, shape=shape)
    for step in range(STEPS):
        take_step(table, optimizer, step)
    optimizer.catch_up(table)
    apart = (table.detach() - dense_adamw(STEPS, shape=shape, weight_decay=weight_decay)).abs().view(ROWS, -1).amax(1)
    assert apart[2:].max() < 1e-12
    assert apart[0] < 1e-12  # decay alone
    assert apart[1] < NEGLECTED * 2.1e-2  # the largest learning rate
    assert momentum_steps(*BETAS) < 290 - 20


def test_every_step_can_be_caught_up_with():
    """Not only at the end: the table after each of 60 steps is dense AdamW's after as many."""
    table, optimizer = started(weight_decay=0.1)
    for step in range(60):
        take_step(table, optimizer, step)
        optimizer.catch_up(table)
        if step % 7 == 0:
            assert far_apart(table, dense_adamw(step + 1, weight_decay=0.1)).max() < 1e-12


@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.5, 0.9), (0.99, 0.9999), (0.0, 0.999)])
def test_what_momentum_steps_leaves_out_is_as_small_as_is_said(betas):
    """The move that AdamW makes in all later steps, from the gradients for which it is largest, added up by torch."""
    K = momentum_steps(*betas)
    p = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))
    optimizer = torch.optim.AdamW([p], lr=1.0, betas=betas, weight_decay=0.0)
    history, at = 100, {}
    for step in range(history + 4 * K + 4):
        # |m| / sqrt(v) is largest where the gradient of i steps ago goes as (b1 / b2)^i
        ago = history - 1 - step
        p.grad = torch.full_like(p, (betas[0] / betas[1]) ** ago if ago >= 0 else 0.0)
        optimizer.step()
        at[step - history + 1] = p.item()
    assert abs(at[4 * K] - at[K]) <= NEGLECTED
    if K > 10:
        assert abs(at[4 * K] - at[K // 2]) > NEGLECTED  # and not needlessly many steps


def test_without_a_bound_no_step_is_neglected():
    assert momentum_steps(0.9, 0.8) == momentum_steps(0.9, 0.0) > 10**9
    assert momentum_steps(0.9, 0.999) == 194


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_in_how_many_parts_rows_catch_up_changes_no_bit(monkeypatch, dtype):
    """Nor does how much of it is computed at a time."""
    one, optimizer = started(dtype=dtype, shape=(17,))
    other, parts = started(dtype=dtype, shape=(17,))
    for step in range(STEPS):
        take_step(one, optimizer, step)
        rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1000 + step))[: step % 5]
        parts.catch_up(other, rows)
        take_step(other, parts, step)
    optimizer.catch_up(one)
    monkeypatch.setattr(row_adamw, "WORKING_SET", 600)  # three rows, some of their steps
    parts.catch_up(other)
    assert torch.equal(one, other)


def test_within_the_momentum_steps_parts_change_no_bit_of_weight_decay_either():
    tables = []
    for often in (False, True):
        table, optimizer = started(dtype=torch.float32, weight_decay=0.1)
        indices, ones = torch.arange(ROWS)[None], torch.ones_like(table)
        table.grad = torch.sparse_coo_tensor(indices, ones, table.shape, check_invariants=True)
        optimizer.step()
        for step in range(150):
            take_step(table, optimizer, step)
            if often:
                optimizer.catch_up(table, torch.tensor([0, 3, 7]))
        optimizer.catch_up(table)
        tables.append(table.detach())
    assert torch.equal(*tables)


def test_a_row_that_had_no_gradient_keeps_its_bits_without_decay():
    table, optimizer = started()
    before = table[0].detach().clone()
    for step in range(50):
        take_step(table, optimizer, step)
    optimizer.catch_up(table)
    assert torch.equal(table[0], before)


def test_a_saved_state_goes_on_bit_for_bit_without_catching_up():
    whole, optimizer = started(weight_decay=0.1, dtype=torch.float32)
    cut, first = started(weight_decay=0.1, dtype=torch.float32)
    for step in range(STEPS):
        take_step(whole, optimizer, step)
        if step < 140:
            take_step(cut, first, step)
    file = io.BytesIO()
    torch.save({"table": cut.detach(), "optimizer": first.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    table, second = started(weight_decay=0.1, dtype=torch.float32)
    with torch.no_grad():
        table.copy_(saved["table"])
    shapes = {name: (x.shape, x.dtype) for name, x in second.state[table].items()}
    second.load_state_dict(saved["optimizer"])
    assert shapes == {name: (x.shape, x.dtype) for name, x in second.state[table].items()}
    for step in range(140, STEPS):
        take_step(table, second, step)
    optimizer.catch_up(whole)
    second.catch_up(table)
    assert torch.equal(whole, table)
    for name, value in optimizer.state[whole].items():
        assert torch.equal(value, second.state[table][name]), name


def test_what_it_refuses():
    table, optimizer = started(total_steps=1)
    table.grad = torch.zeros_like(table)
    with pytest.raises(ValueError, match="dense"):
        optimizer.step()
    take_step(table, optimizer, 1)
    with pytest.raises(ValueError, match="total_steps=1"):
        take_step(table, optimizer, 2)
    table, optimizer = started(weight_decay=1000.0)
    with pytest.raises(ValueError, match="less than 1"):
        take_step(table, optimizer, 1)


@pytest.mark.parametrize("max_norm", [0.1, 1e3, float("inf")])
def test_clip_is_torchs(max_norm):
    def parameters():
        generator = torch.Generator().manual_seed(0)
        dense, table = (torch.nn.Parameter(torch.zeros(5, 3)) for _ in range(2))
        dense.grad = torch.randn(5, 3, generator=generator)
        rows = torch.tensor([[4, 1, 4]])  # row 4 twice
        table.grad = torch.sparse_coo_tensor(
            rows, torch.randn(3, 3, generator=generator), (5, 3), check_invariants=True
        )
        return dense, table, torch.nn.Parameter(torch.zeros(2))

    ours, theirs = parameters(), parameters()
    theirs[1].grad = theirs[1].grad.to_dense()
    expected = torch.nn.utils.clip_grad_norm_(theirs, max_norm)
    assert clip(ours, max_norm) == pytest.approx(expected.item(), rel=1e-6)
    assert ours[1].grad.is_sparse
    for p, q in zip(ours[:2], theirs):
        torch.testing.assert_close(p.grad.to_dense(), q.grad)


def test_kept_gradients_are_set_to_zero_where_they_lie():
    weight, table = torch.nn.Parameter(torch.ones(3)), torch.nn.Parameter(torch.ones(4, 2))
    dense = torch.optim.AdamW([{"params": [weight]}])
    optimizer = Optimizers(dense, RowAdamW([{"params": [table], "lr": 0.1, "weight_decay": 0.0}], total_steps=2))
    optimizer.zero_grad()
    assert weight.grad is None
    optimizer.keep_gradients()
    lies_at = weight.grad.data_ptr()
    for _ in range(2):
        rows = torch.nn.functional.embedding(torch.tensor([1]), table, sparse=True)
        (rows.sum() + (weight * torch.tensor([1.0, 2.0, 3.0])).sum()).backward()
        assert weight.grad.tolist() == [1, 2, 3]
        optimizer.zero_grad()
        assert (weight.grad.data_ptr(), weight.grad.tolist(), table.grad) == (lies_at, [0, 0, 0], None)
    weight.grad.fill_(math.nan)
    optimizer.zero_grad()
    assert weight.grad.tolist() == [0, 0, 0]


class DenseAdamW(Optimizers):
    """The training loop's optimiser as it would be without tables: torch's AdamW on densified gradients."""

    def __init__(self, config, model, total_steps):
        user = model.user_parameters()
        rest = [p for p in model.parameters() if all(p is not q for q in user)]
        groups = [
            {"params": rest, "base_lr": config.optim.lr, "weight_decay": config.optim.weight_decay},
            {"params": user, "base_lr": config.user_model.lr, "weight_decay": config.user_model.weight_decay},
        ]
        super().__init__(torch.optim.AdamW(groups, betas=(config.optim.beta1, config.optim.beta2)), None)

    def keep_gradients(self):
        pass

    def step(self):
        for p in self.parameters:
            p.grad = p.grad.to_dense()
        super().step()


@pytest.mark.parametrize("kind", ["individual", "cluster"])
def test_training_gives_the_weights_of_dense_adamw(monkeypatch, tmp_path, kind):
    """Two epochs of updates of two comparisons, with weight decay and evaluations in between."""
    weights = []
    for name in ("rows", "dense"):
        config = tiny_config(
            f"run_dir={tmp_path / name}", f"user_model.kind={kind}", "optim.batch_size=2", "optim.epochs=2",
            "user_model.lr=1e-2", "user_model.weight_decay=0.1", "optim.warmup_steps=4", "train.eval_every=8",
        )  # fmt: skip
        model, comparisons = tiny_model(config), random_comparisons(16)
        names = [str(c.user) for c in comparisons]
        task = Task(config, model, comparisons, score(model, comparisons, None, 4), None, names)
        if name == "dense":
            monkeypatch.setattr(loop, "make_optimizer", DenseAdamW)
        start = copy.deepcopy(model.state_dict())
        loop.train(open_run(config, "x"), UserIndex(["a", "b", "c", "d"]), task, task, "base")
        weights.append(model.state_dict())
        if name == "rows":  # gradients of what is dense are kept, as zeros
            tables = {id(table) for table in model.user_model.tables}
            assert not any(p.grad.any() for p in model.parameters() if p.numel() and id(p) not in tables)
    rows, dense = weights
    for key in dense:
        assert (rows[key] - dense[key]).abs().max() < 1e-9, key
    assert any((dense[key] - start[key]).abs().max() > 1e-3 for key in dense if key.startswith("user_model."))


class LargestAllocation(TorchDispatchMode):
    """The size in bytes of the largest tensor that operations make anew."""

    bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        def memory(tensors):
            return {
                t.untyped_storage().data_ptr(): t.untyped_storage().nbytes()
                for t in torch.utils._pytree.tree_leaves(tensors)
                if isinstance(t, torch.Tensor) and t.layout == torch.strided
            }

        before = memory((args, kwargs))
        out = function(*args, **(kwargs or {}))
        new = [size for pointer, size in memory(out).items() if pointer not in before]
        self.bytes = max([self.bytes, *new])
        return out


def test_an_update_makes_nothing_as_long_as_the_table():
    """The largest tensor of forward pass, backward pass, clipping and step, with and without rows to catch up."""
    largest = []
    for users in (10, 100_000):
        model = IndividualUsers(torch.randn(1, 8), torch.randn(users, 1, 8))
        optimizer = RowAdamW(model.tables, total_steps=20, weight_decay=0.1)
        with LargestAllocation() as seen:
            for step in range(20):
                batch = [1 + step % 2, 7, 0]
                optimizer.catch_up(model.tables[0], model.rows_of(batch))
                model(torch.tensor(batch)).square().sum().backward()
                clip(list(model.parameters()), 1.0)
                optimizer.step()
                optimizer.zero_grad()
        largest.append(seen.bytes)
    assert largest[0] == largest[1] < 10_000
