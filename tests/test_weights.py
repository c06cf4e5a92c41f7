"""A model is what its files hold: whole, unchanged, and saved as it was read. What cannot be that is refused in a sentence."""

import hashlib
import json
import shutil

import pytest
import torch
from helpers import TOKENIZER, VOCABULARY, random_comparisons, tiny_config
from safetensors.torch import load_file, save_file
from tiny_families import made, saved

from prlhf.backbone.loading import empty_backbone, load_backbone, load_tokenizer, load_weights
from prlhf.backbone.lora import add_lora, save_lora
from prlhf.backbone.toys import random_backbone
from prlhf.config.load import load_config
from prlhf.data.users import UserIndex
from prlhf.errors import UserError
from prlhf.method.build import build_model
from prlhf.parallel.ranks import process_group
from prlhf.parallel.shard import training_model
from prlhf.parallel.tensors import full
from prlhf.score.reference import NOT_ARCHITECTURE, reference_log_probs, weights_fingerprint
from prlhf.store.final import load_final, save_final


@pytest.fixture
def base(tmp_path):
    """The folder of a tiny Llama, whose head is not tied."""
    return saved(random_backbone(tiny_config().model, VOCABULARY, 0), tmp_path / "base")


def changed(folder, weights=None, **keys):
    """The folder with other weights (a function of those that it has), and with other keys in its config.json."""
    if weights is not None:
        save_file(
            weights(load_file(folder / "model.safetensors")), folder / "model.safetensors", metadata={"format": "pt"}
        )
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    return folder


def named(folder, *overrides):
    return load_config(None, [f"model.name={folder}", *overrides])


def read_whole(folder, *overrides):
    return load_backbone(named(folder, *overrides).model, TOKENIZER, 0)


def read_sharded(folder, *overrides):
    """As one process of FSDP reads it; its state and its fingerprint."""
    config = named(folder, "fsdp.offload=true", *overrides)
    try:
        with process_group(config, "cpu"):
            backbone = training_model(config, TOKENIZER, 2, "cpu").backbone
            return {n: full(t).clone() for n, t in backbone.state_dict().items()}, weights_fingerprint(backbone)
    finally:
        if torch.distributed.is_initialized():  # left by an error, with which a command ends
            torch.distributed.destroy_process_group()


def read_empty(folder, *overrides):
    return empty_backbone(named(folder, *overrides).model, TOKENIZER)


def read_tokenizer(folder, *overrides):
    return load_tokenizer(named(folder, *overrides).model)


# What training would fill in at random.


@pytest.mark.parametrize("read", [read_whole, read_sharded])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "base_model.model."])
def test_weights_under_other_names_are_named_with_what_to_strip(base, read, prefix):
    changed(base, lambda weights: {prefix + name: tensor for name, tensor in weights.items()})
    with pytest.raises(UserError) as refused:
        read(base)
    assert "lack lm_head.weight, model.embed_tokens.weight" in str(refused.value)
    assert f"they have {prefix}lm_head.weight" in str(refused.value)
    assert f"take {prefix!r} out of every name" in str(refused.value)


@pytest.mark.parametrize("read", [read_whole, read_sharded])
@pytest.mark.parametrize("dropped, count", [("lm_head.", 1), ("layers.1.", 9), ("layers.0.mlp.up_proj", 1)])
def test_a_weight_that_is_missing_is_never_random(base, read, dropped, count):
    changed(base, lambda weights: {name: tensor for name, tensor in weights.items() if dropped not in name})
    with pytest.raises(UserError, match=r"its files lack .*" + dropped.replace(".", r"\.")) as refused:
        read(base)
    assert count < 4 or f"and {count - 3} more" in str(refused.value)


