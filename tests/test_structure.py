"""What holds for the project as a whole: the direction of imports, the README's table, what is not depended on."""

import ast
import configparser
from pathlib import Path

import pytest

from prlhf.reference_table import with_table

ROOT = Path(__file__).resolve().parent.parent
# Data flows one way: each module imports only from those above it.
ORDER = [
    "errors", "config", "data", "encoding", "batching", "backbones", "user_models", "logprobs", "lora", "losses",
    "personalized", "scoring", "reference", "metrics", "evaluation", "checkpoint", "runs", "training_log", "loop", "sampling",
    "responses", "report", "simulate", "lengths", "reference_table",
]  # fmt: skip


def imported(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return found


def test_every_module_has_its_place():
    assert {p.stem for p in (ROOT / "prlhf").glob("*.py")} - {"__init__"} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_up_only(module):
    above = {f"prlhf.{name}" for name in ORDER[: ORDER.index(module)]}
    used = {name for name in imported(ROOT / "prlhf" / f"{module}.py") if name.startswith("prlhf.")}
    modules = {name for name in used if name.split(".")[1] in ORDER and name.count(".") == 1}
    assert modules <= above, modules - above


def test_nothing_is_imported_that_is_not_a_core_dependency():
    allowed = {
        "torch",
        "transformers",
        "tokenizers",
        "safetensors",
        "numpy",
        "tqdm",
        "yaml",
        "prlhf",
        "matplotlib",
        "jinja2",
    }
    standard = __import__("sys").stdlib_module_names
    for path in [*(ROOT / "prlhf").glob("*.py"), *ROOT.glob("*.py")]:
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots - standard <= allowed, (path, roots - standard - allowed)


def test_setup_cfg_asks_for_the_core_alone():
    setup = configparser.ConfigParser()
    setup.read(ROOT / "setup.cfg")
    required = {line.split(">")[0] for line in setup["options"]["install_requires"].split()}
    assert required == {"torch", "transformers", "safetensors", "sentencepiece", "numpy", "tqdm", "pyyaml"}


def test_the_readmes_configuration_reference_is_the_dataclasses():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert with_table(text) == text, "run `make config-table`"


def test_every_file_that_the_readme_names_exists():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    for name in __import__("re").findall(r"`((?:prlhf|configs|examples|docs|tests)/[\w./-]+\.\w+)`", text):
        assert (ROOT / name).exists(), name


def test_root_scripts_are_short():
    for path in ROOT.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 100, path
