"""MultiPref (Miranda et al. 2024, allenai/multipref): four annotators' votes on each pair of responses.

Raw: JSON Lines or parquet, a row {comparison_id, text (the prompt), completion_a, completion_b,
normal_worker_annotations[{evaluator, overall_pref, ...}], expert_worker_annotations[...]}. Each evaluator's vote is a comparison;
ties are none.
"""

from pathlib import Path

from prlhf.data.files import format_of, read_records
from prlhf.data.sets.raw import Count, Options, RawSet, field, objects, raw_files, text_key
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
    """The comparisons of the raw files in `folder`. UserError with file, line and field for what is none."""
    dropped = dict.fromkeys(("ties", "votes on equal completions"), 0)
    records, rows = [], 0
    for path in raw_files(folder, "multipref", *FILES):
        for place, raw in read_records(path, format_of(path)):
            where = f"{path}, {place}"
            prompt, a, b = (field(raw, name, str, where) for name in ("text", "completion_a", "completion_b"))
            pair = raw.get("comparison_id", f"{path.stem}:{rows}")
            rows += 1
            for name in ANNOTATIONS:
                for i, vote in enumerate(objects(raw, name, where, optional=True)):
                    at = f"{where}, {name}[{i}]"
                    evaluator, said = field(vote, "evaluator", str, at), field(vote, "overall_pref", str, at)
                    if said not in VOTES:
                        hint = did_you_mean(said, VOTES)
                        raise UserError(f"{at}, overall_pref: found {said!r}{hint}, expected one of {', '.join(VOTES)}")
                    if VOTES[said] is None or a == b:
                        dropped["ties" if VOTES[said] is None else "votes on equal completions"] += 1
                        continue
                    chosen, rejected = (a, b) if VOTES[said] else (b, a)
                    records.append(
                        {
                            "prompt": prompt,
                            "chosen": chosen,
                            "rejected": rejected,
                            "user": evaluator,
                            "id": f"{pair}:{evaluator}",
                            "split_group": text_key(prompt),
                        }
                    )
    return RawSet(records, None, [Count("rows", rows, ROWS)], dropped)
