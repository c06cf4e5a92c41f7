"""Answers of a server on disk, one a line, so that a second call asks for none of them again."""

import json
import os
from pathlib import Path
from typing import NamedTuple

from prlhf.errors import UserError


class Completion(NamedTuple):
    """The text that a model answered, and the tokens of prompt and answer, None where the server does not say."""

    text: str
    tokens: int | None


class AnswerFile:
    """The answers that are on disk, by key: one JSON object a line. UserError for a line that is none.

    A last line that a kill cut short does not count, and is removed before another is written.
    """

    def __init__(self, path: Path):
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self._cut_at = len(whole) if len(whole) < len(content) else None
        self.texts: dict[str, str] = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                key, text = record["key"], record["answer"]
            except (ValueError, LookupError, TypeError):
                key = text = None
            if not isinstance(key, str) or not isinstance(text, str):
                raise UserError(f"{path}, line {number}: no answer; expected this file as it was written, or none")
            self.texts.setdefault(key, text)

    def append(self, key: str, answer: Completion) -> None:
        """Keep one answer: when this returns it is on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self._cut_at is not None:
            os.truncate(self.path, self._cut_at)
            self._cut_at = None
        record = {"key": key, "answer": answer.text, "tokens": answer.tokens}
        with open(self.path, "ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.texts[key] = answer.text
