"""One command while it runs: it owns the terminal, and turns every error into a message and an exit code.

0 the budget is met; 1 missed; 2 a bad request; 3 built, but not measured; 70 a bug of ours, with the
trace in a file; 130 interrupted; 141 standard output was closed.
"""

import errno
import json
import sys
import tempfile
import traceback
from dataclasses import dataclass
from pathlib import Path

from compress import __version__
from compress.cli.console import Streams, plain
from compress.errors import CompressError
from compress.report.progress import Progress

BAD_REQUEST = 2
CRASHED = 70
INTERRUPTED = 130
PIPE_CLOSED = 141  # what a shell reports for a program that SIGPIPE ended
DISK = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EACCES: "permission was denied",
    errno.EPERM: "the operation was not permitted",
    errno.EROFS: "the file system is read-only",
}


@dataclass
class Session:
    """The user's streams, the progress, and where finished work is kept (None: nowhere)."""

    streams: Streams
    progress: Progress
    as_json: bool
    out: Path | None = None

    def print_result(self, document: dict[str, object], text: str | None = None) -> None:
        """The result on standard output: one JSON document for programs, or text for people."""
        if self.as_json:
            words = json.dumps(document, indent=2, ensure_ascii=False)
        else:
            words = plain(document) if text is None else text
        self.streams.out.write(words + "\n")
        self.streams.out.flush()

    def report_error(self, error: BaseException) -> int:
        """Write what went wrong to standard error, unless it is closed; the exit code."""
        code, message = self._explain(error)
        try:
            if message:
                self.streams.err.write(f"compress: {message}\n")
                self.streams.err.flush()
                if self.as_json:
                    self.print_result({"error": message, "exit_code": code})
        except OSError:
            return code
        return code

    def _explain(self, error: BaseException) -> tuple[int, str]:
        if isinstance(error, KeyboardInterrupt):
            return INTERRUPTED, self._interrupted()
        if isinstance(error, CompressError):
            return BAD_REQUEST, str(error)
        if isinstance(error, BrokenPipeError):
            return PIPE_CLOSED, ""
        reason = disk_reason(error)
        if reason is not None:
            return BAD_REQUEST, reason
        return CRASHED, self._crashed(error)

    def _interrupted(self) -> str:
        if self.out is None or not (self.out / "compression").is_dir():
            return "interrupted; nothing had to be kept"
        return (
            f"interrupted; finished stages are kept in {self.out / 'compression'}, "
            "and the same command resumes from there"
        )

    def _crashed(self, error: BaseException) -> str:
        """One line, and a file that holds everything a report of the bug needs."""
        trace = "".join(traceback.format_exception(error))
        last = f"{type(error).__name__}: {error}".splitlines()[0].rstrip(": ")
        head = f"compress {__version__}: {' '.join(sys.argv[1:])}"
        try:
            path = self._log_path()
            path.write_text(
                f"{head}\n\n{trace}\nWhat libraries wrote:\n{self.streams.swallowed()}", encoding="utf-8"
            )
        except OSError:
            return f"an unexpected error, which is a bug: {last}\n{trace}"
        return f"an unexpected error, which is a bug: {last}\n  The trace is in {path}; please report it."

    def _log_path(self) -> Path:
        """`error.log` beside the artifacts, or a new temporary file."""
        if self.out is not None and (self.out / "compression").is_dir():
            return self.out / "compression" / "error.log"
        with tempfile.NamedTemporaryFile(prefix="compress-", suffix=".log", delete=False) as file:
            return Path(file.name)


def disk_reason(error: BaseException | None) -> str | None:
    """Why files could not be read or written, when that is what lies behind the error.

    >>> disk_reason(OSError(errno.ENOSPC, "No space left on device", "out/model.onnx"))
    'the disk is full (out/model.onnx); mend that or name another place with --out, and run again'
    """
    while error is not None:
        for number, words in DISK.items():
            # Native writers (safetensors) keep the number in their text only.
            if getattr(error, "errno", None) == number or f"(os error {number})" in str(error):
                name = getattr(error, "filename", None)
                where = f" ({name})" if name else ""
                return f"{words}{where}; mend that or name another place with --out, and run again"
        error = error.__cause__ or error.__context__
    return None
