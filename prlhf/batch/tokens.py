"""Comparisons to token ids: one rule for BOS, templates and truncation.

    prefix = [BOS] u_t x,   responses = y EOS

BOS comes first, once, where the tokenizer itself begins a text with it. EOS is the token that ends an answer: what the chat
template puts behind one (`<|eot_id|>`, `<end_of_turn>`), else the tokenizer's. Responses are never cut, so each has it. A
prompt that is too long loses its oldest tokens, so it keeps the assistant header or `TL;DR:` at its end. The last tokens of x
that the template put behind the prompt's content are its tail; user vectors may stand before it (`user_model.place`). For a
pairwise preference model the two "responses" are the two orders of one question about both (`PairQuestion`).
"""

import re
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import NamedTuple

from transformers import GenerationConfig, PreTrainedTokenizerBase

from prlhf.batch.questions import begins_with_space, pair_question
from prlhf.batch.templates import ChatTemplate
from prlhf.config.keys import DataConfig
from prlhf.data.comparisons import Comparison, Messages, Tools
from prlhf.data.users import UserIndex
from prlhf.errors import UserError

WINDOW = 64  # characters of a text that tell how the tokens of another begin behind it


class EncodedComparison(NamedTuple):
    """A comparison as token ids. `prefix` is [BOS] u_t x; both responses end in EOS; user 0 is unknown."""

    prefix: list[int]
    reference_prefix: list[int]  # what the reference model sees: with or without u_t
    chosen: list[int]
    rejected: list[int]
    user: int
    margin: float = 1.0
    tail: int = (
        0  # with user_model.place prompt_end, how many tokens of both prefixes stand behind the prompt's content
    )

    @property
    def length(self) -> int:
        """Tokens of the preference tree."""
        return len(self.prefix) + len(self.chosen) + len(self.rejected)


class Behind(NamedTuple):
    """The tokens of a text behind another one, and whether the tokenizer merges over the boundary (see `Encoder`)."""

    ids: list[int]
    merged: bool


class ReadPrompt(NamedTuple):
    """x as the model reads it, through the chat template where that takes it."""

    text: str
    ids: list[int]  # without BOS
    space: str  # white space that the template puts before an answer
    end: int  # the token that ends an answer to it
    tail: int  # with user_model.place prompt_end, how many of the ids stand behind the prompt's content


class EncodedPrompt(NamedTuple):
    """The parts of a prefix, and how many tokens of u_t and x were cut."""

    bos: list[int]
    user_text: list[int]
    prompt: list[int]
    tail: int  # how many of the last tokens stand behind the prompt's content, as of `ReadPrompt`
    user_text_cut: int
    prompt_cut: int

    @property
    def ids(self) -> list[int]:
        """[BOS] u_t x."""
        return self.bos + self.user_text + self.prompt


@dataclass
class EncodingReport:
    """How many comparisons of a file became tokens, and how many were dropped or truncated."""

    comparisons: int = 0
    equal_responses_dropped: int = 0
    too_long_dropped: int = 0
    prompts_truncated: int = 0
    user_texts_truncated: int = 0
    boundaries_merged: int = 0  # comparisons with a response that the tokenizer would join to the prompt's last token
    tokens: int = 0

    def lines(self) -> str:
        """The counts that are not zero, in one line."""
        return ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in asdict(self).items() if count)


def bos_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """[BOS] where the tokenizer itself begins a text with it (Llama), else [] (GPT-J, SmolLM2)."""
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and tokenizer("a")["input_ids"][:1] == [bos] else []


def common_start(one: list[int], other: list[int]) -> int:
    """How many first tokens two texts have in common."""
    return next((n for n, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))


