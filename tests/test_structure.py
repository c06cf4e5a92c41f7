"""What holds for the project as a whole: the direction of imports, the README's table, what is not depended on."""

import ast
import configparser
from pathlib import Path

import pytest

from prlhf.config.table import with_table

ROOT = Path(__file__).resolve().parent.parent
# Data flows one way: each module imports only from those above it.
ORDER = [
    "errors", "heap", "allocations", "config", "data.sources", "data.files", "data", "rules", "leaks", "simulate", "data.download", "data.fetch", "data.reading", "data.splits", "data.tldr", "data.prism",
    "data.psoups", "data.persona", "data.multipref", "data.prepare", "encoding", "batching", "backbones", "loading", "data_check", "user_models", "prior", "logprobs",
    "logprobs_triton", "lora", "losses", "personalized", "distributed", "optim", "scoring", "reference", "solve", "strength", "exact", "intervals", "metrics", "paired", "evaluation", "checkpoint",
    "runs", "training_log", "progress", "updates", "loop", "phases", "memory", "dry_run", "sampling", "responses", "rewards", "report", "compare", "lengths",
    "reference_table", "data.__main__",
]  # fmt: skip


def module_name(path: Path) -> str:
    """`data` for prlhf/data/__init__.py, `data.__main__` for prlhf/data/__main__.py, '' for prlhf/__init__.py."""
    parts = path.relative_to(ROOT / "prlhf").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(path): path for path in (ROOT / "prlhf").rglob("*.py")}


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
    assert set(FILES) - {""} == set(ORDER)


@pytest.mark.parametrize("module", ORDER)
def test_imports_go_up_only(module):
    above = {f"prlhf.{name}" for name in ORDER[: ORDER.index(module)]}
    used = {name for name in imported(FILES[module]) if name.startswith("prlhf.")}
    modules = {name for name in used if name.removeprefix("prlhf.") in ORDER}
    assert modules <= above, modules - above


def test_nothing_is_imported_that_is_not_a_core_dependency():
    allowed = {
        "torch",
        "transformers",
        "tokenizers",  # comes with transformers
        "huggingface_hub",  # as well
        "safetensors",
        "numpy",
        "tqdm",
        "yaml",
        "prlhf",
        "matplotlib",
        "pyarrow",  # an extra, for parquet
        "jinja2",
        "triton",  # comes with torch where there is a GPU, and is imported nowhere else
    }
    standard = __import__("sys").stdlib_module_names
    for path in [*FILES.values(), *ROOT.glob("*.py")]:
        roots = {name.split(".")[0] for name in imported(path)}
        assert roots - standard <= allowed, (path, roots - standard - allowed)


def test_nothing_is_unpickled_and_no_code_comes_with_a_model():
    """Weights are safetensors: no torch.load and no pickle anywhere, so neither without weights_only=True."""
    for path in [*FILES.values(), *ROOT.glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {"pickle", "shelve", "marshal", "dill", "joblib"} & set(imported(path)), path
        for call in (node for node in ast.walk(tree) if isinstance(node, ast.Call)):
            name = ast.unparse(call.func)
            assert name not in {"torch.load", "eval", "exec", "np.load", "yaml.load", "yaml.unsafe_load"}, (path, name)
            keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
            assert keywords.get("trust_remote_code", "False") == "False", path
            if name.startswith("Auto") and name.endswith((".from_pretrained", ".from_config")):
                # None would ask, and take yes for an answer.
                assert keywords["trust_remote_code"] == "False", (path, name)
            if name == "AutoModelForCausalLM.from_pretrained":
                assert keywords["use_safetensors"] == "True", path


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
