"""Personalized Soups (Jang et al. 2023, joeljang/RLPHF): six preferences, three opposite pairs; each stands for a user.

Raw: rm_training/P1A.json ... P3B.json, lists of {user_input, completion_a (preferred), completion_b}. user_input ends in a
sentence that names the preference ("Generate a response that ..."). It would give the user away, and is taken off.
"""

import re
from pathlib import Path

from prlhf.data.comparisons import parse_prompt
from prlhf.data.files import Record, parse_json, read_lines
from prlhf.data.sets.raw import Count, Options, RawSet, raw_files, text_key, texts
from prlhf.errors import UserError

SENTENCES = {
    "P1A": "Generate a response that can be easily understood by an elementary school student.",
    "P1B": "Generate a response that only a PhD Student in that specific field could understand.",
    "P2A": "Generate a response that is concise and to the point, without being verbose.",
    "P2B": "Generate a response that is very informative, without missing any background information.",
    "P3A": "Generate a response that is friendly, witty, funny, and humorous, like a close friend.",
    "P3B": "Generate a response in an unfriendly manner.",
}
FILES = tuple(f"{name}.json" for name in SENTENCES)
PUBLISHED = {  # rows, and different rows with two different completions
    "P1A": (48_300, 8_959),
    "P1B": (48_825, 9_069),
    "P2A": (47_350, 8_239),
    "P2B": (49_220, 8_626),
    "P3A": (49_155, 9_356),
    "P3B": (48_565, 9_222),
}
BEGINS = "generate a response"
UNNAMED = "user_inputs that are not a prompt and the preference's sentence"
EVALUATION = "koala_eval_50*.json"


def read(folder: Path, options: Options) -> RawSet:
    """The comparisons of the raw files in `folder`. UserError, with file, item and field, for bad raw data."""
    dropped = dict.fromkeys(("exact duplicates", "equal completions", UNNAMED), 0)
    records, counts = [], []
    for path in raw_files(folder, "psoups", *FILES):
        name, seen = path.stem, set()
        sentence, items = SENTENCES[name], read_list(path)
        for number, raw in enumerate(items, start=1):
            asked, a, b = texts(raw, f"{path}, item {number}", "user_input", "completion_a", "completion_b")
            prompt = without_sentence(asked, sentence)
            if prompt is None:
                dropped[UNNAMED] += 1
            elif a == b:
                dropped["equal completions"] += 1
            elif (prompt, a, b) in seen:
                dropped["exact duplicates"] += 1
            else:
                seen.add((prompt, a, b))
                place = dict(user=name, id=f"{name}:{number}", split_group=text_key(prompt))
                records.append(dict(prompt=prompt, chosen=a, rejected=b, **place, attributes={"preference": sentence}))
        counts.append(Count(f"{name}: rows", len(items), PUBLISHED[name][0]))
        counts.append(Count(f"{name}: different rows with two different completions", len(seen), PUBLISHED[name][1]))
    counts.append(Count(UNNAMED, dropped[UNNAMED], 0))
    evaluation = [*folder.glob(EVALUATION), *folder.glob(f"*/{EVALUATION}")]
    prompts = None
    if evaluation:
        where, numbered = evaluation[0], enumerate(read_list(evaluation[0]), start=1)
        parsed = [(i, parse_prompt(raw.get("prompt"), f"{where}, item {i}")) for i, raw in numbered]
        prompts = [{"id": f"koala:{i}", "prompt": prompt} for i, prompt in parsed]
    return RawSet(records, None, counts, dropped, prompts, known_users=1.0)  # six preferences, all of them known


def read_list(path: Path) -> list[Record]:
    """A JSON file that is a list of objects. UserError, with file and line or item, otherwise."""
    items = parse_json("".join(line for _, line in read_lines(path)), str(path), lines=True)
    if not isinstance(items, list) or not items:
        raise UserError(f"{path}: expected a list of objects, found {'none' if items == [] else type(items).__name__}")
    for number, item in enumerate(items, start=1):
        if not isinstance(item, dict):
            raise UserError(f"{path}, item {number}: expected an object, found {type(item).__name__}")
    return items


def without_sentence(asked: str, sentence: str) -> str | None:
    """The prompt without the sentence at its end, compared by letters alone; None where either is missing."""
    starts = [match.start() for match in re.finditer(BEGINS, asked, re.IGNORECASE)]
    if not starts or _letters(asked[starts[-1] :]) != _letters(sentence):
        return None
    return asked[: starts[-1]].strip() or None


def _letters(text: str) -> str:
    return re.sub("[^a-z]", "", text.lower())
