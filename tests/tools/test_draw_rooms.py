"""The drawing of the rooms: what it is drawn from, that it is up to date, and that no arrow points upward."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
MOST_ROOMS, MOST_TOP_MODULES = 30, 12


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("draw_rooms", ROOT / "tools" / "draw_rooms.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def graph(tool):
    return tool.import_graph(tool.modules())


def test_picture_and_table_are_up_to_date(tool, graph):
    advice = "run python tools/draw_rooms.py"
    assert tool.PICTURE.read_text(encoding="utf-8") == tool.draw(graph), advice
    guide = tool.GUIDE.read_text(encoding="utf-8")
    assert tool.with_table(guide, tool.table(graph, tool.modules())) == guide, advice
    assert f"](../{tool.PICTURE.relative_to(ROOT)})" in guide


def test_no_rooms_import_each_other_and_every_arrow_points_down(tool, graph):
    height = tool.levels(graph)
    places = tool.placed(graph)
    arrows = [(name, other) for name in graph for other in graph[name]]
    assert arrows
    assert [(name, other) for name, other in arrows if height[name] <= height[other]] == []
    assert [(name, other) for name, other in arrows if places[name][1] >= places[other][1]] == []


def test_rooms_are_few(tool, graph):
    files = tool.modules()
    folders = {name for name in graph if files[name].name == "__init__.py"}
    assert 20 <= len(folders) + 1 <= MOST_ROOMS  # modules at the top of `compress` lie in one folder
    assert len(graph) - len(folders) <= MOST_TOP_MODULES


def test_boxes_of_a_row_do_not_overlap_and_lie_inside_the_picture(tool, graph):
    rows = {}
    for name, (x, y) in tool.placed(graph).items():
        half = tool.box_width(name) / 2
        rows.setdefault(y, []).append((x - half, x + half))
    for row in rows.values():
        ends = [edge for box in sorted(row) for edge in box]
        assert ends == sorted(ends)
        assert ends[0] >= 0
        assert ends[-1] <= tool.WIDTH


def test_an_import_anywhere_in_a_file_is_an_arrow(tool, tmp_path):
    sources = {
        "compress/__init__.py": "from compress.low import thing",
        "compress/low.py": "",
        "compress/high/__init__.py": "",
        "compress/high/work.py": "def f():\n    import compress.low\n    from compress.export import writer",
        "export/__init__.py": "",
        "export/writer.py": "from compress import low",
        "profiles/__init__.py": "",
    }
    for name, text in sources.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    graph = tool.import_graph(tool.modules(tmp_path))
    assert graph == {"low": set(), "high": {"low", "export"}, "export": {"low"}, "profiles": set()}
    assert tool.levels(graph) == {"low": 0, "profiles": 0, "export": 1, "high": 2}
    assert tool.direct(graph)["high"] == {"export"}


def test_rooms_that_import_each_other_are_named(tool):
    with pytest.raises(ValueError, match="a, b"):
        tool.levels({"a": {"b"}, "b": {"a"}, "c": set()})


def test_check_says_what_is_out_of_date_and_writes_nothing(tool, monkeypatch, capsys, tmp_path):
    guide = tmp_path / "README.md"
    guide.write_text(f"# Guide\n\n{tool.BEGIN}\nold\n{tool.END}\n\nafter\n")
    monkeypatch.setattr(tool, "ROOT", tmp_path)
    monkeypatch.setattr(tool, "GUIDE", guide)
    monkeypatch.setattr(tool, "PICTURE", tmp_path / "rooms.svg")
    monkeypatch.setattr(tool.sys, "argv", ["draw_rooms.py", "--check"])
    assert tool.main() == 1
    assert "README.md is out of date" in capsys.readouterr().out
    assert not (tmp_path / "rooms.svg").exists()
    monkeypatch.setattr(tool.sys, "argv", ["draw_rooms.py"])
    assert tool.main() == 0
    assert guide.read_text().endswith(f"{tool.END}\n\nafter\n")
    monkeypatch.setattr(tool.sys, "argv", ["draw_rooms.py", "--check"])
    assert tool.main() == 0
    assert re.search(r"<svg [^>]+>", (tmp_path / "rooms.svg").read_text())


def test_a_guide_without_marks_is_refused(tool):
    with pytest.raises(ValueError, match="marks"):
        tool.with_table("# Guide\n", "| room |")
