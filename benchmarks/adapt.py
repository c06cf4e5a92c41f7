"""Time and memory of prlhf.adapt for many new users, at two numbers of known ones.

    python benchmarks/adapt.py --checkpoint RUN --data runs/data/polis_islands/unseen_users_adapt.jsonl --out FOLDER

RUN: a frozen reward model with a linear head and users of a rank. 1,000 new users have the first 20 comparisons each of the
file's users, in turn. RUN's folder is copied with as many known users more as `KNOWN` says, whose coordinates are those of its own
in turn. Each line is one process, the whole command: it loads the model, reads both files, takes hidden states from the cache
where they are there, learns and writes. So run it twice; the first run computes the states.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from safetensors.torch import load_file, save_file

from prlhf.data.files import read_json_lines, write_json_lines
from prlhf.errors import run_command
from prlhf.store.final import find_final

NEW, COMPARISONS = 1000, 20
KNOWN = (0, 100_000)  # beside RUN's own


def new_users(source: Path, path: Path) -> None:
    """Write the comparisons of NEW users."""
    of_user: dict[str, list[dict]] = {}
    for _, record in read_json_lines(source):
        of_user.setdefault(record["user"], []).append(record)
    voters = [records[:COMPARISONS] for records in of_user.values() if len(records) >= COMPARISONS]
    some = zip(range(NEW), itertools.cycle(voters))
    write_json_lines(
        path, [{**record, "user": f"new{n}", "id": f"{n} {record['id']}"} for n, records in some for record in records]
    )


def with_known(final: Path, folder: Path, more: int) -> None:
    """Copy a model's folder, with more known users."""
    shutil.copytree(final, folder)
    names = json.loads((final / "users.json").read_text())
    names["users"] += [f"known{n}" for n in range(more)]
    (folder / "users.json").write_text(json.dumps(names))
    weights = load_file(final / "users.safetensors")
    z_MK = weights["user_model.z_MK"]
    rows = [*range(len(z_MK)), *(n % len(z_MK) for n in range(more))]
    save_file({**weights, "user_model.z_MK": z_MK[rows].contiguous()}, folder / "users.safetensors")


def main() -> None:
    """Print a line for each number of known users."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", required=True)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--out", required=True, type=Path, help="a new folder")
    args = parser.parse_args()
    args.out.mkdir(parents=True)
    new_users(args.data, args.out / "new.jsonl")
    for more in KNOWN:
        folder = args.out / f"known{more}"
        with_known(find_final(args.checkpoint), folder, more)
        command = [
            sys.executable,
            "-m",
            "prlhf.adapt",
            "--checkpoint",
            str(folder),
            "--data",
            str(args.out / "new.jsonl"),
        ]
        start = time.perf_counter()
        process = subprocess.Popen([*command, "--out", str(args.out / f"adapted{more}")], stdout=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        if status:
            sys.exit(f"prlhf.adapt ended with status {status}")
        print(
            f"{more:,} known users more: {time.perf_counter() - start:.0f} s, {usage.ru_maxrss / 2**20:.2f} GiB at most"
        )


if __name__ == "__main__":
    run_command(main)
