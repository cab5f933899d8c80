"""Seeded draws: the same in every process and on every machine."""

from __future__ import annotations

import json
from collections.abc import Iterable
from hashlib import blake2b

import numpy as np


def digest_int(data: bytes) -> int:
    """First 63 bits of blake2b of some bytes. Python's own hash() is salted in every process."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "big") >> 1


def seeded_int(*parts: int | str) -> int:
    """63-bit number drawn from the parts: the same on every machine and in every process."""
    return digest_int(json.dumps(parts).encode())


def seeded_order(items: Iterable[str], *parts: int | str) -> list[str]:
    """The items in an order that depends on the parts, not on the order in which they come."""
    return sorted(items, key=lambda item: (seeded_int(*parts, item), item))


class EndlessOrder:
    """Endless order over `size` items: every epoch is a new permutation, drawn from the seed.

    Position p belongs to epoch p // size. The permutation of the epoch that was asked for last is
    kept.

    Args:
        size: number of items, at least 1.
        seed: of the run; with the epoch it seeds the permutation.
    """

    def __init__(self, size: int, seed: int):
        self._size, self._seed = size, seed
        self._epoch = -1
        self._permutation: list[int] = []

    def __getitem__(self, position: int) -> int:
        """Index of the item at a position, from 0."""
        epoch, place = divmod(position, self._size)
        if epoch != self._epoch:
            generator = np.random.default_rng([self._seed, epoch])
            self._epoch, self._permutation = epoch, generator.permutation(self._size).tolist()
        return self._permutation[place]
