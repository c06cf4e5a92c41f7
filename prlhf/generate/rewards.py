"""Rewards of single responses: a file of (prompt, response, user) lines, scored in batches by a reward model.

A line is {"prompt": text or messages, "response": text, "user": name, generic or null, "user_text"?, "id"?}, as
generate.py writes; the user may also stand in `data.user_column`. The output has {"id", "user", "known", "reward"} for
each line, in order; of a model with adapted users (`adapt`) also "reward_std", the reward's standard deviation under the posterior
of its user's vector, and "probability", that the response is preferred to the file's others (`Doubt`); null for other users. An
unknown user is scored as the generic one, and "known" says so. Rewards of responses to one prompt can be compared: all follow it as cut for the longest. Their zero means nothing: Bradley-Terry
leaves it open.
"""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from prlhf.backbone.loading import choose_device
from prlhf.batch.order import whole_groups
from prlhf.batch.tokens import Encoder
from prlhf.batch.trees import Reading
from prlhf.config.keys import DataConfig, has_linear_coordinates
from prlhf.data import comparisons as parse
from prlhf.data.check.rules import prompt_key
from prlhf.data.comparisons import CANONICAL, GENERIC, Messages, Tools
from prlhf.data.files import read_json_lines, write_json_lines
from prlhf.data.unknown import check_users
from prlhf.errors import UserError, did_you_mean
from prlhf.method.models import PersonalizedRewardModel
from prlhf.method.posterior import features, integrated
from prlhf.score.agreement import check_agreement
from prlhf.score.slopes import reward_slopes
from prlhf.store.final import Loaded


class ScoredLine(NamedTuple):
    """A response to be scored, and the file and line where it is."""

    prompt: str | Messages
    response: str
    user: str | None
    user_text: str | None
    id: str
    where: str
    tools: Tools | None = None


def read_lines(path: str | Path, config: DataConfig = CANONICAL) -> list[ScoredLine]:
    """The lines of a file to be scored; config: its user_column and attributes. UserError with file, line and field."""
    lines = []
    for number, record in read_json_lines(path):
        where = f"{path}, line {number}"
        record = parse.named_user(record, config.user_column) if config.user_column in record else record
        for name in ("prompt", "response"):
            if name not in record:
                raise UserError(f"{where}: no field {name!r}{did_you_mean(name, record)}")
        prompt = parse.parse_prompt(record["prompt"], where)
        response = parse.parse_response(record["response"], f"{where}, response")
        user = parse.parse_user(None if record.get("user") == GENERIC else record.get("user"), f"{where}, user")
        user_text = parse.parse_user_text(record, where, config.attributes)
        tools = parse.parse_tools(record.get("tools"), where)
        lines.append(ScoredLine(prompt, response, user, user_text, parse.id_of(record, number), where, tools))
    return lines


class EncodedLine(NamedTuple):
    """What the model reads of a line, and whether its prompt or user text was cut."""

    reading: Reading
    cut: bool


def encode(lines: Sequence[ScoredLine], encoder: Encoder, users: Sequence[int]) -> list[EncodedLine]:
    """The lines' token ids; lines of one prompt and user text have one prefix. UserError where too little room is left."""
    prompts = [encoder.read(line.prompt, line.where, line.tools) for line in lines]
    responses = [encoder.response_ids(x, line.response)[0].ids for x, line in zip(prompts, lines)]
    keys = [(prompt_key(line.prompt), line.user_text) for line in lines]
    longest: dict[Hashable, int] = defaultdict(int)
    for key, response in zip(keys, responses):
        longest[key] = max(longest[key], len(response))
    encoded = []
    for line, prompt, key, response, user in zip(lines, prompts, keys, responses, users):
        room = encoder.config.max_tokens - longest[key]
        prefix = encoder.prefix_to_answer(prompt, line.user_text, line.where, room)
        reading = Reading(user, tuple(prefix.ids), tuple(response), prefix.tail)
        encoded.append(EncodedLine(reading, prefix.prompt_cut > 0 or prefix.user_text_cut > 0))
    return encoded


class Doubt(NamedTuple):
    """How sure a reward is under the posterior of its user: its standard deviation, and the probability that the response is
    preferred, the mean over the file's other responses to this prompt for this user; None where there is none."""

    std: float
    probability: float | None


