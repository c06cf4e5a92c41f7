"""What a model cannot read at its place is refused: beyond its positions, its window, or where a row depends on others."""

import pytest
import torch
from helpers import TOKENIZER, random_comparisons, tiny_config
from transformers import (
    AutoModelForCausalLM,
    DogeConfig,
    Llama4TextConfig,
    LlamaConfig,
    MistralConfig,
    Phi3Config,
    PhimoeConfig,
)

from prlhf.backbone.families import check_positions
from prlhf.backbone.loading import load_backbone
from prlhf.batch.datasets import Dataset
from prlhf.batch.tokens import EncodingReport
from prlhf.errors import UserError
from prlhf.generate.decode import Decoding, Request, generate
from prlhf.method.build import build_model
from prlhf.score.score import score
from prlhf.score.task import prepare_task

SHAPE = {
    "vocab_size": len(TOKENIZER), "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "pad_token_id": 0,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64,
}  # fmt: skip
LONG = {"rope_type": "longrope", "rope_theta": 100.0, "short_factor": [1.0] * 4, "long_factor": [1.0, 4.0, 8.0, 16.0]}
ORIGINAL = {"original_max_position_embeddings": 16}
MSCALE = {"short_mscale": 1.0, "long_mscale": 1.3}
LONGROPE = {
    "phi3": Phi3Config(**SHAPE, **ORIGINAL, rope_parameters=dict(LONG)),
    "phimoe": PhimoeConfig(**SHAPE, rope_parameters={**LONG, **ORIGINAL, **MSCALE}, num_local_experts=2),
    "llama": LlamaConfig(**SHAPE, rope_parameters={**LONG, **ORIGINAL}),
}


def backbone_of(config):
    """A random model with weights so large that what attention does shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for weight in model.parameters():
            if weight.dim() > 1:
                weight *= 10
    return model


def test_rows_leave_windows_to_the_model():
    """A Mistral of window 6 on sequences of 20: its own forward pass alone, eager, which the other layouts do not compute."""
    model = backbone_of(MistralConfig(**SHAPE, sliding_window=6, attn_implementation="eager"))
    pairs = random_comparisons(1)
    pairs = [c._replace(prefix=c.prefix * 6, reference_prefix=c.prefix * 6, user=0) for c in pairs]
    ids = [[*c.prefix, *c.chosen] for c in pairs]
    at = slice(len(pairs[0].prefix) - 1, -1)
    with torch.no_grad():
        logits = model(torch.tensor(ids)).logits[0, at].double()
    expected = logits.log_softmax(-1)[range(len(pairs[0].chosen)), pairs[0].chosen].sum().item()
    uniform = ("user_model.kind=uniform", "user_model.tokens=0")
    rows = build_model(tiny_config(*uniform, "model.layout=rows"), TOKENIZER, 4, model)
    assert score(rows, pairs, [0], 4).chosen.item() == pytest.approx(expected, abs=1e-3)
    with pytest.raises(UserError, match="the model reads 6"):
        score(build_model(tiny_config(*uniform), TOKENIZER, 4, model), pairs, [0], 4)


def logits_of_a_short_row(model, beside):
    """Of 10 tokens, in a right-padded batch with a row of `beside` tokens: by Hugging Face's own forward pass."""
    ids = torch.arange(1, 1 + 2 * beside).view(2, beside) % 97
    mask = torch.ones(2, beside, dtype=torch.long)
    mask[0, 10:] = 0
    positions = torch.arange(beside).expand(2, -1) * mask
    with torch.no_grad():
        return model(ids, attention_mask=mask, position_ids=positions).logits[0, :10]


@pytest.mark.parametrize("name", LONGROPE)
def test_a_row_of_a_longrope_model_depends_on_its_company_where_it_is_refused(name):
    """A row of 10 is read otherwise beside one of 17 than beside one of 16; 16 is the most that is accepted."""
    model = backbone_of(LONGROPE[name])
    alone, with_16, with_17 = (logits_of_a_short_row(model, n) for n in (10, 16, 17))
    assert torch.allclose(with_16, alone, atol=1e-5) and (with_17 - alone).abs().max() > 1e-3
    check_positions(model, 16)
    with pytest.raises(UserError, match=r"takes 17 positions.*beyond 16.*rope_type longrope.*expected at most 16"):
        check_positions(model, 17)


