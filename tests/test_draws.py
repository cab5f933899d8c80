"""Seeded draws: known numbers, and permutations that are drawn once an epoch."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from tercet.core.draws import EndlessOrder, digest_int

pytestmark = pytest.mark.core


def test_digest_int_is_63_bits_of_blake2b():
    digest = hashlib.blake2b(b"a bird", digest_size=8).hexdigest()
    assert digest_int(b"a bird") == int(digest, 16) // 2 < 2**63


@pytest.mark.parametrize("size", [1, 2, 7])
def test_endless_order_is_a_new_permutation_every_epoch(size):
    order = EndlessOrder(size, seed=3)
    found = [order[position] for position in range(3 * size)]
    want = [np.random.default_rng([3, epoch]).permutation(size).tolist() for epoch in range(3)]
    assert found == sum(want, [])
    assert [order[position] for position in range(size)] == want[0]  # back to an earlier epoch
    assert order[1000 * size] == np.random.default_rng([3, 1000]).permutation(size)[0]


def test_endless_order_draws_once_an_epoch(monkeypatch):
    drawn = []
    real = np.random.default_rng
    monkeypatch.setattr(np.random, "default_rng", lambda seed: drawn.append(seed) or real(seed))
    order = EndlessOrder(5, seed=0)
    for position in range(12):
        order[position]
    assert drawn == [[0, 0], [0, 1], [0, 2]]
