"""MultiPref (Miranda et al. 2024, allenai/multipref): four annotators' votes on each pair of responses.

Raw: JSON Lines or parquet, a row {comparison_id, text (the prompt), completion_a, completion_b,
normal_worker_annotations[{evaluator, overall_pref, ...}], expert_worker_annotations[...]}. Each evaluator's vote is a
comparison; ties are dropped.
"""

from pathlib import Path

from prlhf.data.files import read_records
from prlhf.data.sets.raw import Count, Options, RawSet, objects, raw_files, text_key, texts
from prlhf.errors import UserError, did_you_mean

FILES = ("*.jsonl|*.parquet",)
ROWS = 10_461
VOTES = {  # whether A is preferred; None is a tie
    "A-is-clearly-better": True,
    "A-is-slightly-better": True,
    "Tie": None,
    "B-is-slightly-better": False,
    "B-is-clearly-better": False,
}
ANNOTATIONS = ("normal_worker_annotations", "expert_worker_annotations")


def read(folder: Path, options: Options) -> RawSet:
    """The comparisons of the raw files in `folder`. UserError, with file, line and field, for bad raw data."""
    dropped = dict.fromkeys(("ties", "votes on equal completions"), 0)
    records, rows = [], 0
    for path in raw_files(folder, "multipref", *FILES):
        for where, _, raw in read_records(path):
            prompt, a, b = texts(raw, where, "text", "completion_a", "completion_b")
            pair = raw.get("comparison_id", f"{path.stem}:{rows}")
            rows += 1
            votes = [(f"{where}, {n}[{i}]", v) for n in ANNOTATIONS for i, v in enumerate(objects(raw, n, where, True))]
            for at, vote in votes:
                evaluator, said = texts(vote, at, "evaluator", "overall_pref")
                if said not in VOTES:
                    hint = did_you_mean(said, VOTES)
                    raise UserError(f"{at}, overall_pref: found {said!r}{hint}, expected one of {', '.join(VOTES)}")
                if VOTES[said] is None or a == b:
                    dropped["ties" if VOTES[said] is None else "votes on equal completions"] += 1
                    continue
                chosen, rejected = (a, b) if VOTES[said] else (b, a)
                place = dict(user=evaluator, id=f"{pair}:{evaluator}", split_group=text_key(prompt))
                records.append(dict(prompt=prompt, chosen=chosen, rejected=rejected, **place))
    return RawSet(records, None, [Count("rows", rows, ROWS)], dropped)
