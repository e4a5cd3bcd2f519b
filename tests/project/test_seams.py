"""Each kind of extension has one place: nobody else branches on what belongs there."""

import ast
import re
from pathlib import Path

from compress import formats
from compress.sites.kinds import KINDS
from compress.task_specs import TASKS

ROOT = Path(__file__).parent.parent.parent


def shipped():
    """Every module that ships: its path from the root, and its syntax tree."""
    for folder in ("compress", "export", "profiles"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT).as_posix(), ast.parse(path.read_text(encoding="utf-8"))


def words(node):
    """All string constants below a node."""
    return {part.value for part in ast.walk(node) if isinstance(part, ast.Constant)}


def branches(tree, names):
    """Lines that compare with one of `names`, match it, or look something up by it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Compare):
            found = any(words(side) & names for side in (node.left, *node.comparators))
        elif isinstance(node, ast.MatchValue):
            found = bool(words(node) & names)
        elif isinstance(node, ast.Dict):
            found = len({key.value for key in node.keys if isinstance(key, ast.Constant)} & names) > 1
        else:
            continue
        if found:
            yield node.lineno


def test_nobody_branches_on_the_kind_of_a_site_outside_of_kinds():
    names = set(KINDS)
    assert {"heads", "ffn", "residual"} <= names
    found = [
        f"{path}:{line}"
        for path, tree in shipped()
        if not path.startswith("compress/sites/kinds/")
        for line in branches(tree, names)
    ]
    assert found == []
    assert list(branches(ast.parse('x = 1\nif site.kind in ("heads", "y"):\n    pass'), names)) == [2]
    assert list(branches(ast.parse('COLORS = {"heads": 1, "ffn": 2}'), names)) == [1]


def named(tree, pattern):
    """Lines with an identifier that the pattern matches: a name, an attribute, an argument, a definition."""
    for node in ast.walk(tree):
        held = (getattr(node, "id", None), getattr(node, "attr", None), getattr(node, "arg", None))
        if isinstance(node, ast.FunctionDef | ast.ClassDef | ast.alias):
            held = (node.name,)
        if any(isinstance(name, str) and re.fullmatch(pattern, name) for name in held):
            yield node.lineno


def test_only_backends_know_where_a_model_runs():
    pattern = "on_gpu|by_file|in_torch"
    found = [
        f"{path}:{line}"
        for path, tree in shipped()
        if not path.startswith("export/backends/")
        for line in named(tree, pattern)
    ]
    assert found == []
    assert sorted(named(ast.parse("x = 1\nif place.on_gpu:\n    f(in_torch=True)"), pattern)) == [2, 3]


def test_intervals_and_quantiles_of_samples_are_computed_in_measure_alone():
    pattern = r"(?i).*(quantile|bootstrap|resamples).*|percentile"
    found = {}
    for path, tree in shipped():
        lines = list(named(tree, pattern))
        if lines and not path.startswith("compress/measure/"):
            found[path] = lines
    charts = found.pop("compress/report/charts.py")  # draws quantiles that it asks measure for
    source = (ROOT / "compress/report/charts.py").read_text(encoding="utf-8")
    assert "from compress.measure.intervals import quantile" in source
    assert len(charts) == 3  # the import and two uses
    assert found == {}
    assert sorted(named(ast.parse("x = np.quantile(y, 0.5)\nRESAMPLES = 3"), pattern)) == [1, 2]


def test_nobody_branches_on_a_number_format_or_pattern_outside_of_moves():
    names = {found.name for found in formats.number_formats()} | {"2:4", "int8", "block:", "rank:", "lowrank"}
    allowed = (
        "compress/methods/",
        "compress/formats.py",
        "compress/core/",
        "compress/measure/verify_on_device.py",
    )
    found = [
        f"{path}:{line}"
        for path, tree in shipped()
        if not path.startswith(allowed)
        for line in branches(tree, names)
    ]
    assert found == []
    assert list(branches(ast.parse('x = option.precision == "int4"'), names)) == [1]
    assert list(branches(ast.parse('x = option.pattern != "2:4"'), names)) == [1]


def test_nobody_branches_on_the_name_of_a_task_outside_of_the_tasks():
    names = set(TASKS)
    assert {"text-classification", "text-generation"} <= names
    found = [
        f"{path}:{line}"
        for path, tree in shipped()
        if path != "compress/task_specs.py" and not path.startswith("compress/tasks/")
        for line in branches(tree, names)
    ]
    assert found == []
    assert list(branches(ast.parse('if task.name == "text-generation":\n    pass'), names)) == [1]
