"""A run's directory, opened once, with one config: config.yaml, metrics.jsonl, checkpoints/ and, at last, final/."""

import contextlib
import errno
import fcntl
import json
import os
import shutil
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import IO, Any, NamedTuple

from prlhf.config.keys import Config
from prlhf.config.load import differing_keys, dump, load_resolved
from prlhf.data.files import replace_text
from prlhf.errors import UserError, expanded
from prlhf.parallel.ranks import on_any, on_main, rank, text_from_main
from prlhf.store.checkpoints import steps

NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # what a file system without flock says (Lustre, some NFS)
FREE_TO_CHANGE = ("fsdp.", "data.new_users")  # may differ from one start to the next: no number depends on them
WRITTEN = ("config.yaml", "metrics.jsonl", "checkpoints", "final", "eval", "tensorboard")  # what --overwrite removes


class Run(NamedTuple):
    """An opened run directory; no other process can open it while `lock` is open."""

    path: Path
    lock: IO[str] | None  # on rank 0

    @property
    def final(self) -> Path:
        """The folder of the finished model."""
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
    def begun(self) -> bool:
        """Whether the folder holds what a run has computed."""
        return self.metrics.exists() or self.checkpoints.exists() or self.final.exists()

    @property
    def finished(self) -> bool:
        """Whether rank 0 sees the finished model."""
        return on_any(rank() == 0 and (self.final / "users.json").is_file())

    def dated(self, config: Config, overwrite: bool) -> Config:
        """The config with a data.template_date: its own, else that with which this run began, else today."""

        def day() -> str:
            began = (
                load_resolved(self.path / "config.yaml").data.template_date if self.begun and not overwrite else None
            )
            return (began or date.today()).isoformat()

        return _at_date(config, date.fromisoformat(text_from_main(day)))

    def begin(self, config: Config, overwrite: bool) -> None:
        """Write config.yaml; where `overwrite`, first remove what an earlier run left."""

        def write() -> None:
            for entry in (self.path / name for name in WRITTEN if overwrite):
                if entry.is_dir() and not entry.is_symlink():
                    shutil.rmtree(entry)
                else:
                    entry.unlink(missing_ok=True)
            replace_text(self.path / "config.yaml", dump(config))

        on_main(write)

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
            with contextlib.suppress(ValueError, KeyError, TypeError):
                if json.loads(line)["step"] <= step:
                    kept.append(line + "\n")
        replace_text(self.metrics, "".join(kept))


def open_run(config: Config, name: str, overwrite: bool = False) -> Run:
    """Open and lock config.run_dir, by default runs/`name`; nothing in it is changed until `begin`.

    UserError where it has another config (with the keys that differ; not if `overwrite`), other files, or is in use.
    """
    run = Run(expanded(config.run_dir or Path("runs") / name), None)

    def lock() -> IO[str]:
        opened = _locked(run.path)
        differing = []
        if run.begun and not overwrite:
            stored = load_resolved(run.path / "config.yaml")
            differing = differing_keys(stored, _at_date(config, stored.data.template_date))
        lines = [f"  {line}\n" for line in differing if not line.startswith(FREE_TO_CHANGE)]
        if lines:
            raise UserError(
                f"run_dir: {run.path} belongs to a run with another config:\n{''.join(lines)}"
                "expected the same config, another run_dir, or --overwrite"
            )
        return opened

    return run._replace(lock=on_main(lock))


def _at_date(config: Config, day: date | None) -> Config:
    """The config with this data.template_date where it has none of its own."""
    return replace(config, data=replace(config.data, template_date=config.data.template_date or day))


def _locked(path: Path) -> IO[str]:
    """The open lock file of a run's directory, which is made where it is not there."""
    if path.is_file():
        raise UserError(f"run_dir: {path} is a file, expected a folder")
    if path.is_dir() and any(path.iterdir()) and not (path / ".lock").exists() and not _is_run(path):
        raise UserError(f"run_dir: {path} holds files that are not a run's; expected an empty or new folder")
    path.mkdir(parents=True, exist_ok=True)
    lock = open(path / ".lock", "w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise UserError(f"run_dir: {path} is in use by another process") from None
        if error.errno not in NO_LOCKS:
            raise
        warning = f"warning: {path} cannot be locked ({error.strerror}); let no other process train into it"
        print(warning, file=sys.stderr)
    return lock


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
            # Renamed first: if this process is killed, no half checkpoint stays under the name of a whole one.
            going = run.checkpoints / f".{found[step].name}.old.partial"
            os.rename(found[step], going)
            shutil.rmtree(going)