def test_a_tied_head_is_not_missing(tmp_path):
    """Nor is one that the file holds in place of the embeddings."""
    model = random_backbone(tiny_config().model, VOCABULARY, 0)
    model.config.tie_word_embeddings = True
    model.tie_weights()
    saved(model, tmp_path)
    assert "lm_head.weight" not in load_file(tmp_path / "model.safetensors")
    expected = model.get_input_embeddings().weight
    assert torch.equal(read_whole(tmp_path).get_output_embeddings().weight, expected)
    assert torch.equal(read_sharded(tmp_path)[0]["lm_head.weight"], expected)
    changed(tmp_path, lambda weights: {n.replace("model.embed_tokens", "lm_head"): t for n, t in weights.items()})
    assert torch.equal(read_whole(tmp_path).get_input_embeddings().weight, expected)
    assert torch.equal(read_sharded(tmp_path)[0]["model.embed_tokens.weight"], expected)


def test_two_matrices_in_the_file_are_not_tied_whatever_the_config_says(base):
    changed(base, tie_word_embeddings=True)
    weights = load_file(base / "model.safetensors")
    assert not torch.equal(weights["lm_head.weight"], weights["model.embed_tokens.weight"])
    for state in (read_whole(base).state_dict(), read_sharded(base)[0]):
        assert all(torch.equal(state[name], tensor) for name, tensor in weights.items())


@pytest.mark.parametrize("read", [read_whole, read_sharded])
@pytest.mark.parametrize(
    "keys, extra, found",
    [
        ({"num_hidden_layers": 1}, (), "model.layers.1.input_layernorm.weight"),
        ({}, ("lm_head.bias",), "lm_head.bias"),
        ({}, ("model.layers.0.self_attn.q_proj.bias",), "model.layers.0.self_attn.q_proj.bias"),
    ],
)
def test_a_weight_that_would_be_left_out_is_named(base, read, keys, extra, found):
    changed(base, lambda weights: weights | {name: torch.ones(4) for name in extra}, **keys)
    with pytest.raises(
        UserError, match=r"its files have .* for which the model of its config\.json has no place"
    ) as refused:
        read(base)
    assert found in str(refused.value)


@pytest.mark.parametrize("family", ["llama", "gptj"])
def test_parts_of_their_own_and_old_tables_are_no_loss(tmp_path, family):
    """A value head, a vision tower; the masks and rotary tables of GPT-J's and Llama's first files."""
    model = random_backbone(tiny_config(family=family).model, VOCABULARY, 0)
    saved(model, tmp_path)
    block = "transformer.h.0.attn." if family == "gptj" else "model.layers.0.self_attn."
    extra = ["v_head.summary.weight", "vision.layer.weight", f"{model.base_model_prefix}.tower.weight"]
    extra += [block + name for name in ("bias", "masked_bias", "rotary_emb.inv_freq")]
    changed(tmp_path, lambda weights: weights | {name: torch.ones(4) for name in extra})
    expected = model.state_dict()
    for state in (read_whole(tmp_path).state_dict(), read_sharded(tmp_path)[0]):
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


def test_another_shape_is_named(base):
    changed(base, vocab_size=VOCABULARY + 1)
    with pytest.raises(UserError, match=rf"lm_head.weight of shape \({VOCABULARY}, 32\).*\({VOCABULARY + 1}, 32\)"):
        read_whole(base)


def test_an_expert_that_is_missing_is_named(tmp_path):
    saved(made("qwen3_moe"), tmp_path)
    all_of_it = load_file(tmp_path / "model.safetensors")
    changed(tmp_path, lambda _: {name: tensor for name, tensor in all_of_it.items() if "0.mlp.experts.3." not in name})
    with pytest.raises(UserError, match=r"layers.0.mlp.experts.down_proj of shape \(3, 32, 16\).* \(4, 32, 16\)"):
        read_whole(tmp_path)
    changed(
        tmp_path, lambda _: {name: tensor for name, tensor in all_of_it.items() if "0.mlp.experts.3.up" not in name}
    )
    with pytest.raises(UserError, match="lack a part of a weight .* one expert's"):
        read_whole(tmp_path)


