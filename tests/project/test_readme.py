"""What README.md tells a reader to type, works; what it states, holds."""

import ast
import re
import shlex
from pathlib import Path

import pytest

from compress.api.request import make
from compress.cli import command as cli_command
from compress.cli import main
from compress.formats import MOVES
from compress.report import schema

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SHELL = [line for kind, body in FENCED if kind == "sh" for line in body.splitlines()]
RESULTS = (ROOT / "tools" / "benchmarks" / "RESULTS.md").read_text(encoding="utf-8")
MOST_LINES, MOST_PICTURE_BYTES = 250, 200_000


def commands():
    """Every `compress ...` in the shell blocks."""
    for line in SHELL:
        for words in line.split(" && "):
            parts = shlex.split(words)
            if parts[0].endswith("compress"):
                yield parts[1:]


def understood(words):
    """The verb and its options, as the command line reads them."""
    if words[0] not in main.app.commands:
        words = ["run", *words]
    return main.app.commands[words[0]].make_context(words[0], list(words[1:])).params


def rows(heading):
    """The rows of the table whose header begins with this cell, as lists of cells."""
    body = re.search(rf"^\| {re.escape(heading)} \|.*\n\|[-| ]+\|\n((?:\|.*\n)+)", TEXT, re.MULTILINE)[1]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in body.splitlines()]


def test_the_first_commands_install_and_run_and_test():
    assert SHELL[0] == (
        "python3 -m venv .venv && .venv/bin/pip install uv "
        "&& .venv/bin/uv pip install -p .venv --torch-backend cpu -c constraints.txt torch"
    )
    assert SHELL[1] == (
        'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[dev]" '
        "&& .venv/bin/compress --target cpu --speedup 2x"
    )
    assert SHELL[2] == ".venv/bin/python tools/check.py"
    assert (ROOT / "tools" / "check.py").is_file()
    assert re.search(r"^torch==\d", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)


def test_it_is_short_and_begins_with_what_a_stranger_needs():
    lines = TEXT.splitlines()
    assert len(lines) <= MOST_LINES
    assert TEXT.index(SHELL[2]) < TEXT.index("| model (dense accuracy) |") < TEXT.index("![")
    assert lines.index("## Your own model") <= 55


@pytest.mark.parametrize("words", list(commands()), ids=" ".join)
def test_every_command_is_understood(words):
    params = understood(words)
    if params.get("target"):
        asked = make(params.pop("recipe"), main._options_of(params))
        assert asked.target in ("cpu", "a100", "rpi5")
    assert params["as_json"] is False


def test_the_clean_run_installs_as_the_readme_says():
    script = (ROOT / ".ci" / "run").read_text(encoding="utf-8")
    assert '-c constraints.txt -e ".[dev]"' in script
    assert ".venv/bin/compress --target cpu --speedup 2x || [ $? -eq 1 ]\n" in script
    assert script.rstrip().endswith(".venv/bin/python tools/check.py --all")
    assert (ROOT / ".ci" / "run").stat().st_mode & 0o111


def test_every_flag_and_verb_that_is_mentioned_exists():
    known = {flag for command in main.app.commands.values() for p in command.params for flag in p.opts}
    tools = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tools").glob("*.py"))
    known |= {*re.findall(r'"(--[a-z][a-z-]*)"', tools), "--help"}
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT)) - known <= {"--torch-backend"}  # of uv
    verbs = set(re.findall(r"^\| `compress ([a-z]+)", TEXT, re.MULTILINE))
    assert verbs | {"run"} == set(main.app.commands)


def test_the_exit_codes_are_those_of_the_program():
    listed = {int(code): meaning for code, meaning in rows("exit code")}
    assert set(listed) == {
        *schema.EXIT_CODES.values(),
        cli_command.BAD_REQUEST,
        cli_command.CRASHED,
        cli_command.INTERRUPTED,
    }
    for status, code in schema.EXIT_CODES.items():
        assert status.split("_")[-1] in listed[code]


def test_the_moves_are_those_of_the_program():
    names = [cells[0].strip("`") for cells in rows("move")]
    assert sorted(names) == sorted(MOVES)


def test_every_figure_of_the_table_is_one_of_the_results():
    figures = [figure for cells in rows("model (dense accuracy)") for figure in cells[3].split("x [")[1:]]
    assert len(figures) == 7
    for figure in figures:
        assert f"[{figure.partition(']')[0]}]" in RESULTS
    assert len(rows("model (dense accuracy)")) == 5


def test_the_picture_of_the_report_is_small():
    (place,) = re.findall(r"^!\[[^\]]+\]\(([^)]+)\)$", TEXT, re.MULTILINE)
    assert 10_000 < (ROOT / place).stat().st_size < MOST_PICTURE_BYTES


def test_links_inside_the_repository_resolve():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    for link in links:
        assert link.startswith("https://arxiv.org/abs/") or (ROOT / link.split("#")[0]).exists()


@pytest.mark.parametrize("example", [body for kind, body in FENCED if kind == "python"])
def test_a_python_example_parses_and_imports_what_exists(example):
    tree = ast.parse(example)
    names = [
        (node.module, alias.name)
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] == "compress"
        for alias in node.names
    ]
    for module, name in names:
        assert hasattr(__import__(module, fromlist=[name]), name)
    assert any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body)
