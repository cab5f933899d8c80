"""The order in which triplets are trained on: endless, seeded, and it can be resumed."""

from __future__ import annotations

from collections.abc import Sequence

from tercet.core.data.triplets import draw_triplet
from tercet.core.draws import EndlessOrder
from tercet.core.types import Anchor, Triplet


class TripletStream:
    """Endless triplets: every epoch is a new permutation of the anchors, drawn from the seed.

    Triplets that are put back are returned again before any new one.

    Args:
        anchors: at least one.
        positive: "redraw" or "fixed" (see `draw_triplet`).
        seed: of the order and of the drawn photos.

    Raises:
        ValueError: there are no anchors.
    """

    def __init__(self, anchors: Sequence[Anchor], *, positive: str, seed: int):
        if not anchors:
            raise ValueError("there are no anchors to train on")
        self._anchors = anchors
        self._positive = positive
        self._seed = seed
        self._order = EndlessOrder(len(anchors), seed)
        self.epoch = 0
        self.cursor = 0
        self._returned: list[Triplet] = []

    def __next__(self) -> Triplet:
        if self._returned:
            return self._returned.pop(0)
        if self.cursor == len(self._anchors):
            self.epoch, self.cursor = self.epoch + 1, 0
        anchor = self._anchors[self._order[self.epoch * len(self._anchors) + self.cursor]]
        self.cursor += 1
        return draw_triplet(anchor, self.epoch, self._seed, self._positive)

    def put_back(self, triplets: Sequence[Triplet]) -> None:
        """Take back triplets whose sampling was cut short."""
        self._returned = [*triplets, *self._returned]

    def state(self) -> dict:
        """Position of the stream, for a checkpoint."""
        return {"epoch": self.epoch, "cursor": self.cursor, "returned": list(self._returned)}

    def restore(self, state: dict) -> None:
        """Go on from where `state` was taken."""
        self.epoch, self.cursor = state["epoch"], state["cursor"]
        self._returned = list(state["returned"])