# What is no whole model.


@pytest.mark.parametrize("read", [read_whole, read_sharded, read_empty, read_tokenizer])
def test_an_adapter_is_to_be_merged_first(base, tmp_path, read):
    """PEFT's folder, and the final/ of a run with LoRA, which has the tokenizer too."""
    config = tiny_config("lora.rank=2")
    model = random_backbone(config.model, VOCABULARY, 0)
    add_lora(model, config.lora, ("q_proj",), 0)
    final = tmp_path / "run" / "final"
    final.mkdir(parents=True)
    save_lora(model, config.lora, str(base), final)
    for folder in (final, saved_beside(final, base)):
        with pytest.raises(UserError) as refused:
            read(folder)
        assert f"found an adapter of {str(base)!r}" in str(refused.value)
        assert f"{str(folder)!r}).merge_and_unload().save_pretrained(NEW_FOLDER)" in str(refused.value)


def saved_beside(adapter, base):
    """A folder that has both, an adapter and a model: which of them training would start from depends on PEFT."""
    both = adapter.parent / "both"
    shutil.copytree(base, both)
    shutil.copy(adapter / "adapter_config.json", both)
    return both


@pytest.mark.parametrize("read", [read_whole, read_empty, read_tokenizer])
def test_a_runs_folder_and_user_vectors_alone_are_no_model(base, tmp_path, read):
    config = named(base, "model.frozen=true", "method=prm", "user_model.aggregator=linear", "user_model.tokens=1")
    model = build_model(config, TOKENIZER, 2)
    final = tmp_path / "run" / "final"
    save_final(final, model, config, TOKENIZER, UserIndex(("a", "b")), "")
    with pytest.raises(UserError, match="found a run's folder, expected a model .*run/final"):
        read(final.parent)
    with pytest.raises(
        UserError, match=rf"user vectors of a run with a frozen backbone.* such as the run's own, '{base}'"
    ):
        read(final)


def test_the_final_model_of_full_fine_tuning_is_a_model(base, tmp_path):
    config = named(base)
    save_final(tmp_path / "final", build_model(config, TOKENIZER, 2), config, TOKENIZER, UserIndex(("a", "b")), "")
    expected = load_file(base / "model.safetensors")
    state = read_whole(tmp_path / "final").state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize("read", [read_whole, read_sharded, read_empty])
@pytest.mark.parametrize(
    "quantised, method",
    [
        ({"quant_method": "gptq", "bits": 4}, "gptq"),
        ({"quant_method": "mxfp4"}, "mxfp4"),
        ({"quant_method": "fp8"}, "fp8"),
    ],
)
def test_quantised_weights_are_refused_with_how_to_turn_them_back(base, read, quantised, method):
    changed(base, quantization_config=quantised)
    with pytest.raises(UserError, match=rf"found quantised weights \({method}\).*model\.dequantize\(\)"):
        read(base)


@pytest.mark.parametrize("read", [read_whole, read_empty, read_tokenizer])
def test_a_config_of_another_type_is_told_with_its_field(base, read):
    changed(base, num_hidden_layers="two")
    with pytest.raises(UserError, match=r"config.json: .*'num_hidden_layers'.*expected int, got str \(value: 'two'\)"):
        read(base)


def test_a_config_that_makes_transformers_stumble_is_a_sentence(base):
    changed(base, rope_parameters={"rope_type": "spiral"})
    with pytest.raises(UserError, match="KeyError: 'spiral'"):
        read_whole(base)


def test_a_tokenizer_file_of_a_newer_version_is_said_to_be_one(base):
    path = base / "tokenizer.json"
    described = json.loads(path.read_text())
    described["model"]["type"] = "Unheard"
    path.write_text(json.dumps(described))
    with pytest.raises(UserError, match=r"tokenizer.json cannot be read by tokenizers \d.*pip install --upgrade"):
        read_tokenizer(base)


