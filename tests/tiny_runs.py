"""Small reward models trained on examples/tiny, and new users of them."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from prlhf.train import __main__ as train

ROOT = Path(__file__).resolve().parent.parent
HEAD = (
    "model.width=32", "model.heads=2", "method=prm", "user_model.aggregator=linear", "user_model.tokens=1", "model.pooling=both",
    "model.frozen=true", "user_model.prior=2", "user_model.shared_prior=1", "evaluate.bootstrap=100",
)  # fmt: skip
FORMS = {
    "low rank": ("user_model.rank=2",),
    "cluster": ("user_model.kind=cluster", "user_model.clusters=3"),
    "full": (),
    "alone": ("user_model.shared=false",),
}
LINES = [json.loads(line) for line in (ROOT / "examples/tiny/train.jsonl").read_text().splitlines()]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def trained_run(folder: Path, form: str) -> Path:
    """A trained reward model of a form."""
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        patch.setenv("PRLHF_CACHE", str(folder.parent / "cache"))
        keys = (f"run_dir={folder}", "data.valid=null", *HEAD, *FORMS[form])
        patch.setattr("sys.argv", ["train", "--config", "tiny", "--set", *keys])
        train.main()
    return folder


def write_lines(path: Path, users: dict[str, str], swap: bool = False, count: int = 99) -> Path:
    """Some users' training comparisons under other names; swapped: with the other response chosen."""
    lines = []
    for old, new in users.items():
        for line in [line for line in LINES if line["user"] == old][:count]:
            sides = (line["rejected"], line["chosen"]) if swap else (line["chosen"], line["rejected"])
            lines.append({**line, "user": new, "chosen": sides[0], "rejected": sides[1], "id": f"{new} {len(lines)}"})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def weights(folder: Path) -> dict[str, Tensor]:
    return load_file(folder / "users.safetensors")


def users_of(folder: Path) -> list[str]:
    return json.loads((folder / "users.json").read_text())["users"]
