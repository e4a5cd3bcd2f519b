"""The guides beside the code: links resolve, commands parse, tables are those of the code."""

import re
import shlex
from pathlib import Path

import pytest

from compress import profiles, recipe
from compress.cli import main
from compress.export.delivery import deliver
from compress.formats import MOVES
from compress.measure import verify_on_device

ROOT = Path(__file__).parent.parent.parent
GUIDES = {
    path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
    for folder in ("compress", "export", "profiles", "tools")
    for path in sorted((ROOT / folder).rglob("*.md"))
    if path.name != "LICENSE.md"
} | {"CHANGELOG.md": (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")}
DEVICE_SCRIPT = (ROOT / "compress" / "measure" / "verify_on_device.py").read_text(encoding="utf-8")


def fenced(text, kind):
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


def rows(guide, heading):
    """The rows of the table whose header begins with this cell, as lists of cells without back quotes."""
    text = GUIDES[guide]
    body = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", text, re.MULTILINE)[1]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in body.splitlines()]


def anchors(text):
    """The anchors of the headings, as Git hosts make them."""
    return {
        re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-")
        for title in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }


def test_the_guides_are_there():
    expected = {"compress/README.md", "export/README.md", "profiles/README.md", "tools/benchmarks/RESULTS.md"}
    assert expected <= GUIDES.keys()


@pytest.mark.parametrize("guide", [*GUIDES, "README.md"])
def test_links_resolve_with_their_anchors(guide):
    text = (ROOT / guide).read_text(encoding="utf-8")
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        path = (ROOT / guide).parent / place if place else ROOT / guide
        assert path.exists(), f"{guide}: {link} leads nowhere"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{guide}: no heading for {link}"


@pytest.mark.parametrize("guide", list(GUIDES))
def test_commands_are_understood(guide):
    for line in "".join(fenced(GUIDES[guide], "sh")).splitlines():
        words = shlex.split(line)
        if "compress" not in words:
            continue
        words = words[words.index("compress") + 1 :]
        if words[0] not in main.app.commands:
            words = ["run", *words]
        assert main.app.commands[words[0]].make_context(words[0], words[1:]).params["as_json"] is False


def test_the_recipe_holds_every_table_and_only_defaults(tmp_path):
    (text,) = fenced(GUIDES["compress/README.md"], "toml")
    path = tmp_path / "recipe.toml"
    path.write_text(text, encoding="utf-8")
    found = recipe.read(path, {})
    plain = recipe.Recipe(
        model="path/to/model", data="train.csv", target="cpu", budget=found.budget, max_drop=0.01
    )
    assert found == plain
    assert found.budget.speedup == 2.0
    tables = [name for name in recipe.Recipe.model_fields if f"[{name}]" in text]
    assert tables == ["budget", "shapes", "options", "calibration", "search", "recovery", "bench"]


def test_every_move_is_explained():
    text = GUIDES["compress/README.md"].split("## Moves")[1].split("\n## ")[0]
    names = {
        name for words in re.findall(r"^\*\*([^*]+)\*\*", text, re.MULTILINE) for name in words.split(", ")
    }
    assert names == set(MOVES)


def test_export_formats_are_those_of_the_program():
    assert [cells[0] for cells in rows("export/README.md", "format")] == list(deliver.FORMATS)


def test_the_device_script_is_described_as_it_is():
    codes = [int(cells[0]) for cells in rows("export/README.md", "exit code of `verify.py`")]
    assert codes == [0, verify_on_device.BAD_REQUEST, verify_on_device.DISAGREES]
    options = [cells[0] for cells in rows("export/README.md", "option of `verify.py`")]
    assert options == re.findall(r'add_argument\(\s*"(--[a-z-]+)"', DEVICE_SCRIPT)
    tolerances = {name: float(value) for name, value in rows("export/README.md", "precision")}
    assert tolerances == verify_on_device.TOLERANCES


def test_every_device_stands_in_the_guide():
    listed = [cells[0] for cells in rows("profiles/README.md", "name")]
    assert listed == [name for name in profiles.names() if name != "cpu"]


def test_every_benchmark_has_a_row():
    source = (ROOT / "tools" / "benchmark.py").read_text(encoding="utf-8")
    known = re.findall(r'^    "(\w+)": \w+\.\w+,$', source, re.MULTILINE)
    listed = [
        name for cells in rows("tools/benchmarks/RESULTS.md", "name") for name in cells[0].split("`, `")
    ]
    assert sorted(listed) == sorted(known)
