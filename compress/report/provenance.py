"""What ran: the command line, and the git revision or the version of the program."""

import shlex
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from compress import __version__

SECONDS = 10.0  # that git may take


def command_line(words: Sequence[str] | None = None) -> str | None:
    """The command line of this process, None where another program called the library.

    >>> command_line(["/usr/bin/compress", "my model", "--speedup", "2x"])
    "compress 'my model' --speedup 2x"
    """
    program, *rest = sys.argv if words is None else words
    path = Path(program)
    if path.name == "__main__.py" and path.parent.name == "compress":
        return shlex.join(["python", "-m", "compress", *rest])
    return shlex.join(["compress", *rest]) if path.stem == "compress" else None


def revision(checkout: Path = Path(__file__).parents[2]) -> str:
    """The git revision of the checkout that this module lies in, else the version of the program.

    Uncommitted changes add `-dirty`.
    """
    git = shutil.which("git")
    if git is None or not (checkout / ".git").exists():
        return f"version {__version__}"
    words = [git, "-C", str(checkout), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        found = subprocess.run(words, capture_output=True, text=True, timeout=SECONDS, check=True)
    except (OSError, subprocess.SubprocessError):
        return f"version {__version__}"
    return f"git {found.stdout.strip()}"
