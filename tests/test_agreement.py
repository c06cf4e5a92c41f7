"""Models whose layouts do not compute what they compute alone are refused at start, with the layout that does."""

import pytest
import torch
from helpers import TOKENIZER, tiny_config
from transformers import AutoModelForCausalLM, GPTNeoConfig, GraniteConfig, LlamaConfig, Mamba2Config, PreTrainedModel

from prlhf.backbone import families, visible
from prlhf.backbone.attention import use_tree_attention
from prlhf.batch.tokens import EncodedComparison
from prlhf.errors import UserError
from prlhf.generate.decode import Decoding, Request, check_decoding, generate
from prlhf.method.build import build_model
from prlhf.score import agreement
from prlhf.score.agreement import check_agreement
from prlhf.score.score import score
from prlhf.train import __main__ as train

SMALL = {"vocab_size": 300, "hidden_size": 32, "num_hidden_layers": 2}
LLAMA = {**SMALL, "intermediate_size": 48, "num_attention_heads": 2, "num_key_value_heads": 1}
MAMBA = Mamba2Config(**SMALL, num_heads=8, head_dim=8, state_size=8, n_groups=2, chunk_size=8, pad_token_id=0)


PROMPT_END = "user_model.place=prompt_end"


def random_model(config) -> PreTrainedModel:
    """With weights so large that what is wrong shows."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def built(config, *overrides):
    model = build_model(tiny_config(*overrides), TOKENIZER, 4, random_model(config)).eval()
    model.user_slot = 1  # the comparisons here begin with a BOS
    return model


def test_a_recurrent_model_is_refused_where_one_response_reads_another():
    for layout in ("auto", "packed"):
        with pytest.raises(UserError, match="mamba2 model does not compute what it computes alone .*expected 'rows'"):
            check_agreement(built(MAMBA, f"model.layout={layout}"))
    check_agreement(built(MAMBA, "model.layout=rows"))


@pytest.mark.parametrize(
    "keys", [(PROMPT_END,), ("method=prm", PROMPT_END), ("method=prm", "user_model.place=response_end")]
)
def test_what_a_layout_computes_is_checked_at_each_place(keys, monkeypatch):
    """A right model passes. A recurrent one is refused in trees, and passes in rows. Where a reader would see the one before it,
    which no single reader shows, that is found."""
    check_agreement(built(LlamaConfig(**LLAMA), *keys))
    with pytest.raises(UserError, match="mamba2 model does not compute what it computes alone .*expected 'rows'"):
        check_agreement(built(MAMBA, *keys))
    check_agreement(built(MAMBA, *keys, "model.layout=rows"))

    def lay_out(*arguments):
        batch = right(*arguments)
        seen_until = batch.seen_until_RT.flatten()
        seen_until[batch.vectors_at_SU.flatten()] = batch.seen_until_RT.shape[1]
        return batch

    right = agreement.lay_out
    monkeypatch.setattr(agreement, "lay_out", lay_out)
    with pytest.raises(UserError, match="hidden states differ"):
        check_agreement(built(LlamaConfig(**LLAMA), *keys))
    check_agreement(built(LlamaConfig(**LLAMA), *(key for key in keys if "place" not in key)))


@pytest.mark.parametrize("check", [check_agreement, check_decoding])
def test_the_attention_of_long_rows_is_checked_on_short_ones(check, monkeypatch):
    model = build_model(tiny_config(), TOKENIZER, 4, use_tree_attention(random_model(LlamaConfig(**LLAMA)))).eval()
    check(model)
    right = visible.visible_attention
    monkeypatch.setattr(visible, "visible_attention", lambda *given: 1.5 * right(*given))
    with pytest.raises(UserError, match="differ"):
        check(model)


def test_local_attention_that_counts_by_the_row_is_refused_in_trees():
    """GPT-Neo's window of 256 is not reached by a short comparison."""
    config = GPTNeoConfig(
        vocab_size=300, hidden_size=32, num_layers=2, num_heads=2, attention_types=[[["global", "local"], 1]]
    )
    with pytest.raises(UserError, match="it counts positions by the row.*expected 'rows'"):
        check_agreement(built(config))
    check_agreement(built(config, "model.layout=rows"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_is_compared_in_float32_and_left_as_it_was(dtype):
    """In the half type itself the two ways of a Llama differ by more than float32's tolerance."""
    model = built(LlamaConfig(**LLAMA))
    model.backbone.to(dtype)
    before = {name: p.clone() for name, p in model.named_parameters()}
    check_agreement(model)
    check_decoding(model)
    assert all(p.dtype == before[name].dtype and torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_what_follows_the_head_unknown_is_refused(monkeypatch):
    """Granite divides its logits; a reward model does not read them."""
    granite = GraniteConfig(**LLAMA, logits_scaling=4.0)
    check_agreement(built(granite))
    monkeypatch.setattr(families, "DIVISORS", {})
    with pytest.raises(UserError, match="a granite model cannot be computed right here .*what follows its head"):
        check_agreement(built(granite))
    check_agreement(built(granite, "method=prm"))


def test_weights_that_are_not_finite_are_named():
    model = built(LlamaConfig(**LLAMA))
    with torch.no_grad():
        model.backbone.model.layers[1].mlp.down_proj.weight[3, 4] = torch.nan
    with pytest.raises(UserError, match="not finite; are its weights"):
        check_agreement(model)


def test_training_ends_before_it_begins(tmp_path, call):
    model, run = tmp_path / "mamba", tmp_path / "run"
    random_model(MAMBA).save_pretrained(model)
    TOKENIZER.save_pretrained(model)
    code, _, said = call(
        train.main, "--config", "tiny", "--set", f"run_dir={run}", f"model.name={model}", "model.family=null"
    )
    assert code == 2 and "expected 'rows'" in said
    assert not (run / "metrics.jsonl").exists()


def test_layout_rows_is_the_models_own_forward_pass_and_generation():
    """Mamba 2 as the vanilla model, in rows of unequal lengths: log-probs, and Hugging Face's generate with its own cache."""
    model, own = (
        built(MAMBA, "model.layout=rows", "user_model.kind=uniform", "user_model.tokens=0"),
        random_model(MAMBA),
    )
    prompts, y1, y2 = ([1, 9, 8, 7, 6, 5, 4], [1, 17, 30]), [11, 12, 2], [13, 14, 15, 16, 2]
    pairs = [EncodedComparison(x, x, y1, y2, 0) for x in prompts]
    with torch.no_grad():
        for x, *found in zip(prompts, *score(model, pairs, [0, 0], batch_size=4)[:2]):
            for y, log_p in zip((y1, y2), found):
                logits = own(torch.tensor([[*x, *y]])).logits[0, len(x) - 1 : -1].double()
                assert log_p.item() == pytest.approx(logits.log_softmax(-1)[range(len(y)), y].sum().item(), abs=1e-4)
        check_decoding(model)
        responses = generate(model, [Request(x, 0, "") for x in prompts], {2}, Decoding(max_new_tokens=9))
        for x, response in zip(prompts, responses):
            ids = torch.tensor([x])
            expected = own.generate(
                ids, max_new_tokens=9, do_sample=False, eos_token_id=2, attention_mask=torch.ones_like(ids)
            )
            assert response.ids == [t for t in expected[0, len(x) :].tolist() if t != 2]


def test_a_token_without_an_embedding_is_said_before_an_index_error():
    model = built(LlamaConfig(**LLAMA))
    model.check_lengths([EncodedComparison([1, 299], [1], [5], [6], 0)])
    with pytest.raises(UserError, match="found token 300 in a text, where the model has word embeddings of 300"):
        model.check_lengths([EncodedComparison([1, 9], [1], [300], [6], 0)])
