"""Raw files of a data set, or a file of comparisons, to train.jsonl, valid.jsonl, few_shot.jsonl and prompts.jsonl.

`prepare NAME` reads what `fetch NAME` has downloaded; `split FILE` takes any file of comparisons. Both write beside the
comparisons split.json: with which options, from which files (by checksum), how many there are of what, and who is known.
"""

import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prlhf.config.keys import DataConfig
from prlhf.data.comparisons import named_user, parse_comparison, split_conversations
from prlhf.data.files import read_records, sha256, write_json, write_json_lines
from prlhf.data.sets import multipref, persona, prism, psoups, tldr
from prlhf.data.sets.raw import Count, Options, RawSet, Record, raw_files, text_key
from prlhf.data.sets.splits import Judged, Shares, Split, judged, recurring, split, split_by_response, with_few_shot
from prlhf.data.sources import raw_folder, source_name
from prlhf.errors import UserError

PROMPTS = 50  # held-out prompts to generate answers to
NOT_FIELDS = ("prompt", "response")  # what `split --by` takes that is no dialogue's field
TRAINED = {"response": 0.7}  # of a user's responses, by default: 0.3^2 of the pairs are held out, about half trained on
OUTPUTS = ("train.jsonl", "valid.jsonl", "few_shot.jsonl", "prompts.jsonl")


class Reader(NamedTuple):
    """How a data set is read, from which files, and divided where it brings no split along."""

    read: Callable[[Path, Options], RawSet]
    files: tuple[str, ...]
    shares: Shares = Shares()


READERS = {
    "tldr": Reader(tldr.read, tldr.FILES),
    "tldr_length": Reader(tldr.read_length, tldr.FILES),
    "prism": Reader(prism.read, prism.FILES),
    "psoups": Reader(psoups.read, psoups.FILES, Shares(users=1.0)),  # six preferences, all of them known
    "persona": Reader(persona.read, persona.FILES),
    "multipref": Reader(multipref.read, multipref.FILES),
}
SAMPLE_SIZES = {"prism": (6_431, 3_982)}  # published: comparisons trained on, and held out


def prepare(name: str, raw: str | None, out: str | None, options: Options, overwrite: bool = False) -> None:
    """Read a data set's raw files, split them and write them. UserError for bad files, or where `out` holds others."""
    source, reader = source_name(name), READERS[name]
    folder = Path(raw).expanduser() if raw else raw_folder(source)
    target = Path(out or f"runs/data/{name}").expanduser()
    made_of = {path.name: sha256(path) for path in raw_files(folder, source, *reader.files)}
    settings = {"data": name, **asdict(options), "raw": made_of}
    if is_there(target, settings, overwrite):
        return
    reading = reader.read(folder, options)
    if reading.official is not None:
        made = with_few_shot(*reading.official, options.few_shot, options.seed)
    else:
        made = split(reading.records, reader.shares, options.seed, options.few_shot, reading.dialogues)
    counts = list(reading.counts)
    if name in SAMPLE_SIZES:
        held_out = len(made.valid) + len(made.few_shot)
        counts += map(Count, ("comparisons trained on", "held out"), (len(made.train), held_out), SAMPLE_SIZES[name])
    write(target, made, settings, counts, reading.dropped, reading.prompts)


def split_file(
    file: str, out: str, by: str | None, form: DataConfig, users: float, groups: float | None, options: Options,
    overwrite: bool,
) -> None:  # fmt: skip
    """Split a file of comparisons by prompt, by response, or by the dialogues of each user that the field `by` names.

    by: None is by response where a user judged one response in two different pairs, else by prompt. users, groups: the
    `Shares`; groups None is the default.
    """
    records, comparisons = read_for_split(file, None if by in NOT_FIELDS else by, form)
    if by is None:
        by = choose_by(comparisons)
    shares = Shares(users, TRAINED.get(by, Shares().groups) if groups is None else groups)
    settings = {"data": file, "seed": options.seed, "few_shot": options.few_shot, **shares._asdict(), "by": by,
                "user_column": form.user_column, "raw": {file: sha256(Path(file).expanduser())}}  # fmt: skip
    target = Path(out).expanduser()
    if Path(file).expanduser().resolve().parent == target.resolve() and Path(file).name in OUTPUTS:
        raise UserError(f"--out {out}: {file} itself would be replaced, expected another folder")
    if is_there(target, settings, overwrite):
        return
    if by == "response":
        made = split_by_response(records, comparisons, shares, options.seed, options.few_shot)
    else:
        made = split(records, shares, options.seed, options.few_shot, dialogues=by not in NOT_FIELDS)
    write(target, made, settings, [], {}, None)


def read_for_split(file: str, dialogue: str | None, form: DataConfig) -> tuple[list[Record], list[Judged]]:
    """A file's records, split_group being their prompt, or the dialogue that a field names; and what each of them says."""
    records, comparisons = [], []
    for where, number, record in read_records(file, form.format):
        name = f"{Path(file).name}:{number}"
        record = split_conversations(named_user(record, form.user_column))
        comparison = parse_comparison(record, where, name)
        comparisons.append(judged(comparison))
        if dialogue is not None and not isinstance(record.get(dialogue), str | int):
            raise UserError(f"{where}, {dialogue}: expected text or a number, the dialogue's name")
        group = json.dumps(record["prompt" if dialogue is None else dialogue], ensure_ascii=False)
        user = None if comparison.user is None else record["user"]
        records.append({"id": name, **record, "user": user, "split_group": text_key(group)})
    return records, comparisons


