"""The preference tree, the plain rows and one-sequence-at-a-time Hugging Face agree in loss and every gradient."""

from collections import Counter

import pytest
import torch
import transformers
from helpers import (
    TOKENIZER,
    VOCABULARY,
    as_plain,
    assert_same,
    at_place,
    gradients,
    plain_backbone,
    random_comparisons,
    swapped,
    tiny_config,
    tiny_model,
    votes,
    with_tails,
)
from torch.nn.attention.flex_attention import create_mask, flex_attention
from torch.utils._python_dispatch import TorchDispatchMode

from prlhf.backbone import visible
from prlhf.backbone.attention import tree_block_mask, use_tree_attention
from prlhf.backbone.families import blocks
from prlhf.backbone.recompute import prepare_blocks
from prlhf.backbone.toys import random_backbone
from prlhf.batch.trees import PACK_MULTIPLE, Layout, collate, tree_mask
from prlhf.method.build import build_model
from prlhf.method.losses import log_ratio_margin, sigmoid_loss
from prlhf.method.plain import HERE, log_prob, p_dpo


def loss_of(policy, reference):
    return sigmoid_loss(log_ratio_margin(policy, reference), 0.3).mean()


def batch_of(model, comparisons):
    return model.collate(comparisons, [c.user for c in comparisons])


def layout_loss(model, comparisons):
    with model.as_reference():
        reference = model(model.collate(comparisons, None))
    return loss_of(model(batch_of(model, comparisons)), reference)


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("user_text", [False, True])
@pytest.mark.parametrize("recompute", ["none", "cheap", "every:2", "elementwise"])
def test_all_layouts_and_plain_sequences_agree(family, user_text, recompute):
    comparisons = random_comparisons(6, user_text=user_text)
    voters = [c._replace(user=1 + i) for i, c in enumerate(comparisons[:3])]
    comparisons += [*voters, *map(swapped, voters)]  # pairs judged by several users, and the other way round

    config, results = tiny_config(family=family), {}
    for layout, share in (("tree", True), ("tree", False), ("packed", True), ("packed", False), ("rows", True)):
        keys = (f"model.layout={layout}", f"model.share_trees={share}", f"model.recompute={recompute}")
        config = tiny_config(*keys, family=family)
        model = tiny_model(config).train()
        loss = layout_loss(model, comparisons)
        loss.backward()
        results[layout, share] = (loss.item(), gradients(model))

    model, backbone = tiny_model(config), plain_backbone(config)
    plain, sft = [as_plain(c) for c in comparisons], plain_backbone(config)
    loss = p_dpo(backbone, sft, model.user_model, plain, alpha=1.0, beta=0.3)
    loss.backward()
    expected = {f"backbone.{name}": g for name, g in gradients(backbone).items()} | gradients(model)

    for found_loss, found in results.values():
        assert found_loss == pytest.approx(loss.item(), abs=1e-10)
        assert_same(found, expected)
    assert all(g.abs().max() > 0 for g in expected.values())


