"""What every command does with an error, a terminal or a home folder that is not as expected."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from prlhf.config.load import load_config
from prlhf.data.comparisons import read_comparisons
from prlhf.data.files import write_json_lines
from prlhf.data.sources import cache_dir
from prlhf.errors import UserError
from prlhf.store.final import find_final
from prlhf.store.runs import open_run


@pytest.mark.parametrize(
    "use",
    [
        read_comparisons,
        find_final,
        lambda path: write_json_lines(path, []),
        lambda path: open_run(load_config(None, ("model.family=llama", f"run_dir={path}")), "x"),
    ],
    ids=["data", "checkpoint", "output", "run_dir"],
)
@pytest.mark.parametrize("path", ["~/f.jsonl", "~nobody_of_this_name/f.jsonl"])
def test_a_home_that_is_not_known_is_one_sentence(monkeypatch, use, path):
    """As in a container whose user is in no passwd file."""

    def nobody(_):
        raise KeyError

    monkeypatch.delenv("HOME")
    monkeypatch.setattr(pwd, "getpwuid", nobody)
    with pytest.raises(
        UserError, match=f"^{path}: no home folder for ~; expected HOME to be set, or a path without ~$"
    ):
        use(path)


def test_without_a_home_the_cache_needs_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(pwd, "getpwuid", lambda _: {}[0])
    monkeypatch.delenv("HOME")
    assert cache_dir() == tmp_path / "cache"  # PRLHF_CACHE, as the tests set it
    monkeypatch.delenv("PRLHF_CACHE")
    with pytest.raises(
        UserError, match="~/.cache/prlhf: no home folder for ~; expected HOME to be set, or PRLHF_CACHE"
    ):
        cache_dir()


ROOT = Path(__file__).resolve().parent.parent


def command(body, **streams):
    """Start a command whose `main` is `body`, in a process of its own: pytest's own stdout has no pipe."""
    code = f"from prlhf.errors import *\nimport sys\ndef main():\n    {body}\nrun_command(main)"
    return subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, text=True, **streams)


@pytest.mark.parametrize(
    "body",
    [
        "print('a report of a line')",  # still in the buffer when main ends
        "print('x' * 10**6)",
        "print('usage: ...'); sys.exit(0)",  # as argparse's --help
    ],
    ids=["short", "long", "help"],
)
def test_a_reader_that_has_gone_ends_a_command_in_silence(body):
    read, write = os.pipe()
    os.close(read)
    process = command(body, stdout=write, stderr=subprocess.PIPE)
    os.close(write)
    assert process.communicate()[1] == "" and process.returncode == 141  # 128 + SIGPIPE


def test_an_error_that_nobody_reads_ends_a_command_in_silence():
    read, write = os.pipe()
    os.close(read)
    process = command("raise UserError('no')", stdout=write, stderr=write)
    os.close(write)
    assert process.wait() == 141


def test_a_terminal_without_a_character_shows_its_code(monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")
    process = command(
        r"print('Zo\xeb \xb1 1'); raise UserError('\xeb')", stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.communicate() == ("Zo\\xeb \\xb1 1\n", "error: \\xeb\n") and process.returncode == 2
