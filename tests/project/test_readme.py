"""What README.md tells a reader to type, works; what it states, holds."""

import re
import shlex
from pathlib import Path

import pytest

from compress import recipe
from compress.cli import command as cli_session
from compress.cli import main
from compress.report import schema
from compress.request import make

ROOT = Path(__file__).parent.parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
FENCED = re.findall(r"^```(\w*)\n(.*?)^```$", TEXT, re.MULTILINE | re.DOTALL)
SHELL = [line for kind, body in FENCED if kind == "sh" for line in body.splitlines()]


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


def test_the_first_two_commands_install_and_run_and_test():
    assert SHELL[0] == (
        'python3 -m venv .venv && .venv/bin/pip install -c constraints.txt -e ".[dev]" '
        "&& .venv/bin/compress --target cpu --speedup 2x"
    )
    assert SHELL[1] == ".venv/bin/python tools/check.py"
    assert (ROOT / "tools" / "check.py").is_file()
    assert (ROOT / "constraints.txt").is_file()


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


def test_the_recipe_holds_every_table_and_only_defaults(tmp_path):
    (text,) = [body for kind, body in FENCED if kind == "toml"]
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


def test_every_flag_and_verb_that_is_mentioned_exists():
    known = {flag for command in main.app.commands.values() for p in command.params for flag in p.opts}
    tools = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "tools").glob("*.py"))
    known |= set(re.findall(r'"(--[a-z][a-z-]*)"', tools))
    assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", TEXT)) - known <= {"--nproc-per-node"}
    verbs = set(re.findall(r"^\| `compress ([a-z]+)", TEXT, re.MULTILINE))
    assert verbs | {"run"} == set(main.app.commands)


def test_the_exit_codes_are_those_of_the_program():
    listed = dict(re.findall(r"^\| (\d+) \| (\w+)", TEXT, re.MULTILINE))
    assert {int(code) for code in listed} == {
        *schema.EXIT_CODES.values(),
        cli_session.BAD_REQUEST,
        cli_session.CRASHED,
        cli_session.INTERRUPTED,
    }
    assert (listed["1"], listed["130"]) == ("missed", "interrupted")


def test_links_inside_the_repository_resolve():
    links = re.findall(r"\]\(([^)]+)\)", TEXT)
    assert links
    for link in links:
        assert link.startswith("https://arxiv.org/abs/") or (ROOT / link.split("#")[0]).exists()


def test_the_python_example_names_what_exists():
    (example,) = [body for kind, body in FENCED if kind == "python" and "compress.tasks.loading" in body]
    names = re.search(r"from compress\.tasks\.loading import (.+)", example)[1].split(", ")
    source = (ROOT / "compress" / "tasks" / "loading.py").read_text(encoding="utf-8")
    assert all(re.search(rf"\b{name}\b", source) for name in names)
    assert compile(example, "README.md", "exec")
