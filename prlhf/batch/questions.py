"""What a pairwise preference model reads: a question about both responses, to which it answers A or B."""

from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from prlhf.errors import UserError

# What a pairwise preference model reads after the prompt, and the two words it may answer.
QUESTION = ("\n\nResponse A:\n", "\n\nResponse B:\n", "\n\nThe better response is Response")
ANSWERS = (" A", " B")


class PairQuestion(NamedTuple):
    """The tokens of "Response A: ... Response B: ... The better response is Response", and of the answers A and B."""

    before_a: list[int]
    before_b: list[int]
    end: list[int]
    answer_a: int
    answer_b: int

    def ask(self, a: list[int], b: list[int]) -> list[int]:
        """The question's tokens; the last one predicts the answer."""
        return self.before_a + a + self.before_b + b + self.end


def pair_question(tokenizer: PreTrainedTokenizerBase) -> PairQuestion:
    """QUESTION and ANSWERS as tokens. UserError where the answers do not differ in their last token alone."""

    def ids(text: str) -> list[int]:
        before = "x" if begins_with_space(tokenizer) else ""  # no part of the question begins a text
        known, both = tokenizer([before, before + text], add_special_tokens=False)["input_ids"]
        return both[len(known) :]

    before_a, before_b, end, a, b = map(ids, (*QUESTION, *ANSWERS))
    if a[:-1] != b[:-1] or a[-1] == b[-1]:
        raise UserError(f"method pairwise: the tokenizer does not tell {ANSWERS[0]!r} from {ANSWERS[1]!r} by one token")
    return PairQuestion(before_a, before_b, end + a[:-1], a[-1], b[-1])


def begins_with_space(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether a text alone has a space before it that the same text behind a newline has not (SentencePiece)."""
    alone, behind = tokenizer(["a", "\na"], add_special_tokens=False)["input_ids"]
    return behind[-len(alone) :] != alone
