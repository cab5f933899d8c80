"""The token budget of a forward pass, halved where memory runs out."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from tercet.core.config import SftConfig, TapoConfig
from tercet.train.learner.ranks import Ranks, restarts

FILE = "micro_batch_tokens"
"""In run.out: the budget that memory had room for, where it ran out."""
Result = TypeVar("Result")


class TokenBudget:
    """Most packed tokens of one branch of one forward pass.

    Where the memory of a process that runs alone does not hold a micro-batch, the work begins again
    with half the budget. Of several ranks the one that has no room ends, naming the budget, and the
    restarted run goes on with half of it.

    Args:
        config: parallel.micro_batch_tokens and run.out are used.
        ranks: the ranks.
        least: tokens of the longest sequence that may come.
        say: shows a line.
        resumed: whether the run goes on from a checkpoint, with the budget that it had found.
    """

    def __init__(
        self,
        config: TapoConfig | SftConfig,
        ranks: Ranks,
        least: int,
        say: Callable[[str], None],
        resumed: bool,
    ):
        self._file = Path(config.run.out) / FILE
        self._ranks, self._least, self._say = ranks, least, say
        self.tokens = config.parallel.micro_batch_tokens
        if not (resumed or restarts()):
            self._file.unlink(missing_ok=True)  # of another run
        elif self._file.exists():
            self.tokens = min(self.tokens, int(self._file.read_text()))

    def fit(self, work: Callable[[], Result], undo: Callable[[], None]) -> Result:
        """Do work within the budget; where memory runs out, undo it and begin again.

        Raises:
            ValueError: half the budget does not hold the longest sequence.
            RuntimeError: of several ranks this one has no room.
        """
        while True:
            try:
                return work()
            except torch.OutOfMemoryError as error:
                self._halve(error)
            undo()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def _halve(self, error: torch.OutOfMemoryError) -> None:
        half = self.tokens // 2
        said = f"out of memory with parallel.micro_batch_tokens = {self.tokens}"
        if half < self._least:
            raise ValueError(
                f"{said}; half of it does not hold one sequence of {self._least} tokens: allow "
                "shorter ones, lower model.max_pixels, or use more memory"
            ) from error
        self._file.write_text(str(half))
        if self._ranks.size > 1:
            raise RuntimeError(f"{said}: a restart goes on with {half}") from error
        self._say(f"{said}: going on with {half}")
        self.tokens = half
