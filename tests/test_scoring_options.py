"""Options of generate.py that have no part in scoring are refused, before anything is loaded."""

import pytest

from prlhf.generate import __main__ as generate


@pytest.mark.parametrize(
    "option, value",
    [("--users", "alice"), ("--limit", 3), ("--max-new-tokens", 7), ("--temperature", 0.5), ("--top-p", 0.9), ("--seed", 1)],
)  # fmt: skip
def test_options_of_generation_are_refused_where_responses_are_scored(call, tmp_path, option, value):
    out = tmp_path / "rewards.jsonl"
    common = ("--checkpoint", tmp_path / "nothing", "--score", tmp_path / "f.jsonl", "--out", out)
    status, _, err = call(generate.main, *common, option, value)
    assert status == 2 and "Traceback" not in err and not out.exists()
    assert f"error: {option}: not for --score" in err and "--batch-size" in err
    status, _, err = call(generate.main, *common, "--batch-size", 2, "--overwrite")  # these are of scoring, too
    assert status == 2 and "not for --score" not in err and "nothing" in err