def test_of_rope_for_each_type_of_layer_the_shortest_counts():
    model = backbone_of(LlamaConfig(**SHAPE))
    other = {**LONG, **ORIGINAL, "original_max_position_embeddings": 20}
    model.config.rope_parameters = {"full_attention": {**LONG, **ORIGINAL}, "sliding_attention": other}
    check_positions(model, 16)
    with pytest.raises(UserError, match="expected at most 16"):
        check_positions(model, 17)


def test_a_dynamic_rope_model_changes_beyond_the_positions_that_are_refused_anyway():
    model = backbone_of(
        LlamaConfig(**SHAPE, rope_parameters={"rope_type": "dynamic", "factor": 4.0, "rope_theta": 100.0})
    )
    alone, with_64, with_200 = (logits_of_a_short_row(model, n) for n in (10, 64, 200))
    assert torch.allclose(with_64, alone, atol=1e-5) and (with_200 - alone).abs().max() > 1e-3
    check_positions(model, 64)
    with pytest.raises(UserError, match="the model reads 64"):
        check_positions(model, 65)


@pytest.mark.parametrize(
    "config, limit",
    [
        (MistralConfig(**SHAPE, sliding_window=20), 20),
        (MistralConfig(**SHAPE, sliding_window=0), 64),  # no window
        (MistralConfig(**SHAPE, sliding_window=None), 64),
        (Llama4TextConfig(**{**SHAPE, "head_dim": 8}, attention_chunk_size=24), 24),
    ],
)
def test_windows_and_chunks_are_limits(config, limit):
    model = backbone_of(LlamaConfig(**SHAPE))
    model.config = config
    check_positions(model, limit)
    with pytest.raises(UserError, match=f"takes {limit + 1} positions.*the model reads {limit};"):
        check_positions(model, limit + 1)


def test_what_is_scored_and_what_is_generated_is_checked():
    """The comparisons of `random_comparisons` take up to 9 + 9 tokens, and 3 user vectors."""
    model = build_model(tiny_config(), TOKENIZER, 4, backbone_of(LONGROPE["llama"]))
    with pytest.raises(UserError, match="rope_type longrope"):
        score(model, random_comparisons(6), [0] * 6, 2)
    requests = [Request([1, 5, 6], 0, "x")]
    assert len(generate(model, requests, (), Decoding(max_new_tokens=10))[0].ids) == 10  # 3 + 3 + 10
    with pytest.raises(UserError, match="takes 17 positions"):
        generate(model, requests, (), Decoding(max_new_tokens=11))


def test_a_training_without_a_reference_is_checked():
    """A reward model's comparisons meet the backbone in training first: beyond its positions nothing would say so."""
    config = tiny_config("method=prm")
    model = build_model(config, TOKENIZER, 4, load_backbone(config.model, TOKENIZER, 0))
    model.backbone.config.max_position_embeddings = 12
    comparisons = random_comparisons(6)
    data = Dataset(comparisons, [], EncodingReport())
    with pytest.raises(UserError, match="the model reads 12"):
        prepare_task(config, model, data, "")


def test_doges_window_is_a_limit_in_rows_too():
    """Beyond it Hugging Face keeps the keys of the largest values, among padding too; -1 (XLNet) is no limit."""
    shape = {name: value for name, value in SHAPE.items() if name != "pad_token_id"}
    model = AutoModelForCausalLM.from_config(DogeConfig(**shape, keep_window_size=24))
    for windows in (True, False):
        check_positions(model, 24, windows)
        with pytest.raises(UserError, match="takes 25 positions.*the model reads 24"):
            check_positions(model, 25, windows)
    model.config.keep_window_size = -1
    check_positions(model, 64)
