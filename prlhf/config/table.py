"""The configuration reference, from the dataclasses: `python -m prlhf.config.table docs/config.md` writes it there."""

import json
import sys
from pathlib import Path

from prlhf.config.keys import BOUNDS, KEYS
from prlhf.config.types import type_name
from prlhf.errors import UserError, run_command

BEGIN, END = "<!-- configuration: made by `make config-table` -->", "<!-- end of configuration -->"


def table() -> str:
    """Every key with its type, range, default and meaning, as Markdown."""
    lines = ["| key | value | default | |", "|---|---|---|---|"]
    for name, declared in KEYS.items():
        bounds = ", ".join(f"{BOUNDS[bound][1]} {limit}" for bound, limit in declared.metadata["bounds"].items())
        value, default = f"{type_name(declared)} {bounds}".strip(), json.dumps(declared.default).strip('"')
        cells = (f"`{name}`", value, default, declared.metadata["doc"])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def with_table(text: str) -> str:
    """`text` with the table between the two marks. UserError where a mark is missing."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise UserError(f"expected the marks {BEGIN!r} and {END!r}")
    return f"{before}{BEGIN}\n\n{table()}\n\n{END}{after}"


def main() -> None:
    """Write the table into the file named on the command line."""
    path = Path(sys.argv[1])
    path.write_text(with_table(path.read_text(encoding="utf-8")), encoding="utf-8")


if __name__ == "__main__":
    run_command(main)
