"""Records to `Comparison`s: (x, y1, y2, u), with every field checked."""

import contextlib
import json
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from prlhf.config.keys import DataConfig
from prlhf.data.files import Record, read_json_lines, read_records
from prlhf.data.names import LOSSY, MISSING, canonical, folded
from prlhf.errors import UserError, did_you_mean

GENERIC = "generic"  # what people type for user 0
CANONICAL = DataConfig()
Messages = tuple[dict[str, Any], ...]  # each with a role, a content, and what else a chat template may read
Tools = tuple[dict[str, Any], ...]  # JSON schemas of the functions that an assistant may call
# What a message may hold beside its content that the model would read, in Hugging Face's names for it.
BESIDE_CONTENT = ("tool_calls", "function_call", "reasoning_content", "reasoning", "thinking")


@dataclass(frozen=True)
class Comparison:
    """(x, y1, y2, u): a prompt, the response that the user chose, the one that the user rejected, and the user."""

    prompt: str | Messages
    chosen: str
    rejected: str
    user: str | None
    user_text: str | None
    id: str
    first: str | None = None  # the response that the user was shown first, "chosen" or "rejected", where known
    margin: float = 1.0  # how much better the chosen one is, in units of the config's loss.margin
    tools: Tools | None = None
    where: str = field(default="", compare=False)  # "FILE, line 3", for errors


class ComparisonFile(NamedTuple):
    """The comparisons of a file, and how many were left out because both responses are the same text."""

    comparisons: list[Comparison]
    equal_responses: int

    def sample(self, limit: int | None, seed: int) -> "ComparisonFile":
        """A seeded sample of `limit` comparisons in their order; the file itself where limit is None or larger."""
        if limit is None or limit >= len(self.comparisons):
            return self
        chosen = sorted(random.Random(seed).sample(range(len(self.comparisons)), limit))
        return self._replace(comparisons=[self.comparisons[i] for i in chosen])


def read_comparisons(path: str | Path, config: DataConfig = CANONICAL) -> ComparisonFile:
    """All comparisons of a file; pairs of equal responses are left out and counted.

    config: format, user_column and attributes. UserError, with file, line and field, where a record is no comparison, and
    where no record has the user_column or an attribute.
    """
    comparisons, equal = [], 0
    columns: set[str] = set()
    attributes: set[str] = set()
    for _, record, comparison in read_parsed(path, config):
        columns.update(record)
        attributes.update((config.attributes and record.get("attributes")) or ())
        if comparison.chosen == comparison.rejected:
            equal += 1
        else:
            comparisons.append(comparison)
    if config.user_column not in columns | {"user"}:
        hint = did_you_mean(config.user_column, columns)
        raise UserError(f"{path}: no record has the field data.user_column: {config.user_column!r}{hint}")
    for name in config.attributes or ():
        if name not in attributes:
            hint = did_you_mean(name, attributes)
            raise UserError(f"{path}: no record has the attribute {name!r} of data.attributes{hint}")
    if not comparisons:
        raise UserError(f"{path}: no comparison with two different responses")
    return ComparisonFile(comparisons, equal)


def read_parsed(path: str | Path, config: DataConfig = CANONICAL) -> Iterator[tuple[str, Record, Comparison]]:
    """("FILE, line 3", record, comparison) for each record of a file, `named_user`. UserError where it is no comparison."""
    for where, number, record in read_records(path, config.format):
        record = named_user(record, config.user_column)
        yield where, record, parse_comparison(record, where, f"{Path(path).name}:{number}", config.attributes)


def named_user(record: Record, column: str) -> Record:
    """The record with its user taken from another column."""
    return record if column == "user" else {**record, "user": record.get(column)}


