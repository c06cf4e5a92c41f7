"""Reading a config: defaults < YAML < --set, with all faults reported at once."""

import contextlib
import dataclasses
import datetime
import math
import operator
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

import yaml

from prlhf.config.faults import cross_faults
from prlhf.config.keys import BOUNDS, GROUPS, KEYS, Config
from prlhf.config.types import choices_of, type_name, types_of
from prlhf.errors import UserError, did_you_mean

BESIDE = Path(__file__).resolve().parent.parent.parent / "configs"
CONFIGS = BESIDE if BESIDE.is_dir() else Path("configs")  # an installed package has none beside it: where one works
REPLACED = ("model.gradient_checkpointing", "model.checkpoint_every")  # by model.recompute

Given = dict[str, tuple[Any, str]]  # dotted key -> (value, where it was given)


def dump(config: Config) -> str:
    """The resolved config as YAML text."""
    return yaml.safe_dump(dataclasses.asdict(config), sort_keys=False)


def differing_keys(one: Config, other: Config) -> list[str]:
    """'optim.lr: 0.001 -> 0.01' for every key in which two configs differ."""
    values = ((name, *map(operator.attrgetter(name), (one, other))) for name in KEYS)
    return [f"{name}: {a!r} -> {b!r}" for name, a, b in values if a != b]


def find_config(name: str) -> Path:
    """The config file `name`, as given or in configs/. UserError where there is none."""
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    raise UserError(f"config {name!r} not found, neither as given nor in {CONFIGS}{did_you_mean(name, known)}")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read defaults < YAML file < ['optim.lr=1e-4', ...]. UserError with *all* faults, each with file, line and key."""
    given, faults = ({}, []) if path is None else _read_yaml(Path(path))
    return _resolve(given, overrides, faults)


def load_resolved(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read a config.yaml that a run wrote; one by an earlier version becomes the config that computes the same."""
    given, faults = _read_yaml(Path(path))
    # Before there was user_model.rank, every config.yaml had shared: true, and it counted for `individual` alone.
    if "user_model.rank" not in given and given.get("user_model.shared", ("", ""))[0] is True:
        del given["user_model.shared"]
    if "model.gradient_checkpointing" in given:
        given["model.recompute"] = (_recompute_of(given), given["model.gradient_checkpointing"][1])
        given = {name: value for name, value in given.items() if name not in REPLACED}
    return _resolve(given, overrides, faults)


def _resolve(given: Given, overrides: Sequence[str], faults: list[str]) -> Config:
    """The config of what a file gave and of the overrides. UserError with `faults` and all that are found here."""
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            faults.append(f"--set {text}: expected key=value")
            continue
        try:
            given[name.strip()] = (yaml.safe_load(value), f"--set {text}")
        except (yaml.YAMLError, ValueError):
            faults.append(f"--set {text}: {value!r} is not a YAML value")
    config = Config()
    for name, (value, where) in given.items():
        try:
            if name in REPLACED:
                raise ValueError(f"replaced by `model.recompute: {_recompute_of(given)}`, which does the same")
            value = _checked(name, value)
        except ValueError as error:
            faults.append(f"{where}: {error}")
            continue
        group, _, inner = name.rpartition(".")
        if group:
            inner, value = group, dataclasses.replace(getattr(config, group), **{inner: value})
        config = dataclasses.replace(config, **{inner: value})
    faults += [f"{given[name][1] if name in given else name}: {text}" for name, text in cross_faults(config)]
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(f"{count} in the config:\n" + "\n".join(f"  {fault}" for fault in faults))
    return config


def _recompute_of(given: Given) -> str:
    """The value of model.recompute that does what the replaced keys did together."""
    checkpointing, every, what = (given.get(name, (None, ""))[0] for name in (*REPLACED, "model.recompute"))
    if not checkpointing:
        return "cheap"
    if what == "elementwise":  # also of every n-th block, which no value says any more: the numbers are the same
        return what
    return f"every:{every}" if every and every != 1 else "blocks"


def _read_yaml(path: Path) -> tuple[Given, list[str]]:
    """The values of a YAML file and its faults, from nodes, which know their lines. UserError where it is no such file."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}, line {mark.line + 1}" if mark else str(path)
        raise UserError(f"{where}: not valid YAML ({getattr(error, 'problem', error)})") from None
    if isinstance(root, (yaml.ScalarNode, yaml.SequenceNode)):
        raise UserError(f"{path}, line 1: expected `key: value` lines, found a {root.id}")
    given: Given = {}
    faults = []
    for name, line, node in _entries(root) if root else ():
        where = f"{path}, line {line}, {name}"
        if name in given:
            faults.append(f"{where}: given twice")
        if isinstance(node, yaml.MappingNode) and "." not in name:
            faults.append(f"{where}: no such group{did_you_mean(name, GROUPS)}")
            continue
        try:
            given[name] = (yaml.SafeLoader("").construct_object(node, deep=True), where)
        except (yaml.YAMLError, ValueError):
            faults.append(f"{where}: {getattr(node, 'value', '')!r} is not a plain YAML value")
    return given, faults


def _entries(root: yaml.Node) -> Iterator[tuple[str, int, yaml.Node]]:
    """(dotted name, line, value) of each key of a mapping; the keys of a group one by one."""
    for key, value in root.value:
        name = str(key.value)
        if isinstance(value, yaml.MappingNode) and name in GROUPS:
            for inner, inner_value in value.value:
                yield f"{name}.{inner.value}", inner.start_mark.line + 1, inner_value
        else:
            yield name, key.start_mark.line + 1, value


def _checked(name: str, value: Any) -> Any:
    """`value` in the type of the key `name`; ValueError with what was found and expected."""
    if name in GROUPS:
        raise ValueError(f"{name} is a group of keys, found {value!r}")
    if name not in KEYS:
        raise ValueError(f"no such key{did_you_mean(name, KEYS)}")
    declared = KEYS[name]
    if float in types_of(declared) and not isinstance(value, bool):
        with contextlib.suppress(TypeError, ValueError, OverflowError):
            value = float(value)  # 1 for 1.0, and 5e-5, which is a string to YAML 1.1
    elif datetime.date in types_of(declared) and isinstance(value, str):
        with contextlib.suppress(ValueError):
            value = datetime.date.fromisoformat(value)  # in quotes
    elif isinstance(value, list) and all(isinstance(item, str) for item in value):
        value = tuple(value)
    if not any(_fits(value, option) for option in types_of(declared)):
        near = did_you_mean(value, choices_of(declared)) if isinstance(value, str) else ""
        raise ValueError(f"found {value!r}, expected {type_name(declared)}{near}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"found {value!r}, expected a finite number")
    for bound, limit in declared.metadata["bounds"].items():
        holds, _, words = BOUNDS[bound]
        if isinstance(value, (int, float)) and not holds(value, limit):
            raise ValueError(f"found {value!r}, expected {words} {limit}")
    return value


def _fits(value: Any, option: Any) -> bool:
    """Whether a value is of a type exactly (true is no int), or one of a Literal's strings."""
    if get_origin(option) is Literal:
        patterns = [choice.replace(":N", ":[1-9][0-9]*") for choice in get_args(option)]
        return isinstance(value, str) and any(re.fullmatch(pattern, value) for pattern in patterns)
    return type(value) is (get_origin(option) or option)