@pytest.mark.parametrize("read", [read_whole, read_empty])
def test_padding_beyond_the_vocabulary_is_said_before_torch_refuses(base, read):
    changed(base, pad_token_id=VOCABULARY)
    with pytest.raises(UserError, match=rf"found pad_token_id {VOCABULARY} .* less than its vocab_size, {VOCABULARY}"):
        read(base)


@pytest.mark.parametrize("read", [read_whole, read_empty])
@pytest.mark.parametrize("short", [1, 200])
def test_a_tokenizer_larger_than_the_embeddings_is_said_before_an_index_error(tmp_path, read, short):
    saved(random_backbone(tiny_config().model, VOCABULARY - short, 0), tmp_path)
    first = next(token for token, i in TOKENIZER.get_vocab().items() if i == VOCABULARY - short)
    with pytest.raises(UserError) as refused:
        read(tmp_path)
    assert f"token {first!r} with the number {VOCABULARY - short}" in str(refused.value)
    assert f"{VOCABULARY - short} word embeddings" in str(refused.value)


@pytest.mark.parametrize("role", ["eos", "template", "none"])
def test_an_added_token_beyond_the_embeddings_counts_where_texts_have_it(base, role):
    """As an added end of a turn that nobody trained; an image's token, which no text has, is no fault (Gemma 3)."""
    tokenizer = load_tokenizer(named(base).model)
    assert tokenizer.add_tokens(["<|new|>"], special_tokens=True) == 1
    if role == "eos":
        tokenizer.eos_token = "<|new|>"
    if role == "template":
        tokenizer.chat_template = "{{ messages[0]['content'] + '<|new|>' }}"
    if role == "none":
        load_backbone(named(base).model, tokenizer, 0)
    else:
        with pytest.raises(UserError, match=rf"'<\|new\|>' with the number {VOCABULARY}"):
            load_backbone(named(base).model, tokenizer, 0)


# What is not finite.


@pytest.mark.parametrize("read", [read_whole, read_sharded])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_base_that_is_not_finite_is_said_to_be_so(base, read, value):
    def damaged(weights):
        weights["model.layers.1.mlp.up_proj.weight"][-1, -1] = value
        return weights

    changed(base, damaged)
    with pytest.raises(
        UserError, match="NaN or infinite values in model.layers.1.mlp.up_proj.weight, as model.dtype reads"
    ):
        read(base)


def test_values_too_large_for_float16_are_said_to_be_so(base):
    changed(base, lambda weights: weights | {"lm_head.weight": weights["lm_head.weight"] + 1e5})
    read_whole(base, "model.dtype=bfloat16", "lora.rank=2")
    with pytest.raises(UserError, match="NaN or infinite values in lm_head.weight.*too large for float16"):
        read_whole(base, "model.dtype=float16", "lora.rank=2")


# Persistent buffers.

BUFFERS = {
    "glm4_moe": ["model.layers.1.mlp.gate.e_score_correction_bias"],
    "deepseek_v3": ["model.layers.1.mlp.gate.e_score_correction_bias"],
    "gemma4_text": ["model.layers.0.layer_scalar"],
}


@pytest.mark.parametrize("family", BUFFERS)
def test_persistent_buffers_are_read_fingerprinted_saved_and_read_again(tmp_path, family):
    """Against the state that Hugging Face's own model had when it was saved; reading by shards too."""
    model = made(family)
    saved(model, tmp_path / "base")
    expected = model.state_dict()
    assert set(BUFFERS[family]) == {n for n, _ in model.named_buffers()} & expected.keys()
    whole, (sharded, fingerprint) = read_whole(tmp_path / "base"), read_sharded(tmp_path / "base")
    assert fingerprint == weights_fingerprint(whole)

    config = named(tmp_path / "base")
    save_final(
        tmp_path / "final", build_model(config, TOKENIZER, 2, whole), config, TOKENIZER, UserIndex(("a", "b")), ""
    )
    stored = load_file(tmp_path / "final" / "model.safetensors")
    assert stored.keys() == load_file(tmp_path / "base" / "model.safetensors").keys()
    for state in (sharded, load_final(tmp_path / "final").model.backbone.state_dict()):
        assert state.keys() == expected.keys()
        assert all(torch.equal(state[name], tensor) for name, tensor in expected.items())

    for name in BUFFERS[family]:  # other weights, so another reference
        whole.get_buffer(name).add_(0.25)
    assert fingerprint != weights_fingerprint(whole)


