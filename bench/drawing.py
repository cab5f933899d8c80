"""Drawing a picture of the drawn world: a run draws thousands of them.

make bench                # one picture of each sub-category, by pytest-benchmark
"""

from __future__ import annotations

import numpy as np
import pytest

from tercet.train.demo.drawing import draw
from tercet.train.demo.species import SPECIES


@pytest.mark.benchmark(group="a picture of each sub-category of the drawn world")
def test_drawing(benchmark):
    def draw_all() -> None:
        for seed, species in enumerate(SPECIES):
            draw(species, np.random.default_rng(seed))

    benchmark.pedantic(draw_all, rounds=8, warmup_rounds=2)
