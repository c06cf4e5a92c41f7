"""Families of causal LMs, as tiny random models: right beside Hugging Face's own forward pass, or refused in a sentence."""

from pathlib import Path

import pytest
import right_numbers
from families import FAMILIES, tiny_model
from right_numbers import LAYOUTS, own_model, personalised

from benchmarks.models import line
from prlhf.errors import UserError
from prlhf.score.agreement import check_agreement

EVERY_LAYOUT = (
    "llama", "qwen3", "qwen2_moe", "gemma2", "gemma3_text", "phi3", "cohere2", "granite", "gpt_oss", "glm4_moe", "gpt2", "opt",
)  # fmt: skip
ROWS_ALONE = ("bloom", "falcon (ALiBi)", "lfm2", "mamba2", "qwen3_next")
# The check at a run's start reads sequences of 15 positions at most. Here they take 18, in rows of 22 and more.
LONG_ROPE = {
    "rope_type": "longrope", "rope_theta": 10000.0, "short_factor": [1.0] * 4, "long_factor": [4.0, 3.0, 2.0, 1.5],
    "original_max_position_embeddings": 16, "factor": 8.0,
}  # fmt: skip
WINDOWS = [
    ("mistral", {"sliding_window": 16}),
    ("gpt_neo", {"window_size": 16}),
    ("gpt_neo", {"window_size": 20}),
    ("llama4_text", {"attention_chunk_size": 16}),
    ("llama4_text", {"floor_scale": 20}),
    ("phi3", {"rope_parameters": LONG_ROPE, "original_max_position_embeddings": 16, "sliding_window": None}),
]


@pytest.fixture
def models(request, tmp_path):
    """A family's tiny model in a folder, and Hugging Face's own copy of it."""
    tiny_model(request.param).save_pretrained(tmp_path)
    return tmp_path, own_model(tmp_path)


@pytest.mark.parametrize("models", EVERY_LAYOUT, indirect=True)
def test_families_that_honour_a_mask_are_right_in_every_layout(models):
    """Log-probs, gradients, decoding, LoRA, and what `final/` brings back."""
    found = {layout: right_numbers.of_layout(*models, layout) for layout in LAYOUTS}
    found["decoding"] = right_numbers.of_decoding(*models, "tree")
    found["final"] = right_numbers.of_final(models[0], "tree")
    if models[1].config.model_type != "gpt2":  # has no linear layers
        found["LoRA"] = right_numbers.of_lora(models[0], "tree", [])
    assert all(verdict.right for verdict in found.values()), {name: str(verdict) for name, verdict in found.items()}


@pytest.mark.parametrize("models", ROWS_ALONE, indirect=True)
def test_other_families_are_right_in_rows_and_refused_elsewhere(models):
    """Recurrent layers, convolutions and ALiBi carry from one response into the next, or count places of the row."""
    assert right_numbers.of_layout(*models, "rows").right
    assert right_numbers.of_decoding(*models, "rows").right
    assert right_numbers.of_final(models[0], "rows").right
    for layout in ("tree", "packed"):
        with pytest.raises(UserError, match=rf"^model.layout: found '{layout}', .* expected 'rows'"):
            check_agreement(personalised(models[0], layout)[1])


@pytest.mark.parametrize("models", ["gemma3n_text"], indirect=True)
def test_a_family_that_reads_more_than_embeddings_is_refused(models):
    """Gemma 3n reads per-layer embeddings of token ids, and user vectors have no ids."""
    for layout in LAYOUTS:
        with pytest.raises(UserError, match=r"^model.name: a gemma3n_text model cannot be computed right here \("):
            check_agreement(personalised(models[0], layout)[1])


def test_a_model_that_reads_ahead_is_refused(tmp_path):
    """An encoder's prediction of a token has read the token (EmbeddingGemma has a causal LM's class)."""
    tiny_model("gemma3_text", use_bidirectional_attention=True).save_pretrained(tmp_path)
    for layout in LAYOUTS:
        assert right_numbers.of_layout(tmp_path, own_model(tmp_path), layout).refused


@pytest.mark.parametrize(
    ("family", "window"), WINDOWS, ids=lambda value: value if isinstance(value, str) else min(value)
)
def test_what_is_longer_than_a_window_is_right_or_refused(family, window, tmp_path):
    """Sliding windows, chunks, what counts places of the row (GPT-Neo, Llama 4), and rotary factors that change for the whole
    batch at a length (Phi-3)."""
    tiny_model(family, **window).save_pretrained(tmp_path)
    found = {layout: right_numbers.of_layout(tmp_path, own_model(tmp_path), layout) for layout in LAYOUTS}
    assert found["rows"].right or family == "phi3"
    assert all(verdict.right or verdict.refused for verdict in found.values()), {k: str(v) for k, v in found.items()}


def cells(table_line):
    """A line's cells but the last, reasons, whose numbers are rounding's."""
    return [cell.strip() for cell in table_line.split("|")[1:9]]


PAGE = {
    cells(text)[0]: text
    for text in (Path(__file__).parent.parent / "docs" / "models.md").read_text(encoding="utf-8").splitlines()
    if text.startswith("|")
}


def test_the_page_has_every_family_and_none_is_wrong():
    """Nor does one end in a traceback."""
    assert PAGE.keys() - {"family", "---"} == FAMILIES.keys()
    assert not [text for text in PAGE.values() if "wrong" in text or "Error" in text]


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_the_page_says_what_is_so(family):
    """docs/models.md, which `make models-table` makes."""
    assert cells(line(family)) == cells(PAGE[family])
