"""Answers of a server: what one says, and all of them on disk, one a line, so that a second call asks for none of them again."""

import json
import os
import re
from pathlib import Path
from typing import NamedTuple

from prlhf.errors import UserError
from prlhf.judge.template import ALONE


class Completion(NamedTuple):
    """The text that a model answered; the tokens of prompt and answer, and why it ended: None where the server does not say."""

    text: str
    tokens: int | None
    finish: str | None

    @property
    def said(self) -> str | None:
        """The text, behind what the model thought. None where it was cut: while it thought, or as the tokens were used up
        ("length"), but for a letter alone, with or without a certainty, which can mean nothing else."""
        _, ended, text = self.text.rpartition("</think>")
        if not ended and text.lstrip().startswith("<think>"):
            return None
        alone = ALONE.fullmatch(re.sub(r"\d+", "", text))
        return text if alone or self.finish != "length" else None


def read_completion(body: str) -> Completion | None:
    """The answer that a chat completion holds; None where the body is none. No content (a refusal, say) is the text ""."""
    try:
        record = json.loads(body)
        choice = record["choices"][0]
        text, finish = choice["message"].get("content"), choice.get("finish_reason")
        usage = record.get("usage") or {}
        counts = [usage.get(name) for name in ("prompt_tokens", "completion_tokens")]
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if text is not None and not isinstance(text, str):
        return None
    tokens = sum(counts) if all(type(count) is int for count in counts) else None
    return Completion(text or "", tokens, finish if isinstance(finish, str) else None)


class AnswerFile:
    """The answers that are on disk, by key: one JSON object a line. UserError for a line that is none.

    A last line that a kill cut short does not count, and is removed before another is written.
    """

    def __init__(self, path: Path):
        self.path = path
        content = path.read_bytes() if path.exists() else b""
        whole = content[: content.rfind(b"\n") + 1]
        self._cut_at = len(whole) if len(whole) < len(content) else None
        self.answers: dict[str, Completion] = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                record = json.loads(line)
                key, answer = record["key"], Completion(record["answer"], record["tokens"], record["finish"])
            except (ValueError, LookupError, TypeError):
                key, answer = None, Completion("", None, None)
            if not isinstance(key, str) or not isinstance(answer.text, str):
                raise UserError(f"{path}, line {number}: no answer; expected this file as it was written, or none")
            self.answers.setdefault(key, answer)

    def prepare(self) -> None:
        """Make the folder and the file, before an answer is paid for. UserError where they cannot be written."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            open(self.path, "ab").close()
        except OSError as error:
            raise UserError(
                f"{self.path}: cannot be written ({error.strerror}), expected a folder that can (--answers); nothing was asked"
            ) from None

    def append(self, key: str, answer: Completion) -> None:
        """Keep one answer, in the file that `prepare` has made: when this returns it is on disk."""
        if self._cut_at is not None:
            os.truncate(self.path, self._cut_at)
            self._cut_at = None
        record = {"key": key, "answer": answer.text, "tokens": answer.tokens, "finish": answer.finish}
        with open(self.path, "ab") as file:
            file.write(json.dumps(record).encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())
        self.answers[key] = answer
