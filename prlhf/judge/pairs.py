"""Two files of responses, matched: what A and what B answered to the same prompt of the same user."""

from collections.abc import Hashable, Iterator
from typing import NamedTuple

from prlhf.data.check.rules import prompt_key
from prlhf.data.comparisons import GENERIC, Messages, Tools, read_parsed, shortened
from prlhf.data.files import read_records
from prlhf.errors import UserError
from prlhf.generate.rewards import ScoredLine, read_lines

Key = tuple[Hashable, str | None]  # an exact prompt, and its user


class Pair(NamedTuple):
    """A prompt, its user (None: the generic user), and the responses of A and of B. The id is A's."""

    id: str
    prompt: str | Messages
    user: str | None
    user_text: str | None
    tools: Tools | None
    a: str
    b: str
    where: str  # "FILE, line 3" of A


def read_pairs(path_a: str, path_b: str) -> list[Pair]:
    """The pairs of two files, in A's order.

    Each file is what generate.py writes, or comparisons, whose chosen responses are taken. The user text and the tools of a
    pair are those of the file that has them. UserError where a file is empty or damaged, where it has a prompt of a user
    twice, where the files differ in prompts or users, and where they differ in the user text or the tools of a pair.
    """
    a, b = _responses(path_a), _responses(path_b)
    only_a, only_b = ([one[key] for key in one if key not in other] for one, other in ((a, b), (b, a)))
    if only_a or only_b:
        raise UserError(
            f"prompts or users do not match: {_missing(only_a)} only in {path_a}, {_missing(only_b)} only in {path_b}; "
            "expected the same prompts of the same users in both"
        )
    pairs = []
    for key, line in a.items():
        other = b[key]
        for name in ("user_text", "tools"):
            mine, theirs = getattr(line, name), getattr(other, name)
            if mine and theirs and mine != theirs:
                raise UserError(f"{line.where}, {name}: found another than in {other.where}; expected the same in both")
        text, tools = line.user_text or other.user_text, line.tools or other.tools
        pairs.append(Pair(line.id, line.prompt, line.user, text, tools, line.response, other.response, line.where))
    return pairs


def _responses(path: str) -> dict[Key, ScoredLine]:
    """The responses of a file by prompt and user. UserError where one prompt and user have two."""
    found: dict[Key, ScoredLine] = {}
    for line in _lines(path):
        key = (prompt_key(line.prompt), line.user)
        if key in found:
            raise UserError(f"{line.where}: {_title(line)} was in {found[key].where} already; expected it once")
        found[key] = line
    return found


def _lines(path: str) -> list[ScoredLine]:
    """The lines of a file of responses; of a file of comparisons, its first record having `chosen`, the chosen ones."""
    _, _, first = next(read_records(path))
    return list(_chosen(path)) if "chosen" in first and "response" not in first else read_lines(path)


def _chosen(path: str) -> Iterator[ScoredLine]:
    for where, _, c in read_parsed(path):
        yield ScoredLine(c.prompt, c.chosen, c.user, c.user_text, c.id, where, c.tools)


def _missing(lines: list[ScoredLine]) -> str:
    """How many there are, and the first of them."""
    return f"{len(lines):,} ({_title(lines[0])})" if lines else "none"


def _title(line: ScoredLine) -> str:
    return f"prompt {shortened(line.prompt)} of user {(line.user or GENERIC)!r}"