def choose_by(comparisons: Sequence[Judged]) -> str:
    """What to divide by where nothing is said, said with the reason: `recurring` responses, or else prompts."""
    user = recurring(comparisons)
    if user is None:
        print("divided by prompt: no user judged one response in two different pairs")
        return "prompt"
    print(
        f"divided by response: users judged one response in two different pairs, {user!r} for one, and no user's "
        "response may be on both sides. Where there are many prompts, --by prompt ensures that too, and leaves nothing out"
    )
    return "response"


def is_there(target: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether `target` holds the very split already, whole. UserError where it holds something else."""
    found = target / "split.json"
    if overwrite:
        return False
    if not found.exists():
        here = [name for name in OUTPUTS if (target / name).exists()]
        if here:
            raise UserError(
                f"{target / here[0]}: exists, of an unfinished or another split; expected another --out or --overwrite"
            )
        return False
    try:
        record = json.loads(found.read_text(encoding="utf-8"))
        saved = {**record["settings"], "by": record["settings"].get("by") or "prompt"}  # null was by prompt, once
        files = {name: entry["sha256"] for name, entry in record["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{found}: damaged; expected another --out or --overwrite") from None
    differing = [
        f"{key}: {saved.get(key)!r} -> {value!r}" for key, value in settings.items() if saved.get(key) != value
    ]
    if differing:
        raise UserError(
            f"{target}: made with other settings ({'; '.join(differing)}); expected another --out or --overwrite"
        )
    for name, checksum in files.items():
        if not (target / name).is_file() or sha256(target / name) != checksum:
            raise UserError(f"{target / name}: not as it was written; expected another --out or --overwrite")
    print(f"{target} is there already")
    return True


def write(
    target: Path,
    made: Split,
    settings: dict[str, Any],
    counts: Sequence[Count],
    dropped: dict[str, int],
    prompts: list[Record] | None,
) -> None:
    """Write the files of a split, split.json last, and say what was counted, against what was published.

    UserError, before anything is written, for what is no comparison.
    """
    parts = {"train.jsonl": made.train, "valid.jsonl": made.valid, "few_shot.jsonl": made.few_shot}
    for records in parts.values():
        for record in records:
            parse_comparison(record, f"{settings['data']}, {record['id']}", record["id"])
    parts["prompts.jsonl"] = evaluation_prompts(made.valid, settings["seed"]) if prompts is None else prompts
    for name in ("split.json", *OUTPUTS):
        (target / name).unlink(missing_ok=True)
    files: dict[str, dict[str, Any]] = {}
    for name, records in parts.items():
        if not records:
            continue
        write_json_lines(target / name, records)
        users = len({r["user"] for r in records if r.get("user") is not None})
        files[name] = {"records": len(records), "users": users, "sha256": sha256(target / name)}
        print(f"{target / name}: {len(records):,} {'prompts' if 'prompts' in name else 'comparisons'}, {users:,} users")
    dropped = {**dropped, **left_out(made)}
    for reason, number in dropped.items():
        if number:
            print(f"left out, {reason}: {number:,}")
    tell(counts)
    trained = {r["split_group"] for r in made.train}
    leaking = sum(r["split_group"] in trained for r in made.valid)
    if leaking:  # an official split may
        warning = "warning: " if made.straddling is None else ""  # by response prompts are not what is divided
        print(f"{warning}held-out comparisons on prompts that are trained on: {leaking:,}")
    users = {r["user"] for r in made.train if r["user"] is not None}
    known = sorted(users, key=lambda user: (isinstance(user, str), user))  # whole numbers are names too
    record = {
        "settings": settings,
        "files": files,
        "left_out": dropped,
        "on_trained_prompts": leaking,
        "known_users": known,
    }
    record["counts"] = [count._asdict() for count in counts]
    write_json(target / "split.json", record)


def left_out(made: Split) -> dict[str, int]:
    """Why comparisons are in no part of a split, and how many."""
    found = {"of unknown users, on what is trained on or in few_shot.jsonl": made.left_out}
    if made.straddling is not None:
        found["one response trained on (or in few_shot.jsonl) by its user, the other held out"] = made.straddling
    return found


def tell(counts: Iterable[Count]) -> None:
    """Print counts, and a warning for each that is not the published one."""
    for what, found, published in counts:
        number, expected = (f"{n:,}" if isinstance(n, int) else n for n in (found, published))
        if published is None or found == published:
            print(f"{what}: {number}" + ("" if published is None else ", as published"))
        else:
            print(f"warning: {what}: found {number}, published {expected}")


def evaluation_prompts(valid: Sequence[Record], seed: int) -> list[Record]:
    """PROMPTS different held-out prompts, drawn by numpy's RandomState(seed), with the text about who asked."""
    prompts: dict[str, Record] = {}
    for record in valid:
        kept = {name: record[name] for name in ("prompt", "user", "user_text", "attributes") if record.get(name)}
        prompts.setdefault(json.dumps(kept["prompt"]), {"id": record["id"], **kept})
    some = list(prompts.values())
    chosen = np.random.RandomState(seed).choice(len(some), size=min(PROMPTS, len(some)), replace=False)
    return [some[i] for i in sorted(chosen)]
