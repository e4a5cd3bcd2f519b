"""Batches in a random order that follows from a seed, with a bounded number of them in memory."""

from collections.abc import Iterable, Iterator

import numpy as np

from compress.tasks.task import Batch

POOL_BYTES = 2**28  # inputs held back to be shuffled; all of them where they are this small


def shuffled(
    batches: Iterable[Batch], seed: tuple[int, int], pool_bytes: int = POOL_BYTES
) -> Iterator[tuple[int, Batch]]:
    """Batches with their numbers in a random order, drawn from a pool of bounded size."""
    generator = np.random.default_rng(seed)
    pool: list[tuple[int, Batch]] = []
    held = 0
    for numbered in enumerate(batches):
        pool.append(numbered)
        held += _bytes(numbered[1])
        while held > pool_bytes:
            number, batch = pool.pop(int(generator.integers(len(pool))))
            held -= _bytes(batch)
            yield number, batch
    while pool:
        yield pool.pop(int(generator.integers(len(pool))))


def _bytes(batch: Batch) -> int:
    return sum(value.numel() * value.element_size() for value in batch.inputs.values())
