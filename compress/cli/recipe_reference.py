"""The reference of recipes: every key with its type, default and meaning, read from the models."""

from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MinLen
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from compress.ir import Document
from compress.recipe import Recipe, toml

NAMES: dict[object, str] = {bool: "true or false", int: "integer", float: "number", str: "text"}
BOUNDS = {Ge: ("ge", "at least"), Gt: ("gt", "above"), Le: ("le", "at most"), Lt: ("lt", "below")}


class Key(Document):
    """One key of a recipe; `table` is empty for keys at the top. `default` is as in TOML, or words."""

    table: str
    key: str
    type: str
    default: str
    meaning: str


def list_keys() -> tuple[Key, ...]:
    """Every key of a recipe, in the order of the file: those at the top, then table by table."""
    tables = {
        name: field.annotation for name, field in Recipe.model_fields.items() if _is_table(field.annotation)
    }
    top = [_key("", name, field) for name, field in Recipe.model_fields.items() if name not in tables]
    nested = [
        _key(table, name, field)
        for table, kind in tables.items()
        if isinstance(kind, type) and issubclass(kind, Document)
        for name, field in kind.model_fields.items()
    ]
    return (*top, *nested)


def text() -> str:
    """The reference for a terminal: one line for every key, by table."""
    found = list_keys()
    lines = []
    for table in dict.fromkeys(one.table for one in found):
        lines += ["", f"[{table}]"] if table else []
        lines += [
            f"{one.key}: {one.type}; {one.default}. {one.meaning}" for one in found if one.table == table
        ]
    return "\n".join(lines)


def _is_table(annotation: object) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, Document)


def _key(table: str, name: str, field: FieldInfo) -> Key:
    return Key(
        table=table,
        key=name,
        type=_type(field.annotation) + _bounds(field.metadata),
        default=_default(field),
        meaning=field.description or "",
    )


def _type(annotation: object) -> str:
    """A type in words: "integer", "one of a, b", "list of ..."."""
    origin, parts = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(str, parts))}"
    if origin is Annotated:
        bounds = [mark for part in parts[1:] for mark in getattr(part, "metadata", [part])]
        return _type(parts[0]) + _bounds(bounds)
    if origin is tuple:
        return f"list of {_type(parts[0])}"
    if origin in (Union, UnionType):
        return " or ".join(_type(part) for part in parts if part is not NoneType)
    return NAMES[annotation]


def _bounds(metadata: list[Any]) -> str:
    """The range of a number in words, empty without one."""
    found = [
        f"{words} {getattr(mark, name):g}"
        for mark in metadata
        for kind, (name, words) in BOUNDS.items()
        if isinstance(mark, kind)
    ]
    found += ["not empty" for mark in metadata if isinstance(mark, MinLen)]
    return f" ({', '.join(found)})" if found else ""


def _default(field: FieldInfo) -> str:
    """The default as it stands in a TOML file, "not set" without a value, "required" without a default."""
    value = field.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    if value is None:
        return "not set"
    return f"default {toml(value)}"
