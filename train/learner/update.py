"""Scoring and the optimiser step of a mini-batch, in micro-batches, over all ranks.

Mini-batches are the same on all ranks; each rank works on the pieces that it was dealt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from tercet.core.advantages import row_weights
from tercet.core.config import TapoConfig
from tercet.core.costs import forward_flops
from tercet.core.data.vision import PromptEncoder
from tercet.core.packing import (
    Piece,
    branch_prompts,
    labels_of,
    micro_batch,
    pack_branch,
    prompt_loads,
    split_by_budget,
)
from tercet.core.types import Response
from tercet.train.learner.budget import TokenBudget
from tercet.train.learner.loop import add_up
from tercet.train.learner.policy import Policy
from tercet.train.learner.ranks import Ranks

Advance = Callable[[float], None]


class Updater:
    """What a rank does with the mini-batches of a step.

    Args:
        config: every option.
        policy: sharded over the ranks.
        encoder: prompts and photos to model inputs.
        ranks: the ranks.
        budget: tokens of a micro-batch.
        check_stop: called before every micro-batch, on all ranks at once; what it raises ends the
            step where its state can be saved.
    """

    def __init__(
        self,
        config: TapoConfig,
        policy: Policy,
        encoder: PromptEncoder,
        ranks: Ranks,
        budget: TokenBudget,
        check_stop: Callable[[], None],
    ):
        self._config, self._policy, self._encoder = config, policy, encoder
        self._ranks, self._budget, self._check_stop = ranks, budget, check_stop
        self._shape = policy.family.shape(policy.model.config)

    def score(self, field: str, pieces: Sequence[Piece], advance: Advance) -> None:
        """Set `old_logprobs` or `neg_logprobs` of all responses, at these weights."""
        self._budget.fit(lambda: self._score(field, pieces, advance), self._policy.zero_grad)

    def _score(self, field: str, pieces: Sequence[Piece], advance: Advance) -> None:
        branch = "negative" if field == "neg_logprobs" else self._config.loss.update_on
        responses = [r for piece in pieces for r in piece.chosen()]
        found: dict[int, Tensor] = {}
        self._policy.eval()
        for chunk, is_filler in self._chunks(pieces, [branch]):
            self._check_stop()
            chosen = [r for piece in chunk for r in piece.chosen()]
            packed = pack_branch(chunk, branch, self._encoder)
            logprobs = self._policy.logprobs(packed, labels_of(chosen))
            if not is_filler:
                found |= _parts(chosen, logprobs)
            advance(len(chunk) * self._ranks.size)
        self._set(field, responses, found)

    def accumulate(
        self, pieces: Sequence[Piece], advance: Advance
    ) -> tuple[dict[str, Tensor], Callable[[], None]] | None:
        """Add a mini-batch's gradients up.

        Returns:
            The loss and its metrics, of all ranks; and what sets old_logprobs of its responses to
            what this pass computed. None where no row counts.
        """
        return self._budget.fit(lambda: self._accumulate(pieces, advance), self._policy.zero_grad)

    def _accumulate(self, pieces: Sequence[Piece], advance: Advance):
        config, loss = self._config, self._config.loss
        responses = [r for piece in pieces for r in piece.chosen()]
        weights = row_weights(
            [len(r.token_ids) for r in responses],
            [piece.group.id for piece in pieces for _ in piece.responses],
            [config.rollout.cut_off == "mask" and r.finish_reason == "length" for r in responses],
            loss.mean_over,
            loss.mean_over_size,
        )
        weight_of = {id(r): weight for r, weight in zip(responses, weights, strict=True)}
        num_loss_tokens = sum(weight_of[id(r)] * len(r.token_ids) for r in responses)
        if num_loss_tokens == 0:
            return None
        negative = loss.needs_negative and loss.neg_at == "now"
        branches = [loss.update_on, "negative"] if negative else [loss.update_on]
        sums: dict[str, Tensor] = {}
        found: dict[int, Tensor] = {}
        self._policy.train()
        for chunk, is_filler in self._chunks(pieces, branches):
            self._check_stop()
            batch = micro_batch(
                chunk,
                self._encoder,
                dict.fromkeys(weight_of, 0.0) if is_filler else weight_of,
                update_on=loss.update_on,
                negative=negative,
                num_loss_tokens=num_loss_tokens,
                is_cap=loss.is_cap,
            )
            value, metrics = self._policy.accumulate(batch, config.parallel.branches)
            logprobs = metrics.pop("logprobs")
            metrics.pop("neg_logprobs", None)
            add_up(sums, {"loss": value} | metrics)
            if not is_filler:
                chosen = [r for piece in chunk for r in piece.chosen()]
                # Rows that were left out have no log-probs.
                found |= {k: v for k, v in _parts(chosen, logprobs).items() if weight_of[k]}
            advance(len(chunk) * self._ranks.size)
        return self._ranks.add(sums), lambda: self._set("old_logprobs", responses, found)

    def _chunks(
        self, pieces: Sequence[Piece], branches: Sequence[str]
    ) -> list[tuple[list[Piece], bool]]:
        """This rank's micro-batches, and fillers (True) up to the largest number of any rank."""
        encode = self._encoder

        def cost(piece: Piece) -> float:
            prompts = [p for branch in branches for p in branch_prompts(piece, branch, encode)]
            return forward_flops(self._shape, prompt_loads(prompts)).total

        mine = self._ranks.dealt(pieces, cost)
        filler = [Piece(pieces[0].group, pieces[0].responses[:1])]
        split = split_by_budget(mine, branches, encode, self._budget.tokens)
        return self._ranks.evened(list(split), filler)

    def _set(self, field: str, responses: Sequence[Response], found: dict[int, Tensor]) -> None:
        """Set a field of responses, found by id on one rank or another, on all ranks."""
        mine = {place: found[id(r)] for place, r in enumerate(responses) if id(r) in found}
        for part in self._ranks.exchange(mine):
            for place, logprobs in part.items():
                setattr(responses[place], field, logprobs)


def _parts(responses: Sequence[Response], logprobs: Tensor) -> dict[int, Tensor]:
    """[R] log-probs as one tensor a response, by id(response)."""
    parts = logprobs.cpu().split([len(r.token_ids) for r in responses])
    return {id(r): part.clone() for r, part in zip(responses, parts, strict=True)}
