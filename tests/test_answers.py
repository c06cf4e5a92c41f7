"""Where an answer begins and ends: BOS and EOS once, the chat template's own turn end, the boundary between two texts."""

import pytest
from helpers import TOKENIZER, tiny_config
from tokenizers import processors
from transformers import AddedToken, GenerationConfig

from prlhf.backbone.loading import make_savable
from prlhf.backbone.toys import byte_tokenizer, random_backbone
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


# Families: how the template ends an answer, as the model's own tokenizer_config.json has it; the special tokens of it; the
# tokenizer's EOS; the generation config's; the token that ends an answer; whether there is something to say about it.
CHATML = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
CHATML += "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
LLAMA3 = (
    "{% for m in messages %}{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{% for m in messages %}{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim "
    "+ '<end_of_turn>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
PHI3 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"
)
TULU2 = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + (eos_token if m.role == 'assistant' else '') + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}{% else %}"
    "{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
FAMILIES = {
    "SmolLM2 and Qwen": (CHATML, "<|im_start|> <|im_end|> <|endoftext|>", "<|im_end|>", "<|im_end|>", "<|im_end|>", None),
    "ChatML on a base model": (CHATML, "<|im_start|> <|im_end|> <|endoftext|>", "<|endoftext|>", "<|endoftext|>",
                               "<|im_end|>", "no EOS of the model"),
    "Llama 3": (LLAMA3, "<|start_header_id|> <|end_header_id|> <|eot_id|> <|eom_id|> <|end_of_text|>", "<|eot_id|>",
                "<|end_of_text|> <|eom_id|> <|eot_id|>", "<|eot_id|>", None),
    "Llama 3 as first published": (LLAMA3, "<|start_header_id|> <|end_header_id|> <|eot_id|> <|end_of_text|>",
                                   "<|end_of_text|>", "<|end_of_text|> <|eot_id|>", "<|eot_id|>", None),
    "Gemma": (GEMMA, "<start_of_turn> <end_of_turn> <eos>", "<eos>", "<eos> <end_of_turn>", "<end_of_turn>", None),
    "Phi 3": (PHI3, "<|user|> <|assistant|> <|end|> <|endoftext|>", "<|endoftext|>", "<|endoftext|> <|assistant|> <|end|>",
              "<|end|>", None),
    "Tulu 2": (TULU2, "", "</s>", "</s>", "</s>", None),
    "Mistral": (MISTRAL, "", "</s>", "</s>", "</s>", None),
}  # fmt: skip


@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_ends_as_its_family_ends_it_and_generation_stops_there(family):
    """The prompt's and the response's tokens are the first of those that Hugging Face's function gives for the whole talk."""
    template, special, eos, model_eos, end, said = FAMILIES[family]
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens([AddedToken(token, special=False) for token in special.split()])  # Phi 3 does not mark them
    tokenizer.eos_token, tokenizer.chat_template = eos, template
    number = tokenizer.convert_tokens_to_ids
    enc, lead = encoder(tokenizer), " " if family == "Mistral" else ""
    found, _ = encode(enc, TALK, lead + "water", "no" + end + "\n")
    whole = tokenizer.apply_chat_template([*TALK, {"role": "assistant", "content": "water"}], return_dict=False)
    assert whole[: len(found.prefix) + len(found.chosen)] == found.prefix + found.chosen
    assert found.chosen[-1] == number(end) and found.rejected == [*ids("no"), number(end)]  # once
    assert encode(enc, "plain text", "water")[0].chosen == [*ids("water"), number(eos)]
    generation = GenerationConfig(eos_token_id=number(model_eos.split()))
    assert enc.stop_ids(generation) == {number(token) for token in (eos, end, *model_eos.split())}
    assert enc.stop_ids(None) == {number(eos), number(end)}
    message = enc.unusual_end(["text", TALK], generation)
    assert message is None if said is None else said in message and end in message
    assert enc.unusual_end(["text"], generation) is None


@pytest.mark.parametrize("template", ["tulu", "auto", "{{ raise_exception('no answers') }}"])
def test_where_the_template_puts_no_special_token_behind_an_answer_eos_does_and_that_is_said(template):
    tokenizer = byte_tokenizer()
    if template not in ("tulu", "auto"):
        tokenizer.chat_template = "{% if messages[1] is defined %}" + template + "{% endif %}{{ messages[0].content }}"
    enc = encoder(tokenizer, *(["data.template=tulu"] if template == "tulu" else []))
    assert encode(enc, TALK)[0].chosen == [*ids("water"), 2]
    assert enc.stop_ids(GenerationConfig(eos_token_id=7)) == {2, 7}
    said = (
        "refuses made-up talks, so its turn end is not known"
        if "raise" in template
        else "puts no special token behind an answer"
    )
    assert f"{said}; the tokenizer's EOS '</s>'" in enc.unusual_end([TALK], None)


def test_a_generation_config_that_cannot_be_saved_keeps_its_ends():
    model = random_backbone(tiny_config().model, 259, 0)
    model.generation_config = GenerationConfig(eos_token_id=[1, 107], early_stopping=True, temperature=0.5)
    make_savable(model)
    model.generation_config.validate(strict=True)  # ValueError if not
    assert model.generation_config.eos_token_id == [1, 107]


def test_a_pairwise_question_holds_no_eos():
    enc = Encoder(TOKENIZER, tiny_config().data, "pairwise")
    assert encode(enc, "hi", "water</s>", "no\n")[0] == encode(enc, "hi", "water", "no\n")[0]


def test_a_template_that_wants_a_system_message_first_tells_its_turn_end_too():
    """And one that refuses every made-up talk is not said to have none."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    refusing = "{% if messages[0].role != 'system' %}{{ raise_exception('no system') }}{% endif %}"
    tokenizer.chat_template = refusing + CHATML
    talk = [{"role": "system", "content": "Be brief."}, *TALK]
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert encode(encoder(tokenizer), talk)[0].chosen == [*ids("water"), end]
    tokenizer.chat_template = refusing.replace("system", "tool") + CHATML
    said = encoder(tokenizer).unusual_end([talk], GenerationConfig())
    assert "refuses made-up talks, so its turn end is not known" in said


def test_a_turn_end_that_a_text_prompts_response_says_stays():
    """A text is taken as it is; only the EOS that would stand twice goes."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    tokenizer.chat_template = CHATML
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    found, _ = encode(encoder(tokenizer), "hi", "water<|im_end|>", "no</s>")
    assert found.chosen == [*ids("water"), end, 2] and found.rejected == [*ids("no"), 2]
    in_chat, _ = encode(encoder(tokenizer), TALK, "water<|im_end|>", "no</s>")
    assert in_chat.chosen == [*ids("water"), end] and in_chat.rejected == [*ids("no"), end]