class Encoder:
    """Token ids of prompts and comparisons for one tokenizer, one `data` group of the config, one method, and one place of
    user vectors (`user_model.place`).

    A response has the tokens that the whole text x y has behind those of x: SentencePiece begins a text with a space, which a
    model never reads behind a newline. Where the tokens of x are not the first of the whole text's (x ends in a space, say, which
    joins the first word of y), the boundary merges: generation could not go on from x so, and y has its own tokens.

    The tail of x begins with the first token that is not one of its content's, so that its tokens are the same at each place.
    """

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, config: DataConfig, method: str = "pdpo", place: str = "before_prompt"
    ):
        if tokenizer.eos_token_id is None:
            raise UserError("the tokenizer has no EOS token, which must end every response")
        self.tokenizer = tokenizer
        self.config = config
        self.place = place
        self.eos = tokenizer.eos_token_id
        self.bos = bos_ids(tokenizer)
        self.spaced = begins_with_space(tokenizer)
        self.template = ChatTemplate(tokenizer, config)
        end = self.template.around.end
        self.ends = {self.eos, self.eos if end is None else end}
        self.question = pair_question(tokenizer) if method == "pairwise" else None

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def read(self, prompt: str | Messages, where: str, tools: Tools | None = None) -> ReadPrompt:
        """x as the model reads it. UserError, with `where`, if the chat template refuses it."""
        text = self.template.text(prompt, tools, where)
        all_ids = self._ids(text)
        ids = self._without_bos(all_ids)
        if not self.template.takes(prompt):
            return ReadPrompt(text, ids, "", self.eos, tail=0)
        (space, end, _), tail = self.template.around, 0
        if self.place == "prompt_end":
            content = self._ids(text.removesuffix(self.template.tail(prompt, tools, where, text)))
            tail = len(all_ids) - common_start(content, all_ids)
        end = self.eos if end is None else end
        return ReadPrompt(text, ids, space if self.spaced else "", end, min(tail, len(ids)))

    def _without_bos(self, ids: list[int]) -> list[int]:
        """The tokens without the BOS that a text or a template may say itself."""
        first = next((i for i, token in enumerate(ids) if [token] != self.bos), len(ids))
        return ids[first:]

    def stop_ids(self, generation: GenerationConfig | None) -> set[int]:
        """The tokens that end a generated answer: the template's turn end, and the tokenizer's and the model's EOS."""
        return self.ends | self._eos_ids(generation)

    def _eos_ids(self, generation: GenerationConfig | None) -> set[int]:
        """The model's EOS, which may be several."""
        others = getattr(generation, "eos_token_id", None)
        return {self.eos, *(others if isinstance(others, list) else [] if others is None else [others])}

    def unusual_end(self, prompts: Iterable[str | Messages], generation: GenerationConfig | None) -> str | None:
        """What to say about the end of answers to these prompts if the template's is no EOS of the model, else None."""
        if not any(map(self.template.takes, prompts)) or self.template.around.end in self._eos_ids(generation):
            return None
        eos = self.tokenizer.convert_ids_to_tokens(self.eos)
        if not self.template.around.found:
            return f"the chat template refuses made-up talks, so its turn end is not known; the tokenizer's EOS {eos!r} ends an answer"
        if self.template.around.end is None:
            return f"the chat template puts no special token behind an answer; the tokenizer's EOS {eos!r} ends it"
        end = self.tokenizer.convert_ids_to_tokens(self.template.around.end)
        return (
            f"the chat template ends an answer with {end!r}, which is no EOS of the model; here it ends responses in "
            f"training and generation, beside {eos!r}. Another program has to be told to stop at it"
        )

    def response_ids(self, prompt: ReadPrompt, *responses: str) -> list[Behind]:
        """Tokens of each y behind x, with the one token that ends it."""
        texts = [self._open(y, prompt.end) for y in responses]
        behind = self._behind(prompt.text, prompt.ids, *(prompt.space + y for y in texts))
        return [Behind((self._ids(y) if b is None else b) + [prompt.end], b is None) for y, b in zip(texts, behind)]

    def _behind(self, before: str, ids: list[int], *texts: str) -> list[list[int] | None]:
        """The tokens of each text behind the text `before`, whose own tokens end in `ids`; None if the boundary merges."""
        # The last characters of `before` tell as much as all of it, if their tokens are its last: those of the first half
        # may differ, because a word may be cut there.
        for start in (before[-WINDOW:], before):
            known, *both = self.tokenizer([start, *(start + y for y in texts)], add_special_tokens=False)["input_ids"]
            last = known[len(known) // 2 :]
            if ids[len(ids) - len(last) :] == last:
                break
        return [whole[len(known) :] if whole[: len(known)] == known else None for whole in both]

    def _in_question(self, response: str) -> list[int]:
        """Tokens of y in a `PairQuestion`, where it stands behind a newline."""
        y = self._open(response, self.eos)
        (ids,) = self._behind("\n", self._ids("\n"), y)
        return self._ids(y) if ids is None else ids

    def _open(self, response: str, end: int) -> str:
        """The response without the end, or EOS, that its text may have already, and white space behind that."""
        names = "|".join(map(re.escape, self.tokenizer.convert_ids_to_tokens([end, self.eos])))
        return re.sub(rf"(?:(?:{names})\s*)+\Z", "", response)

    def prefix(self, prompt: ReadPrompt, user_text: str | None, room: int) -> EncodedPrompt:
        """[BOS] u_t x in at most `room` tokens: a long u_t loses its end, a long x its oldest tokens."""
        text: list[int] = []
        ids = prompt.ids
        if user_text and self.config.user_text:
            before = user_text + "\n"
            text = self._without_bos(self._ids(before))
            x = prompt.text.removeprefix(self.tokenizer.bos_token or "")
            (behind,) = self._behind(before, text, x) if self.spaced else [None]
            ids = ids if behind is None else self._without_bos(behind)
        kept_text = text[: self.config.max_user_text_tokens]
        room = min(self.config.max_prompt_tokens, room - len(self.bos) - len(kept_text))
        kept = ids[-room:] if room > 0 else []
        tail = min(prompt.tail, len(kept))
        return EncodedPrompt(self.bos, kept_text, kept, tail, len(text) - len(kept_text), len(ids) - len(kept))

    def _too_short(self, prefix: EncodedPrompt) -> bool:
        """Whether truncation left too little of the prompt: fewer tokens than asked for, or none of its content."""
        return prefix.prompt_cut > 0 and len(prefix.prompt) < max(self.config.min_prompt_tokens, prefix.tail + 1)

    def prefix_to_answer(
        self, prompt: ReadPrompt, user_text: str | None, where: str, room: int | None = None
    ) -> EncodedPrompt:
        """[BOS] u_t x in `room` tokens (data.max_tokens by default). UserError naming `where` if too little of x is left."""
        prefix = self.prefix(prompt, user_text, self.config.max_tokens if room is None else room)
        if self._too_short(prefix) or not (self.bos or prefix.prompt):
            raise UserError(
                f"{where}: {len(prefix.prompt)} tokens are left of the prompt within data.max_tokens and "
                f"data.max_prompt_tokens; expected at least {max(self.config.min_prompt_tokens, prompt.tail + 1)}"
            )
        return prefix

    def encode(self, comparison: Comparison, users: UserIndex, report: EncodingReport) -> EncodedComparison | None:
        """The comparison's token ids, or None where its responses leave too little room for the prompt."""
        where = comparison.where or f"comparison {comparison.id}"
        prompt = self.read(comparison.prompt, where, comparison.tools)
        merged = False
        if self.question is None:
            y1, y2 = self.response_ids(prompt, comparison.chosen, comparison.rejected)
            chosen, rejected, merged = y1.ids, y2.ids, y1.merged or y2.merged
        else:  # the question with y1 first, and with y2 first
            a, b = map(self._in_question, (comparison.chosen, comparison.rejected))
            chosen, rejected = self.question.ask(a, b), self.question.ask(b, a)
        room = self.config.max_tokens - max(len(chosen), len(rejected))
        prefix = self.prefix(prompt, comparison.user_text, room)
        if self._too_short(prefix):
            report.too_long_dropped += 1
            return None
        if not (self.bos or prefix.prompt):
            raise UserError(f"{where}: the prompt has no tokens, and the tokenizer no BOS")
        reference = prefix
        if prefix.user_text and not self.config.user_text_in_reference:  # the same x, without u_t before it
            reference = self.prefix(prompt, None, len(self.bos) + len(prefix.prompt) if prefix.prompt_cut else room)
        user = users.number(comparison.user)
        encoded = EncodedComparison(prefix.ids, reference.ids, chosen, rejected, user, comparison.margin, prefix.tail)
        report.comparisons += 1
        report.prompts_truncated += prefix.prompt_cut > 0
        report.user_texts_truncated += prefix.user_text_cut > 0
        report.boundaries_merged += merged
        report.tokens += encoded.length
        return encoded