def parse_comparison(record: Record, where: str, default: str, attributes: Sequence[str] | None = None) -> Comparison:
    """One canonical record; other fields are ignored. UserError names `where`, the field and what was expected.

    attributes: which of the record's attributes make up the user text; None: the record's user_text.
    """
    record = split_conversations(record)
    for name in ("prompt", "chosen", "rejected"):
        require_field(record, name, where)
    first = record.get("first")
    if first not in (None, "chosen", "rejected"):
        raise UserError(f"{where}, first: expected 'chosen', 'rejected' or null, found {shortened(first)}")
    return Comparison(
        prompt=parse_prompt(record["prompt"], where),
        chosen=parse_response(record["chosen"], f"{where}, chosen"),
        rejected=parse_response(record["rejected"], f"{where}, rejected"),
        user=parse_user(record.get("user"), f"{where}, user"),
        user_text=parse_user_text(record, where, attributes),
        id=id_of(record, default),
        first=first,
        margin=_parse_margin(record.get("margin"), f"{where}, margin"),
        tools=parse_tools(record.get("tools"), where),
        where=where,
    )


def require_field(record: Record, name: str, where: str) -> None:
    """UserError, with a near match, where the record has no such field."""
    if name not in record:
        raise UserError(f"{where}: no field {name!r}{did_you_mean(name, record)}")


def id_of(record: Record, default: str | int) -> str:
    """The id of a record as text; the default where it has none, or null."""
    found = record.get("id")
    return str(default if found is None else found)


def split_conversations(record: Record) -> Record:
    """Split responses that are whole conversations (TRL's other forms) into the prompt and the last messages.

    They must agree in all but the last message, and with the record's prompt if any; other records stay as they are.
    """
    chosen, rejected = record.get("chosen"), record.get("rejected")
    if not (_are_messages(chosen) and _are_messages(rejected) and len(chosen) > 1 and chosen[:-1] == rejected[:-1]):
        return record
    if record.get("prompt", chosen[:-1]) not in (chosen[:-1], chosen[-2].get("content")):
        return record
    return {**record, "prompt": chosen[:-1], "chosen": chosen[-1:], "rejected": rejected[-1:]}


def parse_prompt(prompt: Any, where: str) -> str | Messages:
    """A prompt: text that is not empty, or a list of {"role", "content"} messages with all that they hold but nulls.

    An assistant message with tool_calls may have a null content. UserError otherwise.
    """
    if isinstance(prompt, str) and prompt:
        return prompt
    if _are_messages(prompt):
        return tuple({k: v for k, v in m.items() if v is not None or k == "content"} for m in prompt)
    found = shortened(prompt)
    raise UserError(f"{where}, prompt: expected text or a list of {{role, content}} messages, found {found}")


def parse_tools(tools: Any, where: str) -> Tools | None:
    """The tools of a record: a list of JSON schemas or, as TRL writes it too, that list as JSON text; None for none."""
    found = tools
    if isinstance(tools, str):
        with contextlib.suppress(ValueError):
            found = json.loads(tools)
    if not found:
        return None
    if not isinstance(found, list) or not all(isinstance(tool, dict) for tool in found):
        raise UserError(f"{where}, tools: expected a list of JSON schemas, found {shortened(tools)}")
    return tuple(found)


def parse_response(response: Any, where: str) -> str:
    """A response: text, or a list of one assistant message that is no more than its text. UserError otherwise."""
    if isinstance(response, str):
        return response
    if _are_messages(response) and len(response) == 1 and response[0]["role"] == "assistant":
        if beside := [name for name in BESIDE_CONTENT if response[0].get(name)]:
            raise UserError(
                f"{where}: found a message with {' and '.join(beside)}; expected its content alone, with what else the "
                "model is to answer written there as the model writes it"
            )
        return response[0]["content"]
    raise UserError(f"{where}: expected text or a list of one assistant message, found {shortened(response)}")


