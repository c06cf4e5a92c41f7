"""Make train.jsonl, valid.jsonl, few_shot.jsonl and prompts.jsonl of a data set's raw files, or of a file of comparisons.

`prepare NAME` reads what `fetch NAME` has downloaded; `split FILE` takes any file of comparisons. Both also write split.json:
the options, the source files (by checksum), the counts, and the known users.
"""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from prlhf.config.keys import DataConfig
from prlhf.data.comparisons import parse_comparison, read_parsed, split_conversations
from prlhf.data.files import Record, sha256, write_json, write_json_lines
from prlhf.data.sets import multipref, persona, prism, psoups, tldr
from prlhf.data.sets.raw import Count, Options, RawSet, raw_files, text_key
from prlhf.data.sets.splits import Judged, Shares, Split, judged, recurring, split, split_by_response, with_few_shot
from prlhf.data.sources import raw_folder, source_name
from prlhf.data.unknown import alike, without_users
from prlhf.errors import UserError, expanded

PROMPTS = 50  # held-out prompts to generate answers to
OUTPUTS = ("train.jsonl", "valid.jsonl", "few_shot.jsonl", "prompts.jsonl")
GROUPS_BY_RESPONSE = 0.7  # default share: about half of the pairs are trained on, 0.3^2 held out
INSTEAD = "expected another --out or --overwrite"

READERS = {  # the function that reads a data set, and its raw files
    "tldr": (tldr.read, tldr.FILES),
    "tldr_length": (tldr.read_length, tldr.FILES),
    "prism": (prism.read, prism.FILES),
    "psoups": (psoups.read, psoups.FILES),
    "persona": (persona.read, persona.FILES),
    "multipref": (multipref.read, multipref.FILES),
}
SAMPLE_SIZES = {"prism": (6_431, 3_982)}  # published: comparisons trained on, and held out


def prepare(name: str, raw: str | None, out: str | None, options: Options, overwrite: bool) -> None:
    """Read, split and write a data set. UserError for bad raw files, or where `out` holds another split."""
    source, (read, files) = source_name(name), READERS[name]
    folder = expanded(raw) if raw else raw_folder(source)
    target = expanded(out or f"runs/data/{name}")
    made_of = {path.name: sha256(path) for path in raw_files(folder, source, *files)}
    settings = {"data": name, **asdict(options), "raw": made_of}
    if is_there(target, settings, overwrite):
        return
    found = read(folder, options)
    if found.official is not None:
        made = with_few_shot(*found.official, options.few_shot, options.seed)
    else:
        made = split(found.records, Shares(found.known_users), options.seed, options.few_shot, found.dialogues)
    if name in SAMPLE_SIZES:
        sizes = len(made.train), len(made.valid) + len(made.few_shot)
        found.counts.extend(map(Count, ("comparisons trained on", "held out"), sizes, SAMPLE_SIZES[name]))
    write(target, made, settings, found)


class Division(NamedTuple):
    """How `split` divides a file.

    by: "prompt", "response", or the field that names the dialogue; None: by response where a user judged one response in two
    different pairs, else by prompt. users, groups: the `Shares`; groups None is the default of that division.
    """

    by: str | None
    users: float
    groups: float | None


def split_file(file: str, out: str, division: Division, form: DataConfig, options: Options, overwrite: bool) -> None:
    """Split a file of comparisons. form: its format and user_column. UserError for a bad file, or as of `prepare`."""
    path, target, by = expanded(file), expanded(out), division.by
    records, comparisons = read_for_split(file, None if by in ("prompt", "response") else by, form)
    if by is None:
        by = choose_by(comparisons)
    groups = GROUPS_BY_RESPONSE if by == "response" else Shares().groups
    shares = Shares(division.users, groups if division.groups is None else division.groups)
    settings = {"data": file, "seed": options.seed, "few_shot": options.few_shot, **shares._asdict(), "by": by}
    settings |= {"user_column": form.user_column, "raw": {file: sha256(path)}}
    if path.resolve().parent == target.resolve() and path.name in OUTPUTS:
        raise UserError(f"--out {out}: {file} itself would be replaced, expected another folder")
    if is_there(target, settings, overwrite):
        return
    if by == "response":
        made = split_by_response(records, comparisons, shares, options.seed, options.few_shot)
    else:
        made = split(records, shares, options.seed, options.few_shot, dialogues=by != "prompt")
    write(target, made, settings, RawSet(records, None, [], {}))


def read_for_split(file: str, dialogue: str | None, form: DataConfig) -> tuple[list[Record], list[Judged]]:
    """The records of a file, grouped by prompt or by the dialogue that a field names, and what each of them says.

    Prints a warning where no comparison has a user, or names of users look the same.
    """
    records, comparisons = [], []
    for where, record, comparison in read_parsed(file, form):
        if dialogue is not None and not isinstance(record.get(dialogue), str | int):
            raise UserError(f"{where}, {dialogue}: expected text or a number, the dialogue's name")
        record = split_conversations(record)
        group = text_key(json.dumps(record["prompt" if dialogue is None else dialogue], ensure_ascii=False))
        records.append({"id": comparison.id, **record, "user": comparison.user, "split_group": group})
        comparisons.append(judged(comparison))
    names = [user for user, _ in comparisons]
    if said := alike(file, names) if any(names) else without_users(file, form):
        print(f"warning: {said}")
    return records, comparisons