def doubts(loaded: Loaded, readings: Sequence[Reading], rewards_N: Tensor, batch_size: int) -> list[Doubt | None]:
    """Of each reward; None for users who were not adapted. To first order where rewards are not linear in the user's coordinates.

    E s(k (r - r')), s the sigmoid, by `integrated`: the posterior of the difference, k the user's sharpness.
    """
    posterior, model = loaded.posterior, loaded.model
    found: list[Doubt | None] = [None] * len(readings)
    assert posterior is not None and isinstance(model, PersonalizedRewardModel)
    linear = has_linear_coordinates(loaded.config)
    variances = posterior.variances if linear else posterior.row_variances
    rows = [i for i, reading in enumerate(readings) if posterior.row(reading.user) is not None]
    for rivals in rival_groups([readings[i] for i in rows], batch_size):
        some = [[rows[n] for n in group] for group in rivals]
        flat = [readings[i] for group in some for i in group]
        parts = [flat[start : start + batch_size] for start in range(0, len(flat), batch_size)]
        x_NX = torch.cat(
            [features(model.user_model, model.states_of(p)) if linear else reward_slopes(model, p) for p in parts]
        )
        stds = variances([reading.user for reading in flat], x_NX).sqrt().tolist()
        start = 0
        for group in some:
            n = len(group)
            user, x_RX, r_R = readings[group[0]].user, x_NX[start : start + n], rewards_N[group].double()
            difference_RR = r_R[:, None] - r_R
            variance_RR = torch.stack([variances([user] * n, x_X - x_RX) for x_X in x_RX])
            p_RR = integrated(difference_RR, variance_RR, posterior.law_of(user).sharpness).sigmoid()
            wins_R = (p_RR.sum(dim=1) - 0.5) / (n - 1) if n > 1 else [None]  # without itself, against which it is 1/2
            for i, std, wins in zip(group, stds[start : start + n], wins_R):
                found[i] = Doubt(std, None if wins is None else float(wins))
            start += n
    return found


def rival_groups(readings: Sequence[Reading], batch_size: int) -> list[list[list[int]]]:
    """Readings of one user and prefix together, in batches of whole groups: of batch_size, or of one group that is larger."""
    groups: dict[Hashable, list[int]] = defaultdict(list)
    for n, reading in enumerate(readings):
        groups[reading.user, reading.prefix].append(n)
    found = list(groups.values())
    return [[found[n] for n in some] for some in whole_groups([len(group) for group in found], batch_size)]


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
    """Score every line of `path`, write `out`, and return a summary. UserError for a model that scores no single response."""
    if loaded.config.method != "prm":
        raise UserError(f"{loaded.path}: found method {loaded.config.method}, expected prm: it alone scores a response")
    if Path(out).exists() and Path(out).samefile(path):
        raise UserError(f"{out}: is --score itself, which is never replaced; expected another --out")
    if Path(out).exists() and not overwrite:
        raise UserError(f"{out}: exists; expected another --out or --overwrite")
    lines = read_lines(path, loaded.config.data)
    if said_of_users := check_users(path, [line.user for line in lines], loaded.users, loaded.config.data, "response"):
        print(said_of_users)
    encoder = Encoder(loaded.tokenizer, loaded.config.data, place=loaded.config.user_model.place)
    encoded = encode(lines, encoder, [loaded.number(line.user) for line in lines])
    model = loaded.model.to(choose_device(loaded.config.device))
    check_agreement(model)
    scored = rewards(model, [line.reading for line in encoded], batch_size)
    if not scored.isfinite().all():
        raise UserError(f"{loaded.path}: {int((~scored.isfinite()).sum())} of {len(lines)} rewards are not finite")
    known = [loaded.users.number(line.user) > 0 for line in lines]
    records = [{"id": n.id, "user": n.user, "known": k, "reward": r} for n, k, r in zip(lines, known, scored.tolist())]
    if loaded.posterior is not None:
        for record, doubt in zip(records, doubts(loaded, [line.reading for line in encoded], scored, batch_size)):
            record |= {"reward_std": doubt and doubt.std, "probability": doubt and doubt.probability}
    write_json_lines(out, records)
    nobody = sum(line.user is None for line in lines)
    counts = {
        "of users who are not known to the model": len(lines) - nobody - sum(known),
        "without a user": nobody,
        "prompts or user texts truncated": sum(line.cut for line in encoded),
    }
    said = [f"{count} {what}" for what, count in counts.items() if count]
    return f"{out}: {', '.join([f'{len(lines)} rewards', *said])}"
