"""The reference of recipes: complete, and true of what a recipe accepts."""

import tomllib

import pytest

from compress.cli import recipe_reference
from compress.ir import Document
from compress.recipe import Recipe


def rows():
    return {(one.table, one.key): one for one in recipe_reference.list_keys()}


def test_every_key_of_a_recipe_is_listed_with_its_meaning():
    expected = set()
    for name, field in Recipe.model_fields.items():
        kind = field.annotation
        if isinstance(kind, type) and issubclass(kind, Document):
            expected |= {(name, key) for key in kind.model_fields}
        else:
            expected.add(("", name))
    assert rows().keys() == expected
    assert all(one.meaning.endswith(".") and one.type for one in rows().values())


def test_defaults_are_those_of_a_recipe_that_names_none():
    found = Recipe.model_validate({"target": "cpu", "budget": {"speedup": 2.0}}).model_dump(mode="json")
    for (table, key), one in rows().items():
        if table == "budget":
            continue
        value = found[table][key] if table else found[key]
        if one.default.startswith("default "):
            assert tomllib.loads(f"x = {one.default.removeprefix('default ')}")["x"] == value
        else:
            assert one.default == ("required" if key == "target" else "not set")


@pytest.mark.parametrize(
    ("table", "key", "type"),
    [
        ("", "speedups", "list of number (above 1)"),
        ("shapes", "phase", "one of prefill, decode"),
        ("options", "widths", "list of number (above 0, below 1)"),
        ("options", "kinds", "list of text"),
        ("recovery", "warmup", "number (at least 0, at most 1)"),
        ("recovery", "shard", "true or false"),
    ],
)
def test_types_are_words_with_their_bounds(table, key, type):
    assert rows()[table, key].type == type


def test_the_text_has_one_line_for_each_key_below_its_table():
    lines = recipe_reference.text().splitlines()
    assert lines[0].startswith("model: text; not set. ")
    assert "tokens: integer (at least 1); default 32. " in "\n".join(lines[lines.index("[shapes]") :])
    assert len([line for line in lines if line and not line.startswith("[")]) == len(rows())
