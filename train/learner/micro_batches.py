"""Micro-batches: what one forward pass works on, within a token budget that memory may halve."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from tercet.core.config import SftConfig, TapoConfig
from tercet.core.costs import Shape, forward_flops
from tercet.core.packing import Encode, Item, packed_tokens, prompt_loads, prompts_of
from tercet.core.types import MicroBatch
from tercet.train.learner.ranks import Ranks, restarts

FILE = "micro_batch_tokens"
"""In run.out: the budget that memory had room for, where it ran out."""


def micro_batches(
    items: Sequence[Item],
    photos: Sequence[str],
    pack: Callable[[Sequence[Item]], MicroBatch],
    *,
    encode: Encode,
    shape: Shape,
    ranks: Ranks,
    budget: TokenBudget,
) -> Iterator[tuple[Sequence[Item], MicroBatch]]:
    """This rank's share of a mini-batch, packed only when its turn comes.

    Ranks get items of about the same number of operations in all, and the same number of
    micro-batches, since each forward pass is a collective: a rank with fewer of them works on rows
    of weight 0 in the end.

    Args:
        items: the mini-batch, the same on all ranks.
        photos: which photos are worked on at once (see Piece.prompts).
        pack: items to a MicroBatch on the CPU.
        encode: prompt ids and image keys to an EncodedPrompt.
        shape: sizes of the model.
        ranks: among which the items are dealt.
        budget: most packed tokens on each of the photos.

    Yields:
        Some items and their MicroBatch; no items with one of weight 0.

    Raises:
        ValueError: naming the item, when one that cannot be halved exceeds the budget.
        Exception: of `pack` on any rank, a photo that cannot be read for instance, on all ranks.
    """

    def cost(item: Item) -> float:
        prompts = [prompt for photo in photos for prompt in item.prompts(photo, encode)]
        return forward_flops(shape, prompt_loads(prompts)).total

    dealt = ranks.dealt(items, cost)
    mine = ranks.on_all(lambda: list(split(dealt, photos, encode, budget.tokens)))
    missing = ranks.most(len(mine)) - len(mine)
    for some in mine:
        yield some, ranks.on_all(partial(pack, some))
    for _ in range(missing):
        smallest = items[0]
        while halves := smallest.halves():
            smallest = halves[0]
        batch = ranks.on_all(partial(pack, [smallest]))
        yield [], replace(batch, loss_mask=torch.zeros_like(batch.loss_mask))


def split(
    items: Sequence[Item], photos: Sequence[str], encode: Encode, budget: int
) -> Iterator[list[Item]]:
    """Cut items into runs of at most `budget` packed tokens on each photo.

    An item that is too long by itself is halved by responses, its prompt repeated.

    Raises:
        ValueError: naming the item, when one that cannot be halved exceeds the budget.
    """
    batch: list[Item] = []
    used = dict.fromkeys(photos, 0)
    queue = list(items)[::-1]
    while queue:
        item = queue.pop()
        tokens = {photo: packed_tokens(prompts_of([item], photo, encode)) for photo in photos}
        if max(tokens.values()) > budget:
            halves = item.halves()
            if not halves:
                raise ValueError(
                    f"{item} take {max(tokens.values())} tokens; "
                    f"parallel.micro_batch_tokens is {budget}"
                )
            queue += halves[::-1]
            continue
        if batch and any(used[photo] + tokens[photo] > budget for photo in photos):
            yield batch
            batch, used = [], dict.fromkeys(photos, 0)
        batch.append(item)
        used = {photo: used[photo] + tokens[photo] for photo in photos}
    if batch:
        yield batch


class TokenBudget:
    """Most packed tokens on one photo of one forward pass.

    Where the memory of a process that runs alone does not hold a micro-batch, the work begins again
    with half the budget. Of several ranks the one that has no room ends, naming the budget, and the
    restarted run goes on with half of it.

    Args:
        config: parallel.micro_batch_tokens and run.out are used.
        ranks: the processes of the run.
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
        self._ran_out = False
        self.tokens = config.parallel.micro_batch_tokens
        if not (resumed or restarts()):
            self._file.unlink(missing_ok=True)  # of another run
        elif self._file.exists():
            self.tokens = min(self.tokens, int(self._file.read_text()))

    def attempts(self, undo: Callable[[], None]) -> Iterator[TokenBudget]:
        """Attempts at one piece of work, each after the first with half the budget.

            for attempt in budget.attempts(policy.zero_grad):
                with attempt:
                    ...  # from its beginning

        Args:
            undo: called between two attempts.

        Raises (on leaving an attempt):
            ValueError: half the budget does not hold the longest sequence.
            RuntimeError: of several ranks this one has no room.
        """
        while True:
            self._ran_out = False
            yield self
            if not self._ran_out:
                return
            undo()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    def __enter__(self) -> TokenBudget:
        return self

    def __exit__(self, _kind, error: BaseException | None, _traceback) -> bool:
        self._ran_out = isinstance(error, torch.OutOfMemoryError)
        if self._ran_out:
            self._halve(error)
        return self._ran_out

    def _halve(self, error: BaseException) -> None:
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
