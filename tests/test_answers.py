"""Where an answer begins and ends: BOS and EOS once, the chat template's own turn end, the boundary between two texts."""

from helpers import TOKENIZER, tiny_config
from tokenizers import processors

from prlhf.backbone.toys import byte_tokenizer
from prlhf.batch.tokens import Encoder, EncodingReport
from prlhf.data.comparisons import parse_comparison
from prlhf.data.users import UserIndex

TALK = [{"role": "user", "content": "hi"}]


def encoder(tokenizer, *overrides):
    return Encoder(tokenizer, tiny_config(*overrides).data)


def encode(enc, prompt="hi", chosen="water", rejected="no", **more):
    report = EncodingReport()
    record = {"prompt": prompt, "chosen": chosen, "rejected": rejected, **more}
    return enc.encode(parse_comparison(record, "f", "i"), UserIndex(["u"]), report), report


def ids(text, tokenizer=TOKENIZER):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def with_bos():
    """A tokenizer that, like Llama's, begins every text with BOS."""
    tokenizer = byte_tokenizer()
    tokenizer._tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return tokenizer


def test_bos_and_eos_stand_once_where_the_text_has_them_already():
    plain, _ = encode(encoder(with_bos()), "hi", "water", "no", user_text="old")
    assert plain.prefix == [1, *ids("old\nhi")] and plain.chosen == [*ids("water"), 2]
    for prompt, chosen, text in (("<s>hi", "water</s>", "<s>old"), ("<s><s>hi", "water</s></s> \n", "old")):
        assert encode(encoder(with_bos()), prompt, chosen, "no", user_text=text)[0] == plain
    inside, _ = encode(encoder(with_bos()), "a<s>b", "wa</s>ter ", "no")  # only at the beginning and at the end
    assert inside.prefix == [1, *ids("a"), 1, *ids("b")] and inside.chosen == [*ids("wa"), 2, *ids("ter "), 2]
    without = encode(encoder(byte_tokenizer()), "<s>hi")[0]  # a tokenizer that begins no text with BOS: as written
    assert without.prefix == [1, *ids("hi")]


def test_a_pairwise_question_holds_no_eos():
    enc = Encoder(TOKENIZER, tiny_config().data, "pairwise")
    assert encode(enc, "hi", "water</s>", "no\n")[0] == encode(enc, "hi", "water", "no\n")[0]