def parse_user(user: Any, where: str) -> str | None:
    """The user's `canonical` name, or a whole number's digits; None for null, NaN or "".

    UserError for all else, for `generic`, and for what programs make of missing names and of long numbers.
    """
    if user is None or user != user:
        return None
    whole = type(user) is int or (isinstance(user, float) and user.is_integer())
    if not whole and not isinstance(user, str):
        raise UserError(f"{where}: expected a string, a whole number or null, found {shortened(user)}")
    name = canonical(str(user))
    if name and not folded(name):
        raise UserError(f"{where}: {name!r} has no character that can be seen; expected a name or null")
    if name == GENERIC:
        raise UserError(f"{where}: {GENERIC!r} is the name of the unknown user; expected another name or null")
    if name in MISSING:
        raise UserError(
            f"{where}: {name!r} is what programs write where there is no name; expected null, or another name"
        )
    if LOSSY.fullmatch(name):
        raise UserError(
            f"{where}: {name} is a number without its last digits, written as a float; expected all of them"
        )
    return name or None


def parse_user_text(record: Record, where: str, attributes: Sequence[str] | None = None) -> str | None:
    """The optional text about the user, None where there is none.

    attributes: make it of these, a line for each that is there. UserError: not text, or attributes that are not texts.
    """
    if attributes is not None:
        by_name = record.get("attributes") or {}
        if not isinstance(by_name, dict) or not all(isinstance(value, str | None) for value in by_name.values()):
            raise UserError(f"{where}, attributes: expected texts by name, found {shortened(by_name)}")
        return attributes_text({name: by_name[name] for name in attributes if by_name.get(name)})
    text = record.get("user_text")
    if text is not None and not isinstance(text, str):
        raise UserError(f"{where}, user_text: expected text or null, found {shortened(text)}")
    return text or None


def attributes_text(attributes: dict[str, str]) -> str | None:
    """The user text that a user's attributes make: a line "name: value" each; None where there are none."""
    return "\n".join(f"{name}: {value}" for name, value in attributes.items()) or None


def _parse_margin(margin: Any, where: str) -> float:
    if margin is None:
        return 1.0
    with contextlib.suppress(ValueError):
        margin = float(margin) if isinstance(margin, str) else margin  # text: a cell of a CSV file
    if type(margin) not in (int, float) or not 0 <= margin < float("inf"):
        raise UserError(f"{where}: expected a number of at least 0 or null, found {shortened(margin)}")
    return float(margin)


def _are_messages(value: Any) -> bool:
    """Whether it is a list of {"role", "content"} messages that is not empty. Only tool_calls may stand for the content."""

    def is_message(m: Any) -> bool:
        if not isinstance(m, dict) or not isinstance(m.get("role"), str):
            return False
        return isinstance(m.get("content"), str) or (m.get("content") is None and bool(m.get("tool_calls")))

    return isinstance(value, list) and len(value) > 0 and all(map(is_message, value))


class Prompt(NamedTuple):
    """A line of a prompts file: a name for the prompt, the prompt, and optionally its user and the text about them."""

    id: str
    text: str | Messages
    user: str | None
    user_text: str | None
    where: str  # "FILE, line 3"
    tools: Tools | None = None


def read_prompts(path: str | Path, config: DataConfig = CANONICAL) -> list[Prompt]:
    """The prompts of a JSON Lines file: {"prompt", "id"?, "user"?, "user_text"?}. The default id is the line's number.

    config: user_column (where a line has it) and attributes. UserError, with file and line: no prompt, a repeated id.
    """
    prompts: list[Prompt] = []
    lines: dict[str, int] = {}
    for number, record in read_json_lines(path):
        where = f"{path}, line {number}"
        require_field(record, "prompt", where)
        name = id_of(record, number)
        if name in lines:
            raise UserError(f"{where}: id {name!r} was given in line {lines[name]} already; expected each once")
        lines[name] = number
        record = named_user(record, config.user_column) if config.user_column in record else record
        user = parse_user(record.get("user"), f"{where}, user")
        text = parse_user_text(record, where, config.attributes)
        tools = parse_tools(record.get("tools"), where)
        prompts.append(Prompt(name, parse_prompt(record["prompt"], where), user, text, where, tools))
    return prompts


def shortened(value: Any) -> str:
    """A value as JSON, for a message: at most 60 characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= 60 else text[:57] + "..."


def words(text: str) -> int:
    """The number of words: what white space separates."""
    return len(text.split())
