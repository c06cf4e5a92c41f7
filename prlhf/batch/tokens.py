"""Comparisons to token ids: one rule for BOS, templates and truncation.

    prefix = [BOS] u_t x,   responses = y EOS

BOS is put first, once, where the tokenizer itself begins a text with it. Responses are never cut, so EOS ends each.
A prompt that is too long loses its oldest tokens, so the assistant header or `TL;DR:` at its end stays.

For a pairwise preference model the two "responses" are the two orders of one question about both (`PairQuestion`).
"""

from dataclasses import dataclass, fields
from typing import NamedTuple

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from prlhf.config.keys import DataConfig
from prlhf.data.comparisons import Comparison, Messages
from prlhf.data.users import UserIndex
from prlhf.errors import UserError

# What a pairwise preference model reads after the prompt, and the two words it may answer.
QUESTION = ("\n\nResponse A:\n", "\n\nResponse B:\n", "\n\nThe better response is Response")
ANSWERS = (" A", " B")
# Chat templates by name, without BOS. Tulu: Wang et al. 2023 as Personalized Soups writes it, with the space before the
# newline. Llama 3: Meta's model card.
TEMPLATES = {
    "tulu": "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + ' \n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}",
    "llama3": "{% for message in messages %}{{ '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' "
    "+ message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}",
}


class EncodedComparison(NamedTuple):
    """A comparison as token ids: `prefix` is [BOS] u_t x; both responses end in EOS; user 0 is unknown."""

    prefix: list[int]
    reference_prefix: list[int]  # what the reference model sees: with or without u_t
    chosen: list[int]
    rejected: list[int]
    user: int
    margin: float = 1.0

    @property
    def length(self) -> int:
        """Tokens of the preference tree."""
        return len(self.prefix) + len(self.chosen) + len(self.rejected)


class EncodedPrompt(NamedTuple):
    """The parts of a prefix, and how many tokens of u_t and x were cut."""

    bos: list[int]
    user_text: list[int]
    prompt: list[int]
    user_text_cut: int
    prompt_cut: int

    @property
    def ids(self) -> list[int]:
        """[BOS] u_t x."""
        return self.bos + self.user_text + self.prompt


@dataclass
class EncodingReport:
    """What happened to the comparisons of a file on their way to tokens."""

    comparisons: int = 0
    equal_responses_dropped: int = 0
    too_long_dropped: int = 0
    prompts_truncated: int = 0
    user_texts_truncated: int = 0
    tokens: int = 0

    def lines(self) -> str:
        """The counts in one line, those that are zero left out."""
        return ", ".join(
            f"{getattr(self, f.name):,} {f.name.replace('_', ' ')}" for f in fields(self) if getattr(self, f.name)
        )


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] where the tokenizer itself begins a text with it (Llama), else [] (GPT-J, SmolLM2)."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


class PairQuestion(NamedTuple):
    """The pieces of "Response A: ... Response B: ... The better response is Response", and the tokens of A and B."""

    before_a: list[int]
    before_b: list[int]
    end: list[int]
    answer_a: int
    answer_b: int

    def ask(self, a: list[int], b: list[int]) -> list[int]:
        """The question's tokens, whose last one predicts the answer."""
        return self.before_a + a + self.before_b + b + self.end


def pair_question(tokenizer: PreTrainedTokenizerBase) -> PairQuestion:
    """QUESTION and ANSWERS as tokens. UserError where the two answers do not differ in one last token."""
    before_a, before_b, end, a, b = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in (*QUESTION, *ANSWERS)
    )
    if a[:-1] != b[:-1] or a[-1] == b[-1]:
        raise UserError(f"method pairwise: the tokenizer does not tell {ANSWERS[0]!r} from {ANSWERS[1]!r} by one token")
    return PairQuestion(before_a, before_b, end + a[:-1], a[-1], b[-1])


