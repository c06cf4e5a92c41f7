"""A file of responses that a second call continues: JSON Lines, with the settings that made it in a file beside it."""

import json
import os
from pathlib import Path
from typing import Any

from prlhf.errors import UserError

OTHERWISE = "expected another --out or --overwrite"


class ResponseFile:
    """Appends records to `path`, and knows which are there. UserError where another command or settings made it."""

    def __init__(self, path: Path, settings: dict[str, Any], overwrite: bool = False):
        self.path = path
        beside = path.with_name(path.name + ".settings.json")
        self._prefixes: dict[tuple[str, str], str] = {}  # by (id, user) of the responses that are there
        if path.exists() and not overwrite:
            self._check_settings(beside, settings)
            self._read()
        else:
            path.unlink(missing_ok=True)
            path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_text(json.dumps(settings, indent=1) + "\n", encoding="utf-8")

    def has(self, record: dict[str, Any]) -> bool:
        """Whether the response to record["id"] for record["user"] is there. UserError if it is to another prompt."""
        known = self._prefixes.get((record["id"], record["user"]))
        if known not in (None, record["prefix"]):
            raise UserError(f"{self.path}: holds a response to another prompt {record['id']!r}; {OTHERWISE}")
        return known is not None

    def append(self, record: dict[str, Any]) -> None:
        """Write one record, at once."""
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record, ensure_ascii=False) + "\n")

    def _check_settings(self, beside: Path, settings: dict[str, Any]) -> None:
        try:
            saved = json.loads(beside.read_text(encoding="utf-8"))
        except (OSError, ValueError):
            raise UserError(f"{self.path}: exists, and was not written by this command; {OTHERWISE}") from None
        differing = [f"{k}: {saved.get(k)!r} -> {v!r}" for k, v in settings.items() if saved.get(k) != v]
        if differing:
            raise UserError(f"{self.path}: was written with other settings ({', '.join(differing)}); {OTHERWISE}")

    def _read(self) -> None:
        """Note the records that are there, and remove a last line that a kill cut short."""
        content = self.path.read_bytes()
        complete = content[: content.rfind(b"\n") + 1]
        if len(complete) < len(content):
            os.truncate(self.path, len(complete))
        for number, line in enumerate(complete.splitlines(), start=1):
            try:
                record = json.loads(line)
                self._prefixes[record["id"], record["user"]] = record["prefix"]
            except (ValueError, KeyError, TypeError):
                raise UserError(f"{self.path}, line {number}: not a response; {OTHERWISE}") from None
