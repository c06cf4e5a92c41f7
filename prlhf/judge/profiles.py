"""What is known of a user, for a judge who plays that user: a text, what they said of other answers, and comparisons of theirs.

Nothing is told that would answer what is judged: neither a comparison of the same prompt or of the same two responses, nor
one of a dialogue that begins in the same way, whose later prompts hold the chosen answers of the earlier ones. A dialogue may be
messages or one text: of two texts, the one that begins with the other is its later turn.
"""

import random
from collections.abc import Container, Hashable, Sequence
from dataclasses import dataclass, field
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

from prlhf.config.keys import DataConfig
from prlhf.data.check.rules import prompt_key
from prlhf.data.comparisons import CANONICAL, Comparison, Messages, parse_user_text, read_parsed, shortened
from prlhf.data.files import Record
from prlhf.data.names import canonical
from prlhf.errors import UserError
from prlhf.judge.queries import Query

EXAMPLES = 4  # comparisons of the user's that a judge reads
REASONS = 4  # statements of the user's that a judge reads: the latest
# Fields of a comparison in which its user says why, and how a judge reads them.
STATEMENTS = {"reason": "{}", "aspects": "What mattered: {}"}


class Profile(NamedTuple):
    """What a judge reads of a user beside the question."""

    text: str | None
    reasons: tuple[str, ...]
    examples: tuple[Comparison, ...]

    @property
    def empty(self) -> bool:
        """Whether nothing is known."""
        return not any(self)


@dataclass(frozen=True)
class Profiles:
    """What a file of comparisons says of each of its users; without a file, nothing.

    comparisons: each user's, in the order in which they are drawn; statements: (comparison, statement) in the file's order;
    examples: how many are read; with_text: whether text and statements are read.
    """

    texts: dict[str, str] = field(default_factory=dict)
    statements: dict[str, list[tuple[Comparison, str]]] = field(default_factory=dict)
    comparisons: dict[str, list[Comparison]] = field(default_factory=dict)
    examples: int = EXAMPLES
    with_text: bool = True

    def of(self, query: Query) -> Profile:
        """The profile of the user of a query. Which response is read first does not matter, nor whether the name is `canonical`.

        The text is the user's latest in the file, else the query's own. The statements are their latest REASONS, each once; the
        examples the first of those drawn, one of a prompt: both of other prompts, pairs and dialogues than the query's.
        """
        asked, pair, user = opening(query.prompt), {query.first, query.second}, canonical(query.user or "")

        def apart(c: Comparison) -> bool:
            return not same_dialogue(opening(c.prompt), asked) and {c.chosen, c.rejected} != pair

        of_a_prompt = groupby(filter(apart, self.comparisons.get(user, ())), lambda c: prompt_key(c.prompt))
        examples = tuple(islice((next(own) for _, own in of_a_prompt), self.examples))
        if not self.with_text:
            return Profile(None, (), examples)
        said = list(dict.fromkeys(text for c, text in self.statements.get(user, ()) if apart(c)))
        return Profile(self.texts.get(user) or query.user_text, tuple(said[-REASONS:]), examples)


def read_profiles(
    path: str | Path,
    examples: int = EXAMPLES,
    seed: int = 0,
    with_text: bool = True,
    config: DataConfig = CANONICAL,
    lines: Container[str] | None = None,
) -> Profiles:
    """The profiles of the users of a file of comparisons; those without a user tell nothing.

    config: the file's format, user_column and attributes; lines: only these ("FILE, line 3") are read.
    A user's text is the record's user_text, else its `attributes` by name, or those of the config alone; statements are the fields STATEMENTS. Each user's
    comparisons are drawn by the seed and the user's name, so that a user's examples differ between prompts only by what
    a prompt forbids. UserError, with file, line and field, where a record is no comparison or a statement no text.
    """
    profiles = Profiles(examples=examples, with_text=with_text)
    for where, record, c in read_parsed(path, config):
        if c.user is None or c.chosen == c.rejected or (lines is not None and where not in lines):
            continue
        profiles.comparisons.setdefault(c.user, []).append(c)
        if text := c.user_text or (_text_of_attributes(record, where) if config.attributes is None else None):
            profiles.texts[c.user] = text
        said = [(c, form.format(text)) for name, form in STATEMENTS.items() if (text := _text(record, name, where))]
        profiles.statements.setdefault(c.user, []).extend(said)
    for user, own in profiles.comparisons.items():
        profiles.comparisons[user] = drawn(own, random.Random(f"{seed} {user}"))
    return profiles


def drawn(own: Sequence[Comparison], rng: random.Random) -> list[Comparison]:
    """A user's comparisons with their prompts in random order, and those of one prompt side by side, in random order too.

    So a prompt with many rejected responses is as likely an example as one with a single one.
    """
    by_prompt: dict[Hashable, list[Comparison]] = {}
    for c in own:
        by_prompt.setdefault(prompt_key(c.prompt), []).append(c)
    prompts = list(by_prompt.values())
    rng.shuffle(prompts)
    return [c for prompt in prompts for c in rng.sample(prompt, len(prompt))]


def opening(prompt: str | Messages) -> str:
    """How a prompt begins: its text or its first user message, in words; equal prompts have equal ones."""
    first = prompt if isinstance(prompt, str) else next((m["content"] for m in prompt if m["role"] == "user"), None)
    return " ".join((first or "").split()) or str(prompt_key(prompt))


def same_dialogue(one: str, other: str) -> bool:
    """Whether one opening begins with the other: two turns of a dialogue as text, or the same prompt."""
    return one.startswith(other) or other.startswith(one)


def _text_of_attributes(record: Record, where: str) -> str | None:
    attributes = record.get("attributes")
    return (
        parse_user_text(record, where, tuple(attributes) if isinstance(attributes, dict) else ())
        if attributes
        else None
    )


def _text(record: dict[str, Any], name: str, where: str) -> str | None:
    value = record.get(name)
    if value is not None and not isinstance(value, str):
        raise UserError(f"{where}, {name}: expected text or null, found {shortened(value)}")
    return (value or "").strip() or None
