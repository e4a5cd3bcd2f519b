"""Deployable files from finished models, the runners that execute them, and the proof they agree."""

if __name__ != "compress.export":
    raise ImportError(f"import this folder as 'compress.export', not as {__name__!r}")
