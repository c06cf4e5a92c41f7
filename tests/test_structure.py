"""What holds for the project as a whole: the order of rooms, what each may import, the tables in docs/, what is not depended on."""

import ast
import configparser
import re
import sys
from collections import defaultdict
from pathlib import Path

import pytest

from prlhf.config.table import with_table

ROOT = Path(__file__).resolve().parent.parent
# Data flows one way: a room imports only from itself and from those before it. Those of the last line are commands' own.
ROOMS = [
    "errors", "config", "data", "batch", "backbone", "kernels", "method", "parallel", "score", "solve", "store", "evaluate",
    "train", "generate",
    "adapt", "judge", "forecast", "compare", "lengths", "simulate", "users",
]  # fmt: skip
COMMANDS_OWN = {"forecast", "adapt", "judge", "rl", "export", "serve"}
METHOD_READS = {"config", "batch", "backbone", "kernels", "method"}


def module_name(path: Path) -> str:
    """`data` for prlhf/data/__init__.py, `data.__main__` for prlhf/data/__main__.py, '' for prlhf/__init__.py."""
    parts = path.relative_to(ROOT / "prlhf").with_suffix("").parts
    return ".".join(part for part in parts if part != "__init__")


FILES = {module_name(path): path for path in sorted((ROOT / "prlhf").rglob("*.py"))}
TREES = {name: ast.parse(path.read_text(encoding="utf-8")) for name, path in FILES.items()}
COMMANDS = {name for name in FILES if name.endswith("__main__")} | {""}  # with the face, prlhf/__init__.py
INNER = sorted(set(FILES) - COMMANDS)


def imported(tree: ast.AST) -> set[str]:
    """Every module, and every name of a module, that a file imports; by a string too (importlib.import_module)."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "relative import"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            found.add(node.args[0].value if isinstance(node.args[0], ast.Constant) else ast.unparse(node.args[0]))
    return found


def ours(name: str) -> set[str]:
    """The modules of prlhf that one imports."""
    return {found[6:] for found in imported(TREES[name]) if found.startswith("prlhf.") and found[6:] in FILES}


def room(name: str) -> str:
    """The folder that a module is in."""
    return name.partition(".")[0]


def test_prlhf_itself_holds_only_its_face_and_errors():
    assert {path.name for path in (ROOT / "prlhf").glob("*.py")} == {"__init__.py", "__main__.py", "errors.py"}
    assert {room(name) for name in FILES} - {"", "__main__"} == set(ROOMS)


@pytest.mark.parametrize("name", INNER)
def test_imports_between_rooms_go_one_way(name):
    below = ROOMS[: ROOMS.index(room(name)) + 1]
    assert {found for found in ours(name) if room(found) not in below} == set()
    assert not {found for found in ours(name) if found.endswith("__main__")}


def test_modules_do_not_import_each_other_in_a_circle():
    left = {name: ours(name) - {name} for name in FILES}
    while free := {name for name, needs in left.items() if not needs & left.keys()}:
        left = {name: needs for name, needs in left.items() if name not in free}
    assert not left


def test_only_commands_import_what_is_of_a_command_alone():
    for name in INNER:
        assert not {found for found in ours(name) if room(found) in COMMANDS_OWN - {room(name)}}, name


def test_the_method_imports_nothing_around_it():
    standard = sys.stdlib_module_names
    for name in (name for name in INNER if room(name) == "method"):
        assert {room(found) for found in ours(name)} <= METHOD_READS, name
        roots = {found.split(".")[0] for found in imported(TREES[name])} - standard
        assert roots <= {"torch", "transformers", "prlhf"}, name


def test_the_plain_method_imports_torch_users_and_losses_alone():
    assert ours("method.plain") == {"method.users", "method.losses"}
    assert {found.split(".")[0] for found in imported(TREES["method.plain"])} <= {"torch", "prlhf"}
    assert len(FILES["method.plain"].read_text(encoding="utf-8").splitlines()) <= 150


def test_only_parallel_knows_of_process_groups():
    for name in FILES:
        used = {found for found in imported(TREES[name]) if found.startswith("torch.distributed")}
        assert not used or room(name) == "parallel", (name, used)


def test_statistics_need_numpy_alone():
    for name in (name for name in INNER if name.startswith("evaluate.stats.")):
        roots = {found.split(".")[0] for found in imported(TREES[name])} - sys.stdlib_module_names
        assert roots <= {"numpy", "prlhf"} and all(found.startswith("evaluate.stats") for found in ours(name)), name


def test_no_module_changes_another_ones_attributes():
    """Neither by assignment nor by setattr: what differs is passed."""
    for name, tree in TREES.items():
        modules = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                modules.update(alias.asname or alias.name.split(".")[0] for alias in node.names if alias.name != "sys")
            elif isinstance(node, ast.ImportFrom):
                both = ((f"{node.module}.{alias.name}"[6:], alias.asname or alias.name) for alias in node.names)
                modules.update(bound for found, bound in both if found in FILES)
        for node in ast.walk(tree):
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            flat = [t for target in targets for t in (target.elts if isinstance(target, ast.Tuple) else [target])]
            for target in (t for t in flat if isinstance(t, ast.Attribute) and isinstance(t.value, ast.Name)):
                assert target.value.id not in modules, (name, ast.unparse(target))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "setattr":
                assert ast.unparse(node.args[0]) not in modules, (name, ast.unparse(node))


def test_no_two_public_classes_or_constants_share_a_name():
    """A type or a constant has one meaning; FILES and ATTRIBUTES are what each data set's reader has by that name."""
    where = defaultdict(set)
    for name, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                where[node.name].add(name)
            for target in node.targets if isinstance(node, ast.Assign) else ():
                if isinstance(target, ast.Name) and re.fullmatch("[A-Z][A-Z_]+", target.id):
                    where[target.id].add(name)
    sets = {name for name in FILES if name.startswith("data.sets.")}
    assert {what: names for what, names in where.items() if len(names) > 1 and not names <= sets} == {}