class Counted(TorchDispatchMode):
    """How often each operation was computed."""

    def __init__(self):
        super().__init__()
        self.times = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.times[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("family, activation", [("llama", "silu"), ("gptj", "gelu")])
@pytest.mark.parametrize("rank", [0, 2])
def test_elementwise_checkpointing_computes_no_product_twice(family, activation, rank):
    """Per block: attention and the products of full fine-tuning as often as without, an activation once more; LoRA's B
    (one a target) again, but for the last one, behind which the block's backward pass needs nothing. Without, the MLP alone
    computes its activation again (`keep_less`), which has no part behind it to keep for GPT-J with LoRA."""
    comparisons = random_comparisons(2)

    def counts(*keys):
        config = tiny_config(*keys, f"lora.rank={rank}", "model.layers=3", family=family)
        model = tiny_model(config).train()
        outputs = model(batch_of(model, comparisons))
        with Counted() as backward:
            (outputs.chosen - outputs.rejected).sum().backward()
        products = sum(n for name, n in backward.times.items() if name in ("mm", "addmm", "bmm"))
        forward_attention = sum(n for name, n in backward.times.items() if name.endswith("for_cpu"))
        return products, forward_attention, backward.times[activation]

    without = counts()
    whole = counts("model.recompute=blocks")
    elementwise = counts("model.recompute=elementwise")
    again = {"llama": 6, "gptj": 5}[family] if rank else 0  # all linear layers of a block but the last
    assert without[1:] == (0, 0 if family == "gptj" and rank else 3)
    assert whole[0] > elementwise[0] == without[0] + 3 * again
    assert whole[1:] == (3, 3)
    assert elementwise[1:] == (0, 3)


def test_attention_keeps_one_mask_and_keys_as_they_are():
    """For its backward pass: one mask for all blocks, and of each block two key heads' keys and values, which four query
    heads read, beside the queries and the output."""
    model = tiny_model(tiny_config("model.layers=3", "model.heads=4", "model.width=64")).train()
    batch, found = batch_of(model, random_comparisons(2)), {}

    def note(t):
        if t.dim() == 4:
            found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
        model(batch)
    R, T = batch.input_ids_RT.shape
    rotary = {(R, 1, T, 16): 2}  # cosines and sines, for all blocks
    assert (
        Counter(tuple(t.shape) for t in found.values())
        == {(R, 1, T, T): 1, (R, 2, T, 16): 6, (R, 4, T, 16): 6} | rotary
    )


@pytest.mark.parametrize("family, kept", [("llama", 2), ("gptj", 1)])
@pytest.mark.parametrize("rank", [0, 2])
def test_the_mlp_keeps_its_first_products_alone(family, kept, rank):
    """Of what is as wide as the MLP: W_gate x and W_up x (GPT-J: W_in x), with LoRA the input of the last layer too, which
    A's gradient wants. As Hugging Face computes it, act(W_gate x) and the input of W_down besides."""

    def wide_ones(model, forward):
        weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
        found = {}

        def note(t):
            if t.shape[-1] == 4 * 64 and t.untyped_storage().data_ptr() not in weights:
                found[t.untyped_storage().data_ptr()] = t
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            outputs = forward()
        assert outputs is not None
        return len(found)

    config = tiny_config(f"lora.rank={rank}", "model.layers=3", "model.width=64", family=family)
    model, comparisons = tiny_model(config).train(), random_comparisons(2)
    assert wide_ones(model, lambda: model(batch_of(model, comparisons))) == 3 * (kept + (rank > 0))
    plain = random_backbone(config.model, VOCABULARY, 0)
    if family == "llama":
        assert wide_ones(plain, lambda: plain(torch.tensor([[5, 6, 7]])).logits) == 3 * 4


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_elementwise_checkpointing_drops_the_same_elements_again(family):
    """The gradients of LoRA with dropout are the same from the same seed, with and without."""
    comparisons, results = random_comparisons(2), []
    for keys in ((), ("model.recompute=elementwise",)):
        config = tiny_config("lora.rank=2", "lora.dropout=0.5", *keys, family=family)
        model = tiny_model(config).train()
        torch.manual_seed(0)
        outputs = model(batch_of(model, comparisons))
        (outputs.chosen - outputs.rejected).sum().backward()
        results.append(gradients(model))
    assert_same(*results)


def test_attention_with_dropout_is_computed_again():
    """Kept, it would not draw from the generator again, and dropouts behind it would drop other elements than before."""
    config = tiny_config("model.recompute=elementwise")
    for dropout, kept in ((0.0, True), (0.1, False)):
        model = random_backbone(config.model, VOCABULARY, 0)
        model.config.attention_dropout = dropout
        prepare_blocks(model, config.model, 0)
        keep = blocks(model)[0]._gradient_checkpointing_func.keywords["context_fn"].args[1]
        assert bool(keep) == kept


def test_gptj_sdpa_equals_hugging_faces_attention():
    """In float32, the type Hugging Face's own GPT-J attention computes in."""
    config = tiny_config(family="gptj")
    ids = torch.randint(3, 200, (2, 11), generator=torch.Generator().manual_seed(0))
    theirs, ours = (random_backbone(config.model, VOCABULARY, 0) for _ in range(2))
    with torch.no_grad():
        for p, q in zip(theirs.parameters(), ours.parameters()):
            p *= 5  # attention that is far from uniform
            q *= 5
        expected = theirs(ids).logits
        assert torch.allclose(use_tree_attention(ours)(ids).logits, expected, atol=1e-5 * expected.abs().max().item())


def test_tree_mask_by_hand():
    """Two positions of a prompt and two responses of one; another tree of a prompt and a response; padding."""
    seen_until = torch.tensor([[4, 4, 3, 4, 6, 6, 8, 8]])
    expected = [
        [1, 0, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0],
        [1, 1, 0, 1, 0, 0, 0, 0],  # the second response does not see the first
        [0, 0, 0, 0, 1, 0, 0, 0],  # the second tree does not see the first
        [0, 0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 0, 0, 1, 0],  # padding sees padding alone
        [0, 0, 0, 0, 0, 0, 1, 1],
    ]
    assert tree_mask(seen_until)[0, 0].int().tolist() == expected


PLACES = {
    "before_prompt": (),
    "prompt_end": ("user_model.place=prompt_end",),
    "response_end": ("user_model.place=response_end", "method=prm"),
}


def packed_at(place):
    """Comparisons, the users who read them (three share each fourth prompt), their packed row."""
    comparisons = with_tails(random_comparisons(30))
    comparisons += [c._replace(user=user) for c in comparisons[::4] for user in (1, 2, 3)]
    users = [c.user for c in comparisons]
    model = tiny_model(tiny_config("model.layout=packed", *PLACES[place]))
    return comparisons, users, model.collate(comparisons, users)


@pytest.mark.parametrize("place", PLACES)
def test_the_mask_of_a_packed_row_shows_each_reading_its_own_sequence(place):
    """The end of a response, or the last vector behind it, sees the tokens of the plain sequence in their order and its own
    reader's three vectors; every other position sees as many as its position id says. By position ids nothing is seen twice."""
    comparisons, users, batch = packed_at(place)
    mask_TT, ids_T, at_T = tree_mask(batch.seen_until_RT)[0, 0], batch.input_ids_RT[0], batch.positions_RT[0]
    reader = {int(at): int(user) for at_U, user in zip(batch.vectors_at_SU, batch.users_S) for at in at_U}
    for c, user, both in zip(comparisons, users, batch.chosen_rejected_B2):
        placed = at_place(c, place)
        if place == "before_prompt":
            placed = c._replace(prefix=[c.prefix[0], HERE, *c.prefix[1:]])
        for m, response in zip(both, (placed.chosen, placed.rejected)):
            seen = mask_TT[batch.last_at_M[m]].nonzero().flatten().tolist()
            expected = [t for token in (*placed.prefix, *response) for t in ([None] * 3 if token == HERE else [token])]
            assert [None if at in reader else int(ids_T[at]) for at in seen] == expected
            assert {reader[at] for at in seen if at in reader} == {user}
    real = batch.trees_RT[0] > 0
    assert torch.equal(mask_TT.sum(dim=1)[real], at_T[real] + 1)
    assert all(at_T[row].tolist() == [*range(int(row.sum()))] for row in mask_TT[real])
    assert len(set(batch.trees_RT[0].tolist())) < len(comparisons) and not real.all()


@pytest.mark.parametrize("place", PLACES)
def test_the_block_mask_is_the_dense_mask(place):
    """Position by position, and in what FlexAttention computes with its blocks (forward: on a CPU it has no backward)."""
    _, _, batch = packed_at(place)
    dense, blocks = tree_mask(batch.seen_until_RT), tree_block_mask(batch)
    T = dense.shape[-1]
    assert T > 2 * PACK_MULTIPLE and blocks.sparsity() > 0  # some blocks are left out
    assert torch.equal(create_mask(blocks.mask_mod, 1, 1, T, T, device="cpu"), dense)
    q, k, v = torch.randn(3, 1, 2, T, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = flex_attention(q, k, v, block_mask=blocks)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=dense)
    assert (found - expected).abs().max() < 1e-12


def explicit_attention(query, key, value, mask):
    """softmax(Q K^T / sqrt(d) + mask) V, keys and values repeated for the query heads that read them."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
    return (query @ key.mT / query.shape[-1] ** 0.5 + mask).softmax(dim=-1) @ value


@pytest.mark.parametrize("heads", [2, 6], ids=["each has its key", "three read a key"])
def test_attention_over_what_is_visible_is_attention(heads):
    """Output and gradients, on rows of trees with padding, in float64; fewer than half of the pairs are computed."""
    model = tiny_model(tiny_config("model.layout=packed"))
    rows = [batch_of(model, random_comparisons(30, seed=seed)).seen_until_RT[0, :500] for seed in (0, 1)]
    seen = tree_mask(torch.stack(rows))
    mask = torch.zeros(seen.shape, dtype=torch.float64).masked_fill(~seen, -torch.inf)
    (R, _, T, _), generator = mask.shape, torch.Generator().manual_seed(0)
    q, k, v, weights = (
        torch.randn(R, H, T, 16, dtype=torch.float64, generator=generator) for H in (heads, 2, 2, heads)
    )
    assert visible.takes(q, k, v, mask, dropout=0.0) and T % visible.BLOCK
    assert sum(part.mask_11QK.numel() for part in visible.blocks(mask)) < R * T * T / 2
    results = []
    for attend in (lambda *given: visible.visible_attention(*given, None), explicit_attention):
        inputs = [t.clone().requires_grad_() for t in (q, k, v)]
        output = attend(*inputs, mask)
        results.append([output, *torch.autograd.grad((output * weights).sum(), inputs)])
    for found, expected in zip(*results):
        assert (found - expected).abs().max() < 1e-12


def test_what_visible_attention_does_not_take():
    """Dropout, a mask that hides nothing by -inf (layout rows has finite ones), masks of heads, and cached keys."""
    q = torch.randn(1, 2, 150, 16)
    causal = torch.zeros(1, 1, 150, 150).masked_fill(~torch.ones(150, 150).tril().bool(), -torch.inf)
    assert visible.takes(q, q, q, causal, 0.0)
    assert not visible.takes(q, q, q, causal, 0.1)
    assert not visible.takes(q, q, q, causal.clamp(min=-1e30), 0.0)
    assert not visible.takes(q, q, q, causal.expand(1, 2, 150, 150), 0.0)
    assert not visible.takes(q[:, :, :70], q, q, causal[:, :, :70], 0.0)
    assert not visible.takes(q.half(), q.half(), q, causal, 0.0)
    assert not visible.takes(q.half(), q.half(), q.half(), causal.half(), 0.0)
    assert not visible.takes(
        q.mT.contiguous().mT, q, q, causal, 0.0
    )  # torch's kernel would read it as if it were contiguous
    assert not visible.takes(q, q, q, causal.clone().requires_grad_(), 0.0)
    short = [q[:, :, : 2 * visible.BLOCK]] * 3
    assert not visible.takes(*short, causal[..., : 2 * visible.BLOCK, : 2 * visible.BLOCK], 0.0)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="FlexAttention's backward pass needs a GPU")
@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_packed_rows_on_a_gpu_are_trees(family):
    comparisons, results = random_comparisons(40), []
    for layout in ("packed", "tree"):
        keys = (f"model.layout={layout}", "model.width=64", "model.log_probs=chunked")
        model = build_model(tiny_config(*keys, family=family), TOKENIZER, 4).cuda()
        model.user_slot = 1
        out = model(batch_of(model, comparisons))
        (out.chosen - out.rejected).sum().backward()
        results.append([out.chosen, *(p.grad for p in model.parameters() if p.grad is not None)])
    for packed, tree in zip(*results):
        assert torch.allclose(packed, tree, rtol=1e-3, atol=1e-3 * tree.abs().max().item())


def test_a_tree_by_hand():
    (c,) = random_comparisons(1)
    c = c._replace(prefix=[1, 10, 11], chosen=[20, 21, 2], rejected=[30, 2])
    batch = collate([c], [4], Layout("tree", vectors=2, slot=1))
    assert batch.input_ids_RT.tolist() == [[1, 0, 0, 10, 11, 20, 21, 2, 30, 2]]
    assert batch.vectors_at_SU.tolist() == [[1, 2]] and batch.users_S.tolist() == [4]
    assert batch.seen_until_RT.tolist() == [[10, 10, 10, 10, 10, 8, 8, 8, 10, 10]]
    assert batch.positions_RT.tolist() == [[0, 1, 2, 3, 4, 5, 6, 7, 5, 6]]
    assert batch.predicted_at_N.tolist() == [4, 5, 6, 4, 8]  # both first tokens are predicted at the prefix's end
    assert batch.targets_N.tolist() == [20, 21, 2, 30, 2]
    assert batch.reading_N.tolist() == [0, 0, 0, 1, 1]
    assert batch.last_at_M.tolist() == [7, 9]


def test_what_is_read_alike_is_there_once():
    pair = votes(1, 2, 1, 2)
    by_user = collate(pair, [1, 2, 1, 2], Layout(vectors=3, slot=1))
    assert len(by_user.input_ids_RT) == 2 and by_user.users_S.tolist() == [1, 2]
    assert by_user.chosen_rejected_B2.tolist() == [[0, 1], [2, 3], [0, 1], [2, 3]]
    generic = collate(pair, [0] * 4, Layout(vectors=3, slot=1))
    assert len(generic.input_ids_RT) == 1 and len(generic.readings) == 2
    behind = collate(pair, [1, 2, 1, 2], Layout())  # the backbone does not read the user: one tree, two readers
    assert len(behind.input_ids_RT) == 1 and behind.users_M.tolist() == [1, 1, 2, 2]
    assert behind.last_at_M[0] == behind.last_at_M[3] and behind.last_at_M[1] == behind.last_at_M[2]
    alone = collate(pair, [0] * 4, Layout(vectors=3, slot=1, share=False))
    assert len(alone.input_ids_RT) == 4 and len(alone.readings) == 8


def test_responses_to_one_prompt_share_trees_of_limited_length():
    c = random_comparisons(1)[0]._replace(prefix=[1, 5])
    same_prompt = [c._replace(chosen=[10 + i] * 60, rejected=[20 + i] * 60) for i in range(4)]
    batch = collate(same_prompt, [0] * 4)
    assert batch.input_ids_RT.shape == (2, 242)  # four responses of 60 tokens each fit 256
    assert collate(same_prompt, [0] * 4, Layout("rows")).input_ids_RT.shape == (8, 62)
    assert collate(same_prompt, [0] * 4, Layout("packed")).input_ids_RT.shape == (1, 512)


def test_changing_one_response_leaves_the_other_alone():
    model = tiny_model(tiny_config())
    first, second = random_comparisons(2)
    other = first._replace(chosen=second.chosen)
    a, b = (model(model.collate([c], [1])) for c in (first, other))
    assert a.rejected.item() == pytest.approx(b.rejected.item(), abs=1e-12)
    assert a.chosen.item() != pytest.approx(b.chosen.item(), abs=1e-3)


@pytest.mark.parametrize("family", ["Qwen2", "Qwen3", "Mistral"])
def test_other_llama_like_families_take_the_tree(family):
    """In float32, as these models compute parts of themselves in it: tree against single sequences."""
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, head_dim=16)
    config_class = getattr(transformers, f"{family}Config")
    model_config = config_class(vocab_size=VOCABULARY, num_key_value_heads=1, **shape)
    torch.manual_seed(0)
    backbone = getattr(transformers, f"{family}ForCausalLM")(model_config).eval()
    with torch.no_grad():
        for p in backbone.parameters():
            p *= 3  # attention that is far from uniform
    model = build_model(tiny_config(), TOKENIZER, 4, backbone)
    model.user_slot = 1
    comparisons = random_comparisons(4)
    found = model(batch_of(model, comparisons))
    for b, c in enumerate(comparisons):
        vectors = model.user_model(torch.tensor([c.user]))[0]
        expected = log_prob(backbone, c.prefix, c.rejected, [], vectors)
        assert found.rejected[b].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-4)


@pytest.mark.parametrize("family", ["llama", "gptj"])
@pytest.mark.parametrize("aggregator", ["soft_prompt", "linear"])
def test_bfloat16_weights_give_float32_log_probs_near_the_float32_models(family, aggregator):
    overrides = ("lora.rank=2", f"user_model.aggregator={aggregator}")
    models = []
    for dtype in ("float32", "bfloat16"):
        config = tiny_config(*overrides, f"model.dtype={dtype}", family=family)
        models.append(build_model(config, TOKENIZER, 4))
        models[-1].user_slot = 1
    comparisons = random_comparisons(6)
    exact, rounded = (model(batch_of(model, comparisons)) for model in models)
    assert rounded.chosen.dtype == torch.float32
    assert torch.allclose(exact.chosen, rounded.chosen, rtol=0.01, atol=0.05)
    rounded.chosen.sum().backward()
    for p in models[1].user_parameters():
        assert p.grad.dtype == torch.float32 and torch.isfinite(p.grad.to_dense()).all()