def test_another_correction_bias_takes_no_log_probs_from_the_cache(tmp_path):
    """They differ, as the router chooses other experts."""
    comparisons, found = random_comparisons(4), []
    for shift in (0.0, 3.0):
        model = made("glm4_moe")
        model.get_buffer(BUFFERS["glm4_moe"][0])[0] += shift
        config = named(saved(model, tmp_path / str(shift)))
        lm = build_model(config, TOKENIZER, 2)
        found.append(
            reference_log_probs(lambda lm=lm: lm, comparisons, 4, weights_fingerprint(lm.backbone), "cpu", tmp_path)
        )
    assert (found[0].chosen - found[1].chosen).abs().max() > 1e-3


@pytest.mark.parametrize("family", ["glm4_moe", "gemma4_text", "qwen3_moe", "gpt_neox"])
def test_shards_have_the_types_that_reading_whole_gives(tmp_path, family):
    """In bfloat16: some weights stay in float32, and which is the family's choice."""
    saved(made(family), tmp_path)
    keys = (
        "model.dtype=bfloat16",
        "model.frozen=true",
        "method=prm",
        "user_model.aggregator=linear",
        "user_model.tokens=1",
    )
    whole, (sharded, fingerprint) = read_whole(tmp_path, *keys), read_sharded(tmp_path, *keys)
    for name, tensor in whole.state_dict().items():
        assert sharded[name].dtype == tensor.dtype and torch.equal(sharded[name], tensor), name
    assert fingerprint == weights_fingerprint(whole)


def test_the_fingerprint_of_a_model_without_persistent_buffers_is_what_it_was():
    """Caches and runs depend on it: a hash of the config, then of each weight's name, type, shape and bytes, by name."""
    model = random_backbone(tiny_config().model, VOCABULARY, 0)
    config = {k: v for k, v in model.config.to_dict().items() if k not in NOT_ARCHITECTURE}
    expected = hashlib.blake2b(json.dumps(config, sort_keys=True, default=str).encode(), digest_size=16)
    for name, p in sorted(model.named_parameters()):
        digest = hashlib.blake2b(p.detach().numpy().tobytes(), digest_size=16).digest()
        expected.update(f"{name} torch.float32 {tuple(p.shape)}".encode() + digest)
    assert weights_fingerprint(model) == expected.hexdigest()


@pytest.mark.parametrize("family", ["glm4_moe", "gemma4_text", "deepseek_v3"])
def test_no_buffer_changes_in_training(family):
    """So a checkpoint, which holds what training changes, needs none of them."""
    model = made(family).train()
    before = {name: tensor.clone() for name, tensor in model.named_buffers()}
    model(torch.arange(12).view(2, 6)).logits.square().sum().backward()
    assert all(torch.equal(before[name], tensor) for name, tensor in model.named_buffers())


def test_a_persistent_buffer_that_is_not_finite_is_said_to_be_so(tmp_path):
    model = made("glm4_moe")
    name = next(name for name, _ in model.named_buffers() if name.endswith("e_score_correction_bias"))
    model.get_buffer(name)[0] = float("nan")
    with pytest.raises(UserError, match=f"NaN or infinite values in {name}"):
        load_weights(saved(model, tmp_path), "float32")
