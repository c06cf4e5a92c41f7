"""Raw files of a data set, or a file of comparisons, to train.jsonl, valid.jsonl, few_shot.jsonl and prompts.jsonl.

`prepare NAME` reads what `fetch NAME` has downloaded; `split FILE` takes any file of comparisons. Both write beside the
comparisons split.json: with which options, from which files (by checksum), how many there are of what, and who is known.
"""

import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from prlhf.data import multipref, parse_comparison, persona, prism, psoups, tldr
from prlhf.data.files import read_records, sha256, write_json_lines
from prlhf.data.reading import Count, Options, Reading, Record, text_key
from prlhf.data.sources import raw_folder
from prlhf.data.splits import Shares, Split, split, with_few_shot
from prlhf.errors import UserError, did_you_mean

PROMPTS = 50  # held-out prompts to generate answers to
READERS: dict[str, Callable[[Path, Options], Reading]] = {
    "tldr": tldr.read,
    "tldr_length": tldr.read_length,
    "prism": prism.read,
    "psoups": psoups.read,
    "persona": persona.read,
    "multipref": multipref.read,
}
RAW = {"tldr_length": "tldr"}  # whose raw files they are, where the name is another
SHARES = {"psoups": Shares(users=1.0)}  # six preferences, all of them known


def prepare(name: str, raw: str | None, out: str | None, options: Options, overwrite: bool = False) -> None:
    """Read a data set's raw files, split them and write them. UserError for bad files, or where `out` holds others."""
    if name not in READERS:
        raise UserError(
            f"{name!r}: no such data set{did_you_mean(name, READERS)}; expected one of {', '.join(READERS)}"
        )
    folder = Path(raw).expanduser() if raw else raw_folder(RAW.get(name, name))
    target = Path(out or f"runs/data/{name}")
    made_of = {str(p.relative_to(folder)): sha256(p) for p in sorted(folder.rglob("*")) if is_raw(p)}
    settings = {"data": name, **asdict(options), "raw": made_of}
    if is_there(target, settings, overwrite):
        return
    reading = READERS[name](folder, options)
    if reading.official is not None:
        made = with_few_shot(*reading.official, options.few_shot, options.seed)
    else:
        made = split(reading.records, SHARES.get(name, Shares()), options.seed, options.few_shot)
    counts = list(reading.counts)
    if reading.published_split is not None:
        held_out = len(made.valid) + len(made.few_shot)
        counts += map(
            Count, ("comparisons trained on", "held out"), (len(made.train), held_out), reading.published_split
        )
    write(target, made, settings, counts, reading.dropped, reading.prompts)


def split_file(
    file: str, out: str, group: str | None, shares: Shares, options: Options, overwrite: bool = False
) -> None:
    """Split a file of comparisons; `group`: the field that names what belongs together, by default the prompt itself."""
    records = []
    for place, record in read_records(file):
        parse_comparison(record, f"{file}, {place}", place)
        if group is not None and not isinstance(record.get(group), str | int):
            raise UserError(f"{file}, {place}, {group}: expected text or a number, the name of what belongs together")
        key = json.dumps(record.get("prompt") if group is None else record[group], ensure_ascii=False)
        name = f"{Path(file).name}:{place.split()[-1]}"  # as in the whole file, so that ids stay what they were
        records.append({"id": name, **record, "user": record.get("user") or None, "group": text_key(key)})
    settings = {
        "data": file,
        "seed": options.seed,
        "few_shot": options.few_shot,
        **shares._asdict(),
        "group": group,
        "raw": {file: sha256(Path(file))},
    }
    if not is_there(Path(out), settings, overwrite):
        write(Path(out), split(records, shares, options.seed, options.few_shot), settings, [], {}, None)


def is_raw(path: Path) -> bool:
    """Whether a file in a raw folder is part of the data set."""
    return (
        path.is_file() and path.name != "fetched.json" and not path.name.startswith(".") and "partial" not in path.name
    )


def is_there(target: Path, settings: dict[str, Any], overwrite: bool) -> bool:
    """Whether `target` holds the very split already. UserError where it holds another one."""
    found = target / "split.json"
    if overwrite or not found.exists():
        return False
    try:
        saved = json.loads(found.read_text(encoding="utf-8"))["settings"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{found}: damaged; expected another --out or --overwrite") from None
    differing = [
        f"{key}: {saved.get(key)!r} -> {value!r}" for key, value in settings.items() if saved.get(key) != value
    ]
    if differing:
        raise UserError(
            f"{target}: made with other settings ({'; '.join(differing)}); expected another --out or --overwrite"
        )
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
    """Write the files of a split, split.json last, and say what was counted, against what was published."""
    parts = {"train": made.train, "valid": made.valid, **({"few_shot": made.few_shot} if made.few_shot else {})}
    files: dict[str, dict[str, Any]] = {}
    for name, records in parts.items():
        users = list(dict.fromkeys(r["user"] for r in records if r["user"] is not None))
        files[f"{name}.jsonl"] = {"comparisons": len(records), "users": len(users)}
        write_json_lines(target / f"{name}.jsonl", records)
    some = evaluation_prompts(made.valid, settings["seed"]) if prompts is None else prompts
    write_json_lines(target / "prompts.jsonl", some)
    for name, entry in files.items():
        entry["sha256"] = sha256(target / name)
        print(f"{target / name}: {entry['comparisons']:,} comparisons of {entry['users']:,} users")
    print(f"{target / 'prompts.jsonl'}: {len(some)} prompts")
    dropped = {**dropped, "of unknown users, in groups that are trained on": made.left_out}
    for reason, number in dropped.items():
        if number:
            print(f"left out, {reason}: {number:,}")
    tell(counts)
    known = sorted({r["user"] for r in made.train if r["user"] is not None})
    record = {"settings": settings, "files": files, "left_out": dropped, "known_users": known}
    record["counts"] = [count._asdict() for count in counts]
    aside = target / ".split.json.partial"
    aside.write_text(json.dumps(record, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    os.replace(aside, target / "split.json")


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
