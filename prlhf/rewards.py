"""Rewards of single responses: a file of (prompt, response, user) lines, scored in batches by a reward model.

A line is {"prompt": text or messages, "response": text, "user": name, generic or null, "user_text"?, "id"?}, so what
generate.py wrote can be scored; a line of the output, in the same order, {"id", "user", "known", "reward"}. A user whom
the model does not know is scored as the generic one, and "known" says so. Rewards to one prompt can be compared; Bradley-Terry leaves their zero open.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from prlhf.backbones import choose_device
from prlhf.batching import Reading
from prlhf.checkpoint import Loaded
from prlhf.data import (
    GENERIC,
    Messages,
    parse_prompt,
    parse_response,
    parse_user,
    parse_user_text,
)
from prlhf.data.files import read_json_lines, write_json_lines
from prlhf.encoding import Encoder
from prlhf.errors import UserError, did_you_mean
from prlhf.personalized import PersonalizedRewardModel


class ScoredLine(NamedTuple):
    """A response to be scored, and where it stands."""

    prompt: str | Messages
    response: str
    user: str | None
    user_text: str | None
    id: str
    where: str


def read_lines(path: str | Path, attributes: Sequence[str] | None = None) -> list[ScoredLine]:
    """The lines of a file to be scored; attributes: as in `parse_comparison`. UserError with file, line and field."""
    lines = []
    for number, record in read_json_lines(path):
        where = f"{path}, line {number}"
        for name in ("prompt", "response"):
            if name not in record:
                raise UserError(f"{where}: no field {name!r}{did_you_mean(name, record)}")
        lines.append(
            ScoredLine(
                parse_prompt(record["prompt"], where),
                parse_response(record["response"], f"{where}, response"),
                None if record.get("user") == GENERIC else parse_user(record.get("user"), f"{where}, user"),
                parse_user_text(record, where, attributes),
                str(record.get("id", number)),
                where,
            )
        )
    return lines


class EncodedLine(NamedTuple):
    """What of a line the model reads, and whether its prompt or user text was cut."""

    reading: Reading
    cut: bool


def encode(line: ScoredLine, encoder: Encoder, user: int) -> EncodedLine:
    """A line's token ids. UserError where too little room is left for its prompt."""
    response = encoder.response_ids(line.response)
    room = encoder.config.max_tokens - len(response)
    prefix = encoder.prefix_to_answer(line.prompt, line.user_text, line.where, room)
    reading = Reading(user, tuple(prefix.ids), tuple(response))
    return EncodedLine(reading, prefix.prompt_cut > 0 or prefix.user_text_cut > 0)


@torch.inference_mode()
def rewards(model: PersonalizedRewardModel, readings: Sequence[Reading], batch_size: int) -> Tensor:
    """r_P(x, y, u) of each response, (N,) on the CPU, computed in batches of similar length."""
    order = sorted(range(len(readings)), key=lambda i: (-len(readings[i].prefix) - len(readings[i].response), i))
    found = torch.zeros(len(readings))
    for start in tqdm(range(0, len(order), batch_size), desc="scoring", unit="batch", disable=None):
        indices = order[start : start + batch_size]
        found[indices] = model.rewards([readings[i] for i in indices]).cpu().to(found.dtype)
    return found


def score_file(loaded: Loaded, path: str, out: str, batch_size: int, overwrite: bool) -> str:
    """Score every line of `path`, write `out`, and say how many. UserError for a model that scores no single response."""
    if loaded.config.method != "prm":
        raise UserError(f"{loaded.path}: found method {loaded.config.method}, expected prm: it alone scores a response")
    if Path(out).exists() and not overwrite:
        raise UserError(f"{out}: exists; expected another --out or --overwrite")
    lines = read_lines(path, loaded.config.data.attributes)
    encoder = Encoder(loaded.tokenizer, loaded.config.data)
    numbers = [loaded.number(line.user) for line in lines]
    encoded = [encode(line, encoder, user) for line, user in zip(lines, numbers)]
    model = loaded.model.to(choose_device(loaded.config.device))
    scored = rewards(model, [line.reading for line in encoded], batch_size)
    if not scored.isfinite().all():
        raise UserError(f"{loaded.path}: {int((~scored.isfinite()).sum())} of {len(lines)} rewards are not finite")
    records = zip(lines, numbers, scored.tolist())
    write_json_lines(out, ({"id": n.id, "user": n.user, "known": user > 0, "reward": r} for n, user, r in records))
    said = [f"{len(lines)} rewards"]
    strangers = sum(line.user is not None and user == 0 for line, user in zip(lines, numbers))
    said += [f"{strangers} of users who are not known to the model"] if strangers else []
    cut = sum(line.cut for line in encoded)
    said += [f"{cut} prompts or user texts truncated"] if cut else []
    return f"{out}: {', '.join(said)}"