def choose_by(comparisons: Sequence[Judged]) -> str:
    """By response where a user judged one response in two different pairs, else by prompt. Prints the reason."""
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
    """Whether `target` already holds this very split, whole. UserError where it holds something else."""
    found = target / "split.json"
    if overwrite:
        return False
    if not found.exists():
        for name in OUTPUTS:
            if (target / name).exists():
                raise UserError(f"{target / name}: exists, of an unfinished or another split; {INSTEAD}")
        return False
    try:
        record = json.loads(found.read_text(encoding="utf-8"))
        saved = {**record["settings"], "by": record["settings"].get("by") or "prompt"}  # older files: null is by prompt
        files = {name: entry["sha256"] for name, entry in record["files"].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{found}: damaged; {INSTEAD}") from None
    differing = [f"{key}: {saved.get(key)!r} -> {new!r}" for key, new in settings.items() if saved.get(key) != new]
    if differing:
        raise UserError(f"{target}: made with other settings ({'; '.join(differing)}); {INSTEAD}")
    for name, checksum in files.items():
        if not (target / name).is_file() or sha256(target / name) != checksum:
            raise UserError(f"{target / name}: not as it was written; {INSTEAD}")
    print(f"{target} is there already")
    return True


def write(target: Path, made: Split, settings: dict[str, Any], raw: RawSet) -> None:
    """Write a split, split.json last; print counts. UserError, before any is written, where one is no comparison."""
    parts = {"train.jsonl": made.train, "valid.jsonl": made.valid, "few_shot.jsonl": made.few_shot}
    for record in (record for records in parts.values() for record in records):
        parse_comparison(record, f"{settings['data']}, {record['id']}", record["id"])
    parts["prompts.jsonl"] = evaluation_prompts(made.valid, settings["seed"]) if raw.prompts is None else raw.prompts
    for name in ("split.json", *OUTPUTS):
        (target / name).unlink(missing_ok=True)
    files: dict[str, dict[str, Any]] = {}
    for name, records in ((name, records) for name, records in parts.items() if records):
        write_json_lines(target / name, records)
        users = len({r["user"] for r in records if r.get("user") is not None})
        files[name] = {"records": len(records), "users": users, "sha256": sha256(target / name)}
        print(f"{target / name}: {len(records):,} {'prompts' if 'prompts' in name else 'comparisons'}, {users:,} users")
    dropped = {**raw.dropped, "of unknown users, on what is trained on or in few_shot.jsonl": made.left_out}
    if made.straddling is not None:
        dropped["one response trained on (or in few_shot.jsonl) by its user, the other held out"] = made.straddling
    for reason, number in dropped.items():
        if number:
            print(f"left out, {reason}: {number:,}")
    tell(raw.counts)
    trained = {r["split_group"] for r in made.train}
    leaking = sum(r["split_group"] in trained for r in made.valid)
    if leaking:  # possible in a data set's own split; expected by response, where prompts are not divided
        warning = "warning: " if made.straddling is None else ""
        print(f"{warning}held-out comparisons on prompts that are trained on: {leaking:,}")
    known = {r["user"] for r in made.train if r["user"] is not None}
    record = {
        "settings": settings,
        "files": files,
        "left_out": dropped,
        "on_trained_prompts": leaking,
        "known_users": sorted(known),
        "counts": [count._asdict() for count in raw.counts],
    }
    write_json(target / "split.json", record)


def tell(counts: Iterable[Count]) -> None:
    """Print counts, and a warning for each that differs from the published one."""
    for what, found, published in counts:
        number, expected = (f"{n:,}" if isinstance(n, int) else n for n in (found, published))
        if published is None or found == published:
            print(f"{what}: {number}" + ("" if published is None else ", as published"))
        else:
            print(f"warning: {what}: found {number}, published {expected}")


def evaluation_prompts(valid: Sequence[Record], seed: int) -> list[Record]:
    """PROMPTS different held-out prompts, drawn by numpy's RandomState(seed), with their users and user texts."""
    prompts: dict[str, Record] = {}
    for record in valid:
        kept = {name: record[name] for name in ("prompt", "user", "user_text", "attributes") if record.get(name)}
        prompts.setdefault(json.dumps(kept["prompt"]), {"id": record["id"], **kept})
    some = list(prompts.values())
    chosen = np.random.RandomState(seed).choice(len(some), size=min(PROMPTS, len(some)), replace=False)
    return [some[i] for i in sorted(chosen)]
