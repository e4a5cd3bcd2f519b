"""Which of several processes this is, as torchrun and `accelerate launch` say it; no torch is loaded."""

import os
from dataclasses import dataclass

ENVIRONMENT_NAMES = ("RANK", "WORLD_SIZE", "MASTER_PORT")


@dataclass(frozen=True)
class ProcessInfo:
    """The number of this process, counted from 0, and how many there are."""

    rank: int = 0
    size: int = 1


def process_info() -> ProcessInfo:
    """What the environment says; alone where it does not name a place to meet as well."""
    words = [os.environ.get(name, "") for name in ENVIRONMENT_NAMES]
    if not os.environ.get("MASTER_ADDR") or not all(word.isdecimal() for word in words):
        return ProcessInfo()
    return ProcessInfo(int(words[0]), int(words[1]))


def silence_output() -> None:
    """Send both output streams nowhere: of several processes only the first speaks."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    for number in (1, 2):
        os.dup2(nowhere, number)
    os.close(nowhere)
