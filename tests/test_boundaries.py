"""The boundary between two texts, for a SentencePiece tokenizer as Llama 2 has it. What is right is told by sentencepiece itself."""

import random

import pytest
import sentencepiece
from helpers import tiny_config
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from prlhf.batch.questions import QUESTION, pair_question
from prlhf.batch.tokens import Encoder, EncodingReport
from prlhf.data.comparisons import parse_comparison
from prlhf.data.users import UserIndex

LINES = ("Water falls from the sky.", "What is rain?", "I like the old jokes", "<|user|> <|assistant|> [INST] [/INST]",
         "Response A: B: The better response is Response A B", "no, the rain is wet water and the water is rain")  # fmt: skip
MISTRAL = "{% for m in messages %}{{ '[INST] ' + m.content + ' [/INST]' if m.role == 'user' else ' ' + m.content + eos_token }}"


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model: BPE with bytes for what it does not know, and a space put before every text."""
    prefix = str(tmp_path_factory.mktemp("pieces") / "tokenizer")
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(LINES * 20), model_prefix=prefix, vocab_size=360, model_type="bpe", byte_fallback=True,
        normalization_rule_name="identity", remove_extra_whitespaces=False, minloglevel=2,
    )  # fmt: skip
    return sentencepiece.SentencePieceProcessor(model_file=prefix + ".model")


@pytest.fixture(scope="module", params=["legacy", "first"])
def tokenizer(request, pieces):
    """The same as Hugging Face writes it: the space as a normaliser's (Llama 2's file) or as Metaspace's."""
    vocabulary = {pieces.id_to_piece(i): i for i in range(pieces.get_piece_size())}
    splits = ((piece[:cut], piece[cut:]) for piece in vocabulary for cut in range(1, len(piece)))
    merges = sorted((s for s in splits if vocabulary.keys() >= set(s)), key=lambda s: vocabulary[s[0] + s[1]])
    inner = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if request.param == "legacy":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        inner.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="first", split=False)
    inner.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    inner.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = MISTRAL + "{% endfor %}"
    return made


def encode(tokenizer, prompt, chosen, *overrides, method="pdpo", place="before_prompt", **more):
    record = {"prompt": prompt, "chosen": chosen, "rejected": "no", **more}
    report, config = EncodingReport(), tiny_config(*overrides)
    encoder = Encoder(tokenizer, config.data, method, place)
    return encoder.encode(parse_comparison(record, "f", "i"), UserIndex([]), report), report


def test_a_response_has_the_tokens_of_the_whole_text_behind_the_prompts(pieces, tokenizer):
    text = "<|user|>\nWhat is rain? \n<|assistant|>\n"
    found, report = encode(tokenizer, "What is rain?", "Water falls", "data.template=tulu")
    assert [*found.prefix, *found.chosen] == [1, *pieces.encode(text + "Water falls"), 2]
    assert [*found.prefix, *found.rejected] == [1, *pieces.encode(text + "no"), 2]
    assert found.prefix == [1, *pieces.encode(text)] and report.boundaries_merged == 0
    assert (
        found.chosen[0] != pieces.encode("Water falls")[0] and pieces.id_to_piece(pieces.encode("Water"))[0][0] == "▁"
    )


def test_a_template_that_puts_a_space_before_an_answer_has_it(pieces, tokenizer):
    found, _ = encode(tokenizer, [{"role": "user", "content": "What is rain?"}], "Water falls")
    assert found.prefix == [1, *pieces.encode("[INST] What is rain? [/INST]")]
    assert [*found.prefix, *found.chosen] == [1, *pieces.encode("[INST] What is rain? [/INST] Water falls"), 2]


def test_a_boundary_that_merges_keeps_both_texts_tokens_and_is_counted(pieces, tokenizer):
    found, report = encode(tokenizer, "What is ", "rain?")  # "▁" at the end of the prompt would be the first of "▁rain"
    assert pieces.encode("What is rain?")[: len(found.prefix) - 1] != found.prefix[1:]
    assert (found.prefix, found.chosen) == ([1, *pieces.encode("What is ")], [*pieces.encode("rain?"), 2])
    assert report.boundaries_merged == 1 and "1 boundaries merged" in report.lines()


def test_a_prompt_behind_a_user_text_has_the_tokens_of_the_whole_text_and_the_reference_those_without_it(
    pieces, tokenizer
):
    keys = ("data.user_text_in_reference=false", "data.max_prompt_tokens=5", "data.min_prompt_tokens=1")
    for overrides, cut in ((keys[:1], None), (keys, 5)):
        found, _ = encode(tokenizer, "What is the rain?", "Water", *overrides, user_text="I like jokes")
        text, whole = (pieces.encode(x) for x in ("I like jokes\n", "I like jokes\nWhat is the rain?"))
        assert whole[: len(text)] == text and len(whole) - len(text) > 5
        kept = whole[len(text) :][-(cut or 99) :]
        assert found.prefix == [1, *text, *kept]
        assert found.reference_prefix == [1, *pieces.encode("What is the rain?")[-(cut or 99) :]]


def test_a_pairwise_question_has_the_tokens_of_the_whole_text(pieces, tokenizer):
    found, _ = encode(tokenizer, "What is rain?", "Water falls", method="pairwise")
    x, question = pieces.encode("What is rain?"), pair_question(tokenizer)
    for ids, first, second in ((found.chosen, "Water falls", "no"), (found.rejected, "no", "Water falls")):
        text = "What is rain?" + QUESTION[0] + first + QUESTION[1] + second + QUESTION[2]
        for letter, answer in (("A", question.answer_a), ("B", question.answer_b)):
            assert [*x, *ids, answer] == pieces.encode(text + " " + letter)


def test_the_end_of_a_long_prompt_tells_what_the_whole_tells(pieces, tokenizer):
    """Random texts, of words and of no words at all, most of them longer than the window that is looked at."""
    rng, encoder, merged = random.Random(0), Encoder(tokenizer, tiny_config().data), 0
    parts = [*" ".join(LINES).split(), "\n", "  ", "...", "rainrainrain" * 8, "\t", "é", "水が降る" * 9]
    for _ in range(300):
        x, y = (
            "".join(rng.choice(parts) + rng.choice(("", " ")) for _ in range(rng.randrange(1, 30))) for _ in range(2)
        )
        known, both = pieces.encode(x), pieces.encode(x + y)
        (found,) = encoder.response_ids(encoder.read(x, "f"), y)
        assert found.merged == (both[: len(known)] != known)
        merged += found.merged
        assert found.ids == [*(pieces.encode(y) if found.merged else both[len(known) :]), 2]
    assert 20 < merged < 280


@pytest.mark.parametrize(
    "content, tail", [("What is rain?", " \n<|assistant|>\n"), ("What is rain? ", " \n<|assistant|>\n")]
)
def test_the_tail_is_tokens_of_the_whole_prompt(pieces, tokenizer, content, tail):
    """User vectors stand where sentencepiece's tokens of the content end, in the tokens of the whole, or before a token that
    reaches from one into the other. User text before the prompt leaves it there."""
    head, whole = pieces.encode("<|user|>\n" + content), pieces.encode("<|user|>\n" + content + tail)
    same = next((i for i, (a, b) in enumerate(zip(head, whole)) if a != b), len(head))
    for more in ({}, {"user_text": "I like the old jokes"}):
        found, _ = encode(tokenizer, content, "Water", "data.template=tulu", place="prompt_end", **more)
        assert found.prefix[len(found.prefix) - found.tail :] == whole[same:]
