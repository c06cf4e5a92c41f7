"""A file of responses that can be gone on with: JSON Lines, with the settings that made it beside it."""

import json
import os
from pathlib import Path
from typing import Any

from prlhf.errors import UserError


class ResponseFile:
    """Appends records to `path`; what is there already, from the same settings, is kept and need not be made again."""

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False):
        self.path = path
        beside = path.with_name(path.name + ".settings.json")
        if overwrite:
            path.unlink(missing_ok=True)
            beside.unlink(missing_ok=True)
        if path.exists():
            _check_settings(path, beside, settings)
            self._keys = self._keep_complete_lines()
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")
            self._keys = {}

    def has(self, record: dict[str, Any]) -> bool:
        """Whether the response to record["id"] for record["user"] is there. UserError if to another prefix."""
        known = self._keys.get((record["id"], record["user"]))
        if known not in (None, record["prefix"]):
            raise UserError(
                f"{self.path}: holds a response to another prompt {record['id']!r}; expected another --out or --overwrite"
            )
        return known is not None

    def append(self, record: dict[str, Any]) -> None:
        """Write one record, at once."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")
        self._keys[record["id"], record["user"]] = record["prefix"]

    def _keep_complete_lines(self) -> dict[tuple[str, str], str]:
        """(id, user) -> prefix of the records there; a last line that a kill cut short is removed."""
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            with open(self.path, "r+b") as file:
                file.truncate(len(complete))
                os.fsync(file.fileno())
        keys = {}
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                record = json.loads(line)
                keys[record["id"], record["user"]] = record["prefix"]
            except (ValueError, KeyError, TypeError):
                raise UserError(
                    f"{self.path}, line {number}: not a response; expected another --out or --overwrite"
                ) from None
        return keys


def _check_settings(path: Path, beside: Path, settings: dict[str, Any]) -> None:
    try:
        saved = json.loads(beside.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        raise UserError(
            f"{path}: exists, and was not written by this command; expected another --out or --overwrite"
        ) from None
    differing = [f"{k}: {saved.get(k)!r} -> {v!r}" for k, v in settings.items() if saved.get(k) != v]
    if differing:
        raise UserError(
            f"{path}: was written with other settings ({', '.join(differing)}); expected another --out or --overwrite"
        )
