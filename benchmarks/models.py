"""The table of docs/models.md: which families of causal LMs are right here, shown on tiny random models (`make models-table`).

    PYTHONPATH=tests python benchmarks/models.py docs/models.md
    PYTHONPATH=tests python benchmarks/models.py --families llama gemma2

tests/families.py makes the models, tests/right_numbers.py compares. All families take some minutes on one core.
"""

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

import right_numbers
import torch
import transformers
from families import FAMILIES, tiny_model
from right_numbers import LAYOUTS, Verdict

MARK = "| family |"  # the table begins here; what stands before it on the page is prose
HEADER = [
    "| family | models | tree | packed | rows | decoding | final/ | LoRA adapts | what is refused, and why |",
    "|---|---|---|---|---|---|---|---|---|",
]


def main() -> None:
    """Print the table, or write it to the end of a page."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("page", type=Path, nargs="?", help="the page whose table is replaced; default: print it")
    parser.add_argument("--families", nargs="+", choices=list(FAMILIES), default=list(FAMILIES), metavar="FAMILY")
    args = parser.parse_args()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    lines = []
    for family in args.families:
        lines.append(line(family))
        print(lines[-1], flush=True)
    if args.page:
        prose = args.page.read_text(encoding="utf-8").partition(MARK)[0]
        args.page.write_text(prose + "\n".join([*HEADER, *sorted(lines, key=order)]) + "\n", encoding="utf-8")


def order(text: str) -> tuple[int, str]:
    """Families that are right in every layout first, then those of rows alone, then those that are refused."""
    return -text.count("| right "), text


def line(family: str) -> str:
    """The table's line of a family."""
    reasons: dict[str, list[str]] = {}  # and what each refuses

    def cell(what: str, compute: Callable[[], Verdict]) -> str:
        try:
            found = compute()
        except Exception as error:  # a traceback to the user: to be seen in the table
            found = Verdict(False, f"{type(error).__name__}: {error}")
        if found.refused:
            reason = re.sub(r"^layout \w+ fails: ", "", " ".join(found.refused.split()))
            reasons.setdefault(reason[:110].replace("|", "/"), []).append(what)
        return "right" if found.right else "no" if found.refused else f"**wrong** by {found.difference:.1g}"

    targets: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        tiny_model(family).save_pretrained(folder)
        own = right_numbers.own_model(folder)
        cells = {kind: cell(kind, lambda kind=kind: right_numbers.of_layout(folder, own, kind)) for kind in LAYOUTS}
        layout = next((kind for kind, found in cells.items() if found == "right"), None)
        if layout:
            cells["decoding"] = cell("decoding", lambda: right_numbers.of_decoding(folder, own, layout))
            cells["final/"] = cell("final/", lambda: right_numbers.of_final(folder, layout))
            cells["LoRA"] = cell("LoRA", lambda: right_numbers.of_lora(folder, layout, targets))
            if cells["LoRA"] == "right":
                cells["LoRA"] = ", ".join(targets)
    shown = [cells.get(column, "") for column in (*LAYOUTS, "decoding", "final/", "LoRA")]
    why = "; ".join(f"{', '.join(what)}: {reason}" for reason, what in reasons.items())
    return f"| {family} | {FAMILIES[family]} | {' | '.join(shown)} | {why} |"


if __name__ == "__main__":
    main()
