"""Reading a config: defaults < YAML < --set, with all faults told at once."""

import dataclasses
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from prlhf.config.faults import cross_faults
from prlhf.config.keys import KEYS, Config, type_name
from prlhf.errors import UserError, did_you_mean

CONFIGS = Path(__file__).resolve().parent.parent.parent / "configs"


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain dicts, as config.yaml holds it."""
    plain = {"dict_factory": lambda items: {k: list(v) if isinstance(v, tuple) else v for k, v in items}}
    return dataclasses.asdict(config, **plain)


def dump(config: Config) -> str:
    """The resolved config as YAML text."""
    return yaml.safe_dump(to_dict(config), sort_keys=False)


def differing_keys(one: Config, other: Config) -> list[str]:
    """'optim.lr: 0.001 -> 0.01' for every key in which two configs differ."""
    a, b = _flatten(to_dict(one)), _flatten(to_dict(other))
    return [f"{name}: {a[name]!r} -> {b[name]!r}" for name in KEYS if a[name] != b[name]]


def find_config(name: str) -> Path:
    """The config file `name`, as given or in configs/. UserError where there is none."""
    for path in (Path(name), CONFIGS / name, CONFIGS / f"{name}.yaml"):
        if path.is_file():
            return path
    known = sorted(path.name for path in CONFIGS.glob("*.yaml"))
    raise UserError(f"config {name!r} not found, neither as given nor in {CONFIGS}{did_you_mean(name, known)}")


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> Config:
    """Read defaults < YAML file < ['optim.lr=1e-4', ...]. UserError with *all* faults, each with file, line and key."""
    faults: list[str] = []
    values: dict[str, tuple[Any, str]] = {}  # dotted key -> (value, where it was said)
    if path is not None:
        values.update(_read_yaml(Path(path), faults))
    for text in overrides:
        name, equals, value = text.partition("=")
        if not equals:
            faults.append(f"--set {text}: expected key=value")
            continue
        try:
            values[name.strip()] = (yaml.safe_load(value), f"--set {text}")
        except (yaml.YAMLError, ValueError):
            faults.append(f"--set {text}: {value!r} is not a YAML value")

    good: dict[str, Any] = {}
    for name, (value, where) in values.items():
        try:
            good[name] = _checked(name, value)
        except ValueError as error:
            faults.append(f"{where}: {error}")
    config = _build(good)
    faults += cross_faults(config, {name: where for name, (_, where) in values.items()})
    if faults:
        count = "1 fault" if len(faults) == 1 else f"{len(faults)} faults"
        raise UserError(f"{count} in the config:\n" + "\n".join(f"  {fault}" for fault in faults))
    return config


def load_resolved(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """A config.yaml that a run wrote, with every key that there was.

    Before there was user_model.rank, shared: true stood in each of them, and counted for `individual` alone: null, now.
    """
    said = {name: value for name, (value, _) in _read_yaml(Path(path), []).items()}
    early = "user_model.rank" not in said and said.get("user_model.shared") is True
    return load_config(path, [*(["user_model.shared=null"] if early else []), *overrides])


def _flatten(nested: dict[str, Any]) -> dict[str, Any]:
    flat = {}
    for name, value in nested.items():
        if isinstance(value, dict):
            flat.update({f"{name}.{inner}": v for inner, v in value.items()})
        else:
            flat[name] = value
    return flat


def _build(flat: dict[str, Any]) -> Config:
    groups: dict[str, dict[str, Any]] = {}
    top: dict[str, Any] = {}
    for name, value in flat.items():
        group, dot, inner = name.partition(".")
        if dot:
            groups.setdefault(group, {})[inner] = value
        else:
            top[name] = value
    default = Config()
    return dataclasses.replace(
        default, **top, **{name: dataclasses.replace(getattr(default, name), **group) for name, group in groups.items()}
    )


def _read_yaml(path: Path, faults: list[str]) -> dict[str, tuple[Any, str]]:
    """Dotted key -> (value, 'file, line n, key'), straight from the YAML nodes, which know their lines."""
    try:
        root = yaml.compose(path.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not UTF-8 text") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        raise UserError(f"{path}{line}: not valid YAML ({getattr(error, 'problem', error)})") from None
    values: dict[str, tuple[Any, str]] = {}
    if root is None:
        return values
    if not isinstance(root, yaml.MappingNode):
        raise UserError(f"{path}, line 1: expected `key: value` lines, found a {root.id}")
    constructor = yaml.SafeLoader("")

    def visit(node: yaml.MappingNode, prefix: str) -> None:
        for key_node, value_node in node.value:
            name = prefix + str(key_node.value)
            where = f"{path}, line {key_node.start_mark.line + 1}, {name}"
            if name in values:
                faults.append(f"{where}: given twice")
            if isinstance(value_node, yaml.MappingNode) and not prefix:
                if name not in _group_names():
                    faults.append(f"{where}: no such group{did_you_mean(name, _group_names())}")
                else:
                    visit(value_node, f"{name}.")
            else:
                try:
                    values[name] = (constructor.construct_object(value_node, deep=True), where)
                except (yaml.YAMLError, ValueError):
                    faults.append(f"{where}: {getattr(value_node, 'value', '')!r} is not a plain YAML value")

    visit(root, "")
    return values


def _group_names() -> list[str]:
    return [outer.name for outer in dataclasses.fields(Config) if dataclasses.is_dataclass(outer.type)]


def _checked(name: str, value: Any) -> Any:
    """`value` in the type of the key `name`; ValueError with what was found and expected."""
    if name not in KEYS:
        if name in _group_names():
            raise ValueError(f"{name} is a group of keys, found {value!r}")
        raise ValueError(f"no such key{did_you_mean(name, KEYS)}")
    declared = KEYS[name]
    expected = type_name(declared)
    options = typing.get_args(declared.type) if isinstance(declared.type, types.UnionType) else (declared.type,)
    value = _coerced(value, options)
    allowed = tuple({typing.get_origin(o) or o for o in options})
    if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
        raise ValueError(f"found {value!r}, expected {expected}")
    if value is None or isinstance(value, bool):
        return value
    limits = declared.metadata
    if limits["choices"] and isinstance(value, str) and value not in limits["choices"]:
        raise ValueError(f"found {value!r}, expected {expected}{did_you_mean(str(value), limits['choices'])}")
    if isinstance(value, (int, float)):
        if not abs(value) < float("inf"):
            raise ValueError(f"found {value!r}, expected a finite number")
        for bound, fails, words in (
            ("low", lambda b: value < b, "at least"),
            ("high", lambda b: value > b, "at most"),
            ("above", lambda b: value <= b, "more than"),
        ):
            if limits[bound] is not None and fails(limits[bound]):
                raise ValueError(f"found {value!r}, expected {words} {limits[bound]}")
    return value


def _coerced(value: Any, options: Sequence[Any]) -> Any:
    """YAML's near misses: 1 for 1.0, '5e-5' (a string to YAML 1.1), a list of names for a tuple."""
    if float in options and not isinstance(value, bool):
        try:
            return float(value)
        except (TypeError, ValueError, OverflowError):
            return value
    if isinstance(value, list) and all(isinstance(item, str) for item in value):
        return tuple(value)
    return value
