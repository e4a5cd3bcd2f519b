"""The tables that the guides take from the code: up to date, and written only between their marks."""

import importlib.util
from pathlib import Path

import pytest

from compress import profiles
from compress.recipe import Recipe

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def tool():
    spec = importlib.util.spec_from_file_location("write_tables", ROOT / "tools" / "write_tables.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_every_block_is_up_to_date(tool):
    assert set(tool.TABLES) == {"devices", "roofline", "recipe"}
    for name, (path, make) in tool.TABLES.items():
        guide = path.read_text(encoding="utf-8")
        assert tool.replaced(guide, name, make()) == guide, f"{name}: run python tools/write_tables.py"


def test_devices_are_those_that_have_a_profile(tool):
    lines = tool.devices().splitlines()
    assert len(lines) == 2 + len(profiles.names()) - 1
    assert sum(line.startswith("| `a100` | NVIDIA A100") for line in lines) == 1
    assert all(line.count("|") == lines[0].count("|") for line in lines)


def test_every_key_of_a_recipe_has_a_row(tool):
    lines = tool.recipe().splitlines()
    assert all(line.count(" | ") == lines[0].count(" | ") for line in lines)
    for name, field in Recipe.model_fields.items():
        for key in getattr(field.annotation, "model_fields", {}):
            assert any(line.startswith(f"| `[{name}]` | `{key}` |") for line in lines)


def test_only_what_stands_between_the_marks_changes(tool):
    guide = f"before\n<!-- table x: written by tools/write_tables.py -->\nold\n{tool.END}\nafter\n"
    again = tool.replaced(guide, "x", "| new |")
    assert again == guide.replace("old", "| new |")
    with pytest.raises(ValueError, match="table y"):
        tool.replaced(guide, "y", "| new |")


def test_check_names_what_is_out_of_date_and_writes_nothing(tool, monkeypatch, capsys, tmp_path):
    guide = tmp_path / "guide.md"
    text = f"<!-- table x: written by tools/write_tables.py -->\n{tool.END}\n"
    guide.write_text(text)
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "TABLES", {"x": (guide, lambda: "| a |")})
    monkeypatch.setattr(tool.sys, "argv", ["write_tables.py", "--check"])
    assert tool.main() == 1
    assert "table x in guide.md is out of date" in capsys.readouterr().out
    assert guide.read_text() == text
    monkeypatch.setattr(tool.sys, "argv", ["write_tables.py"])
    assert tool.main() == 0
    assert "| a |" in guide.read_text()
    monkeypatch.setattr(tool.sys, "argv", ["write_tables.py", "--check"])
    assert tool.main() == 0
