"""What a judge is asked, and what it answers."""

from typing import Literal, NamedTuple

from prlhf.data.comparisons import Messages, Tools

Verdict = Literal["first", "second", "tie", "unparsed"]  # unparsed: an answer that could not be understood


class Query(NamedTuple):
    """What a judge is asked: which of two responses this user (None: nobody in particular) prefers."""

    prompt: str | Messages
    user: str | None
    user_text: str | None
    tools: Tools | None
    first: str
    second: str
    where: str  # "FILE, line 3", for errors


class Ruling(NamedTuple):
    """A verdict, and how certain of it the judge says to be, from 1 to 100; None where it does not say."""

    verdict: Verdict
    certainty: float | None = None
