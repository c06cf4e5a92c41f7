"""A run's directory: opened once, refused to another config, and its metrics.jsonl.

config.yaml, metrics.jsonl, checkpoints/, final/ (its presence says that the run is finished)
"""

import errno
import fcntl
import json
import os
import shutil
import sys
from pathlib import Path
from typing import IO, Any, NamedTuple

from prlhf.config.keys import Config
from prlhf.config.load import differing_keys, dump, load_resolved
from prlhf.errors import UserError
from prlhf.parallel.ranks import on_any, on_main, rank
from prlhf.store.checkpoints import steps

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without flock says (Lustre, some NFS)
FREE_GROUP = "fsdp."  # how processes share the work may change from one start to the next, as their number may
WRITTEN = ("config.yaml", "metrics.jsonl", "checkpoints", "final", "eval", "tensorboard")  # what --overwrite removes


class Run(NamedTuple):
    """An opened run directory; `lock` is held while it lives."""

    path: Path
    lock: IO[str] | None  # on rank 0

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

    def begin(self, config: Config, overwrite: bool) -> None:
        """Write config.yaml, after removing what an earlier run left where `overwrite`."""

        def write() -> None:
            for entry in (self.path / name for name in WRITTEN if overwrite):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
            aside = self.path / ".config.yaml.partial"
            aside.write_text(dump(config), encoding="utf-8")
            os.replace(aside, self.path / "config.yaml")

        on_main(write)

    @property
    def finished(self) -> bool:
        """Whether training ended and the model for use is there, as rank 0 sees it."""
        return on_any(rank() == 0 and (self.final / "users.json").is_file())

    def log(self, record: dict[str, Any]) -> None:
        """Append one object to metrics.jsonl."""
        with open(self.metrics, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def forget_after(self, step: int) -> None:
        """Drop the records of updates after `step`, and a last line that a kill cut short."""
        if not self.metrics.exists():
            return
        kept = []
        for line in self.metrics.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
            except (ValueError, KeyError, TypeError):
                continue
        aside = self.metrics.with_suffix(".partial")
        aside.write_text("".join(kept), encoding="utf-8")
        os.replace(aside, self.metrics)


def open_run(config: Config, name: str, overwrite: bool = False) -> Run:
    """Open config.run_dir (or runs/`name`) for this config, and hold it; nothing in it is changed until `begin`.

    UserError where it belongs to another config (with the keys that differ, unless `overwrite`), holds other files, or
    is in use by another process.
    """
    path = Path(config.run_dir or Path("runs") / name).expanduser()
    lock = on_main(lambda: _held(path, config, overwrite))
    return Run(path, lock)


def _held(path: Path, config: Config, overwrite: bool) -> IO[str]:
    if path.exists() and not path.is_dir():
        raise UserError(f"run_dir: {path} is a file, expected a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / ".lock").exists() and not _is_run(path):
        raise UserError(f"run_dir: {path} holds files that are not a run's; expected an empty or new folder")
    path.mkdir(parents=True, exist_ok=True)
    run = Run(path, open(path / ".lock", "w"))
    try:
        fcntl.flock(run.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(f"run_dir: {path} is in use by another process") from None
        if error.errno not in NO_LOCKS:
            raise
        print(
            f"warning: {path} cannot be locked ({error.strerror}); let no other process train into it", file=sys.stderr
        )
    begun = run.metrics.exists() or run.checkpoints.exists() or run.final.exists()
    if begun and not overwrite:
        differing = differing_keys(load_resolved(path / "config.yaml"), config)
        differing = [line for line in differing if not line.startswith(FREE_GROUP)]
        if differing:
            raise UserError(
                f"run_dir: {path} belongs to a run with another config:\n"
                + "\n".join(f"  {line}" for line in differing)
                + "\nexpected the same config, another run_dir, or --overwrite"
            )
    return run.lock


def _is_run(path: Path) -> bool:
    try:
        load_resolved(path / "config.yaml")
    except UserError:
        return False
    return True


def prune_checkpoints(run: Run, keep: int, best: int | None) -> None:
    """Remove all but the newest `keep` checkpoints and the best one."""
    found = steps(run.checkpoints)
    for step in list(found)[:-keep]:
        if step != best:
            # Renamed first: at once no checkpoint any more, whatever kills this.
            going = run.checkpoints / f".{found[step].name}.old.partial"
            os.rename(found[step], going)
            shutil.rmtree(going)
