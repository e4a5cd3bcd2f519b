"""Compile a trained PyTorch model to a budget on a named device, and measure that it was met.

    result = compress.compile("path/to/model", data="train.csv", target="cpu", speedup=2.0, out="out")
    result.verdict.status, result.verdict.measured.speedup, result.model

Nothing heavy is imported before a function is used: `import compress` does not load torch.
"""

import importlib
from typing import TYPE_CHECKING

from compress.errors import CompressError

if TYPE_CHECKING:
    from compress.api.results import FamilyResult, Result
    from compress.api.verbs import (
        bench,
        clean,
        compile,
        export_files,
        inspect,
        load,
        plan,
        targets,
        write_report,
    )
    from compress.recipe import Recipe
    from compress.report.progress import Progress
    from compress.tasks.task import Batch, Task

__version__ = "0.1.0"

__all__ = [
    "Batch",
    "CompressError",
    "FamilyResult",
    "Progress",
    "Recipe",
    "Result",
    "Task",
    "bench",
    "clean",
    "compile",
    "export",
    "export_files",
    "inspect",
    "load",
    "plan",
    "targets",
    "write_report",
]

HOMES = {
    "Batch": "compress.tasks.task",
    "Task": "compress.tasks.task",
    "Progress": "compress.report.progress",
    "Recipe": "compress.recipe",
    "FamilyResult": "compress.api.results",
    "Result": "compress.api.results",
    "bench": "compress.api.verbs",
    "clean": "compress.api.verbs",
    "compile": "compress.api.verbs",
    "export_files": "compress.api.verbs",
    "inspect": "compress.api.verbs",
    "load": "compress.api.verbs",
    "plan": "compress.api.verbs",
    "targets": "compress.api.verbs",
    "write_report": "compress.api.verbs",
}


def __getattr__(name: str) -> object:
    """A public name, imported when it is first used."""
    if name == "export":  # a package that can be called
        return importlib.import_module("compress.export")
    if name not in HOMES:
        raise AttributeError(f"module 'compress' has no attribute {name!r}")
    value = getattr(importlib.import_module(HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, loaded or not."""
    return sorted({*globals(), *__all__})
