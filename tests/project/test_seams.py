"""Each kind of extension has one place: nobody else branches on what belongs there."""

import ast
from pathlib import Path

from compress.sites.kinds import KINDS

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
