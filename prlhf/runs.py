"""A run's directory: opened once, refused to another config, and its metrics.jsonl.

config.yaml, metrics.jsonl, checkpoints/, final/ (its presence says that the run is finished)
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import IO, Any, NamedTuple

from prlhf import checkpoint
from prlhf import config as config_module
from prlhf.config import Config
from prlhf.errors import UserError


class Run(NamedTuple):
    """An opened run directory; `lock` is held while it lives."""

    path: Path
    lock: IO[str]

    @property
    def final(self) -> Path:
        """The finished model."""
        return self.path / "final"

    @property
    def checkpoints(self) -> Path:
        """The folder of step_N."""
        return self.path / "checkpoints"

    @property
    def metrics(self) -> Path:
        """metrics.jsonl."""
        return self.path / "metrics.jsonl"

    @property
    def finished(self) -> bool:
        """Whether training ended and the model for use is there."""
        return (self.final / "users.json").is_file()

    def log(self, record: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the records of updates after `step`, and a last line that a kill cut short."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError):
                continue
        aside = self.metrics.with_suffix(".partial")
        aside.write_text("".join(kept), encoding="utf-8")
        os.replace(aside, self.metrics)


def open_run(config: Config, name: str, overwrite: bool = False) -> Run:
    """Open config.run_dir (or runs/`name`) for this config, creating it, or emptied where `overwrite`.

    UserError where it belongs to another config (with the keys that differ), to another program's files, or to a
    process that is still running.
    """
    path = Path(config.run_dir or Path("runs") / name).expanduser()
    saved = path / "config.yaml"
    if path.exists() and not path.is_dir():
        raise UserError(f"run_dir: {path} is a file, expected a folder")
    if path.is_dir() and any(path.iterdir()) and not saved.exists() and not (path / ".lock").exists():
        raise UserError(f"run_dir: {path} holds files that are not a run's; expected an empty or new folder")
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        raise UserError(f"run_dir: {path} is in use by another process") from None
    if overwrite:
        for entry in path.iterdir():
            if entry.name != ".lock":
                shutil.rmtree(entry) if entry.is_dir() else entry.unlink()
    elif saved.exists():
        differing = config_module.differing_keys(config_module.load(saved), config)
        if differing:
            raise UserError(
                f"run_dir: {path} belongs to a run with another config:\n"
                + "\n".join(f"  {line}" for line in differing)
                + "\nexpected the same config, another run_dir, or --overwrite"
            )
    if not saved.exists():
        aside = path / ".config.yaml.partial"
        aside.write_text(config_module.dump(config), encoding="utf-8")
        os.replace(aside, saved)
    return Run(path, lock)


def prune_checkpoints(run: Run, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    found = checkpoint.steps(run.checkpoints)
    for step in list(found)[:-keep]:
        if step != best:
            shutil.rmtree(found[step])
