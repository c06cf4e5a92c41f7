"""The types of config keys, as code and in words."""

import dataclasses
import datetime
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

TYPE_NAMES = {str: "string", bool: "true | false", int: "int", float: "number"}
TYPE_NAMES |= {NoneType: "null", tuple[str, ...]: "list of strings"}
TYPE_NAMES |= {dict[str, Any]: "names with values", datetime.date: "date"}


def types_of(declared: dataclasses.Field) -> tuple[Any, ...]:
    """The types that a key's value may have; strings of which only some are allowed are a Literal."""
    return get_args(declared.type) if get_origin(declared.type) in (Union, UnionType) else (declared.type,)


def choices_of(declared: dataclasses.Field) -> list[str]:
    """The strings that a key takes; empty where it takes any, or none."""
    literals = [option for option in types_of(declared) if get_origin(option) is Literal]
    return [choice for literal in literals for choice in get_args(literal)]


def type_name(declared: dataclasses.Field) -> str:
    """'int or null', 'number', 'llama | gptj or null': what a value may be, in words."""
    choices = " | ".join(choices_of(declared))
    return " or ".join(TYPE_NAMES.get(option, choices) for option in types_of(declared))
