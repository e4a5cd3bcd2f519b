"""Deployable files from finished models, the runners that execute them, and the proof they agree.

`compress.export` is this package and, in the public API, also a function: `compress.export("out", to="edge")`
writes the result of a run as files for a runtime or a device.
"""

import sys
from pathlib import Path
from types import ModuleType

import compress

if __name__ != "compress.export":
    raise ImportError(f"import this folder as 'compress.export', not as {__name__!r}")


class _Package(ModuleType):
    """A package that can be called."""

    def __call__(
        self, directory: str | Path, to: str, *, out: str | Path | None = None, archive: bool = False
    ) -> list[Path]:
        """Write the result of a run as files for a runtime or a device; see `compress.export_files`."""
        return compress.export_files(directory, to, out=out, archive=archive)


sys.modules[__name__].__class__ = _Package