def test_functions_and_files_are_short():
    """Files under 300 lines, functions under 50."""
    long_files = {name for name, path in FILES.items() if len(path.read_text(encoding="utf-8").splitlines()) >= 300}
    assert long_files == set()
    for name, tree in TREES.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 50, (name, node.name)


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
        "openai",  # an extra, for judges on a server
        "httpx2",  # comes with openai
        "jinja2",
        "triton",  # comes with torch where there is a GPU, and is imported nowhere else
    }
    for path in [*FILES.values(), *ROOT.glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        roots = {n.split(".")[0] for n in imported(tree) if not n.startswith(("f'", 'f"'))} - sys.stdlib_module_names
        assert roots <= allowed, (path, roots - allowed)


def test_nothing_is_unpickled_and_no_code_comes_with_a_model():
    """Weights are safetensors: no torch.load and no pickle anywhere, so neither without weights_only=True."""
    for path in [*FILES.values(), *ROOT.glob("*.py")]:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert not {"pickle", "shelve", "marshal", "dill", "joblib"} & set(imported(tree)), path
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


def test_the_configuration_reference_is_the_dataclasses():
    text = (ROOT / "docs" / "config.md").read_text(encoding="utf-8")
    assert with_table(text) == text, "run `make config-table`"


def test_every_file_that_the_documentation_names_exists():
    for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")]:
        text = path.read_text(encoding="utf-8")
        for name in re.findall(r"(?<![\w./-])((?:prlhf|configs|examples|docs|tests|benchmarks)/[\w./-]+\.\w+)", text):
            assert (ROOT / name).exists(), (path.name, name)


def test_the_readme_is_short():
    assert len((ROOT / "README.md").read_text(encoding="utf-8").splitlines()) <= 160


def test_root_scripts_are_thin():
    for path in ROOT.glob("*.py"):
        assert len(path.read_text(encoding="utf-8").splitlines()) < 20, path
