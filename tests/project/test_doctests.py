"""The examples in docstrings are true; imported by package name, since the folders are mapped."""

import doctest
import importlib
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent.parent
FOLDERS = {"compress": "compress", "export": "compress.export", "profiles": "compress.profiles"}


def with_examples():
    for folder, package in FOLDERS.items():
        for path in sorted((ROOT / folder).rglob("*.py")):
            if ">>>" in path.read_text(encoding="utf-8"):
                parts = path.relative_to(ROOT / folder).with_suffix("").parts
                yield ".".join([package, *(part for part in parts if part != "__init__")])


@pytest.mark.parametrize("name", list(with_examples()))
def test_the_examples_of_a_module_are_true(name):
    given = {"torch": torch} if name.startswith("compress.core.") else {}
    found = doctest.testmod(importlib.import_module(name), extraglobs=given)
    assert found.attempted > 0
    assert found.failed == 0


def test_pure_modules_have_examples():
    assert {"compress.recipe", "compress.cli.console", "compress.cli.command"} <= set(with_examples())
