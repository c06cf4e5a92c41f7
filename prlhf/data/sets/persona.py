"""PERSONA (Castricato et al. 2024, SynthLabsAI/PERSONA): synthetic personas, whose texts are the user texts.

Raw: gated parquet with the columns persona (a text), instruction, data (the chosen response), original (the rejected one);
200 rows a persona. A persona is a user, named by its place in the file.
"""

from pathlib import Path

from prlhf.data.files import Record, read_records
from prlhf.data.sets.raw import Count, Options, RawSet, raw_files, text_key, texts

FILES = ("*.parquet",)
PERSONAS, ROWS = 1_000, 200  # of the published subset; the paper has 1,586 personas and 317,200 rows


def read(folder: Path, options: Options) -> RawSet:
    """The comparisons of the raw files in `folder`. UserError, with file, row and field, for bad raw data."""
    users: dict[str, str] = {}
    records, rows = [], 0
    for path in raw_files(folder, "persona", *FILES):
        for where, number, raw in read_records(path):
            persona, prompt, chosen, rejected = texts(raw, where, "persona", "instruction", "data", "original")
            user = users.setdefault(persona, f"persona{len(users) + 1}")
            rows += 1
            if chosen != rejected:
                about: Record = dict(user=user, user_text=persona, attributes=attributes(persona))
                place = dict(id=f"{path.stem}:{number}", split_group=text_key(prompt))
                records.append(dict(prompt=prompt, chosen=chosen, rejected=rejected, **about, **place))
    counts = [Count("personas", len(users), PERSONAS), Count("rows", rows, PERSONAS * ROWS)]
    return RawSet(records, None, counts, {"equal responses": rows - len(records)})


def attributes(persona: str) -> dict[str, str]:
    """The lines "name: value" of a persona's text, by name."""
    parts = (line.partition(":") for line in persona.splitlines())
    return {name.strip(): value.strip() for name, _, value in parts if name.strip() and value.strip()}
