"""Errors made for the person at the keyboard: what was found, where, and what was expected."""

import difflib
import io
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TextIO


class UserError(Exception):
    """Bad input. The message names file, line and key; the command line shows it alone and exits with 2."""


class TrainingError(Exception):
    """Training cannot go on (a loss that is not finite, say). Exit status 1, the last checkpoint stays good."""


class Stopped(Exception):
    """Training was told to stop and did, with nothing lost. Exit status 143, as of a process that SIGTERM ended."""


class OtherRankFailed(Exception):
    """Another of the processes that train together could not go on, or is gone; this one ends too, with status 1."""


def did_you_mean(name: str, options: Iterable[str]) -> str:
    """' (did you mean X?)' for the option nearest to `name`, or '' where none is near."""
    near = difflib.get_close_matches(name, list(options), n=1)
    return f" (did you mean {near[0]!r}?)" if near else ""


def expanded(path: str | Path, instead: str = "a path without ~") -> Path:
    """The path, ~ replaced. UserError where that has no meaning (HOME is not set, no such user), with what else would do."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        raise UserError(f"{path}: no home folder for ~; expected HOME to be set, or {instead}") from None


def check_range(name: str, value: float, low: float, high: float = float("inf")) -> None:
    """UserError unless low <= value <= high."""
    if not low <= value <= high:
        found, least, most = (f"{n:g}" if isinstance(n, float) else str(n) for n in (value, low, high))
        at_most = f", at most {most}" if high < float("inf") else ""
        raise UserError(f"{name}: found {found}, expected at least {least}{at_most}")


def run_command(main: Callable[[], None]) -> None:
    """Run a command's `main`, turning errors for people into a short message and an exit status.

    A character that the terminal lacks is shown as its code. Where the reader of the output has gone, as `| head` does, the
    command ends in silence, with status 141, as of a process that SIGPIPE ended.
    One of several processes ends at once when it is done: gloo's threads now and then abort one that Python takes apart
    ("terminate called without an active exception"), and torchrun would call a finished run failed.
    """
    command = Path(sys.argv[0])
    if command.name == "__main__.py":  # what its help calls it
        sys.argv[0] = f"python -m prlhf.{command.parent.name}"
    for stream in _streams():
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        status = _status(main)
    except BrokenPipeError:
        for stream in _streams():  # what is in their buffers goes nowhere: Python would complain of it at the end
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        status = 141
    if status == 0 and int(os.environ.get("WORLD_SIZE", "1")) > 1:
        os._exit(0)
    if status:
        sys.exit(status)


def _streams() -> list[TextIO]:
    return [stream for stream in (sys.stdout, sys.stderr) if stream is not None]  # None: closed from the start


def _status(main: Callable[[], None]) -> int:
    """The exit status of `main`, its errors told on stderr. BrokenPipeError where nobody reads what it prints."""
    try:
        try:
            main()
        finally:
            for stream in _streams():
                stream.flush()
        return 0
    except BrokenPipeError:  # an OSError
        raise
    except UserError as error:
        if os.environ.get("RANK", "0") != "0":
            time.sleep(3)  # torchrun ends this process where rank 0 had the same to say
        print(f"error: {error}", file=sys.stderr)
        return 2
    except (TrainingError, Stopped, OtherRankFailed) as error:
        if str(error):
            print(f"stopped: {error}", file=sys.stderr)
        return 143 if isinstance(error, Stopped) else 1
    except OSError as error:
        print(f"error: {error.filename or 'file'}: {error.strerror or error}", file=sys.stderr)
        return 2
    except RuntimeError as error:
        torch = sys.modules.get("torch")  # not imported for this: some commands do without
        if torch is None or not isinstance(error, torch.OutOfMemoryError):
            raise
        print(
            f"stopped: no GPU memory left ({str(error).splitlines()[0]}). Lower evaluate.batch_size (--set "
            "evaluate.batch_size=N), or with generate.py --batch-size; what was written so far is good",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