class Encoder:
    """Token ids of prompts and comparisons for one tokenizer, one `data` group of the config, and one method."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, method: str = "pdpo"):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, which must end every response")
        self.tokenizer = tokenizer
        self.config = config
        self.eos = tokenizer.eos_token_id
        self.bos = bos_ids(tokenizer)
        self.question = pair_question(tokenizer) if method == "pairwise" else None

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def prompt_ids(self, prompt: str | Messages) -> list[int]:
        """Tokens of x without BOS: a message list, or any prompt with a template but `auto`, through the chat template."""
        if isinstance(prompt, str) and self.config.template == "auto":
            return self._ids(prompt)
        messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
        template = TEMPLATES.get(self.config.template, self.tokenizer.chat_template)
        if not template:
            raise UserError("the tokenizer has no chat template; expected prompts as text and data.template 'auto', "
                            "or data.template " + " or ".join(map(repr, TEMPLATES)))  # fmt: skip
        try:
            text = self.tokenizer.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=True
            )
        except TemplateError as error:
            raise UserError(f"the chat template refuses the prompt {messages}: {error}") from None
        ids = self._ids(text)
        return ids[1:] if self.bos and ids[:1] == self.bos else ids

    def prefix(self, prompt: str | Messages, user_text: str | None, room: int | None = None) -> EncodedPrompt:
        """[BOS] u_t x, u_t without its end where it is too long, x without its oldest tokens where it is.

        `room`: how many tokens all of it may take (config.max_tokens by default).
        """
        room = self.config.max_tokens if room is None else room
        text = self._ids(user_text + "\n") if user_text and self.config.user_text else []
        kept_text = text[: self.config.max_user_text_tokens]
        ids = self.prompt_ids(prompt)
        room = min(self.config.max_prompt_tokens, room - len(self.bos) - len(kept_text))
        kept = ids[-room:] if room > 0 else []
        return EncodedPrompt(self.bos, kept_text, kept, len(text) - len(kept_text), len(ids) - len(kept))

    def prefix_to_answer(
        self, prompt: str | Messages, user_text: str | None, where: str, room: int | None = None
    ) -> EncodedPrompt:
        """As `prefix`, but UserError naming `where` for a prompt of which too little is left to be answered."""
        prefix = self.prefix(prompt, user_text, room)
        if not (self.bos or prefix.prompt) or (
            prefix.prompt_cut and len(prefix.prompt) < self.config.min_prompt_tokens
        ):
            raise UserError(
                f"{where}: {len(prefix.prompt)} tokens are left of the prompt within data.max_tokens and "
                f"data.max_prompt_tokens; expected at least {self.config.min_prompt_tokens}"
            )
        return prefix

    def encode(self, comparison: Comparison, users: UserIndex, report: EncodingReport) -> EncodedComparison | None:
        """The comparison's token ids, or None where its responses leave too little room for the prompt."""
        chosen, rejected = self._responses(comparison)
        room = self.config.max_tokens - max(len(chosen), len(rejected))
        prefix = self.prefix(comparison.prompt, comparison.user_text, room)
        if prefix.prompt_cut and len(prefix.prompt) < self.config.min_prompt_tokens:
            report.too_long_dropped += 1
            return None
        if not self.bos and not prefix.prompt:
            raise UserError(f"comparison {comparison.id}: the prompt has no tokens, and the tokenizer no BOS")
        reference = prefix if self.config.user_text_in_reference else prefix._replace(user_text=[])
        encoded = EncodedComparison(
            prefix.ids, reference.ids, chosen, rejected, users.number(comparison.user),
            comparison.margin,
        )  # fmt: skip
        report.comparisons += 1
        report.prompts_truncated += prefix.prompt_cut > 0
        report.user_texts_truncated += prefix.user_text_cut > 0
        report.tokens += encoded.length
        return encoded

    def response_ids(self, response: str) -> list[int]:
        """Tokens of y, EOS included."""
        return self._ids(response) + [self.eos]

    def _responses(self, comparison: Comparison) -> tuple[list[int], list[int]]:
        """What follows the prefix: both responses; for a pairwise model the question with y1 first, and second."""
        if self.question is None:
            return self.response_ids(comparison.chosen), self.response_ids(comparison.rejected)
        chosen, rejected = self._ids(comparison.chosen), self._ids(comparison.rejected)
        return self.question.ask(chosen, rejected), self.question.ask(rejected, chosen)
