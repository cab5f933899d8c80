"""Dynamic sampling: triplets are sampled until a step has enough groups that teach something.

A group is the n1 responses sampled on the anchor image and the n2 sampled on the positive image.
It passes when some but not all of its responses are correct: 0 < correct < n1 + n2 (Fine-R1, DAPO).
"""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import takewhile
from types import MappingProxyType

from transformers import PreTrainedTokenizerBase

from tercet.core.data.stream import TripletStream
from tercet.core.data.vision import PromptEncoder
from tercet.core.prompts import answer_opening
from tercet.core.reward_process import RewardProcess
from tercet.core.rewards import call_reward, keep_group
from tercet.core.rollout_config import RolloutConfig
from tercet.core.types import Anchor, Completion, Group, Request, Response
from tercet.core.weighted_reward import WeightedReward
from tercet.rollout.engine import Engine, Sampling, together
from tercet.rollout.step_groups import StepGroups
from tercet.rollout.training_prompts import Nearest, TrainingPrompts

Progress = Callable[[int, StepGroups], None]
OVERSAMPLE = 1.25
"""With streaming: groups in flight, as a multiple of the groups expected to fill the step."""
REWARDS_AT_ONCE = 32
"""Most groups whose rewards are computed at the same time; the others wait for their turn."""


class NotEnoughGroups(ValueError):
    """Too few groups passed within `max_rounds`, and `on_exhausted` is `error`."""


async def _beat(progress: Progress, result: StepGroups) -> None:
    """Call progress(0, result) every second, for ever."""
    while True:
        await asyncio.sleep(1.0)
        progress(0, result)


async def _finished(running: Iterable[asyncio.Task], ordered: bool) -> list[asyncio.Task]:
    """Wait for another task; then those that are done, of `ordered` ones up to the first that is
    not."""
    if unfinished := [task for task in running if not task.done()]:
        await asyncio.wait(unfinished, return_when=asyncio.FIRST_COMPLETED)
    done = asyncio.Task.done
    return list(takewhile(done, running) if ordered else filter(done, running))


class GroupSampler:
    """Samples the groups of each step.

    Args:
        engine: samples the responses.
        stream: gives the triplets.
        tokenizer: for prompts and for the text that rewards see.
        encoder: counts a prompt's tokens, those of its photo included.
        config: group sizes, sampling and what to do when too few groups pass.
        reward: batch reward function (see core.rewards); its process is closed with the sampler.
        names: known sub-category names by super-category, for rewards that need them.
        nearest: the most similar others of each sub-category, for prompts that show options.
        system_prompt: system message of every prompt.
        seed: of the run.
        is_reserved: whether a metric's name is the trainer's own and must not be the reward's.
    """

    def __init__(
        self,
        engine: Engine,
        stream: TripletStream,
        tokenizer: PreTrainedTokenizerBase,
        encoder: PromptEncoder,
        config: RolloutConfig,
        *,
        reward: Callable | RewardProcess | WeightedReward,
        names: dict[str, Sequence[str]],
        nearest: Nearest = MappingProxyType({}),
        system_prompt: str | None,
        seed: int,
        is_reserved: Callable[[str], bool] = lambda metric: False,
    ):
        self.carried: list[Group] = []
        self._sent = (0, 0)
        """The step that was sampled last, and the prompts sent for it."""
        self._ahead: StepGroups | None = None
        """What was sampled ahead, until it is collected."""
        self._engine = engine
        self._stream = stream
        self._tokenizer = tokenizer
        self._config = config
        self.prompts = TrainingPrompts(tokenizer, encoder, config, nearest, system_prompt, seed)
        self._reward = reward
        self._is_reserved = is_reserved
        self._names = names
        self._seed = seed
        self._group_size = config.n_anchor + config.n_positive
        self._passed, self._tried = 1.0, 2.0
        """With streaming: faded counts of the groups that passed and of all groups; one of two at
        the start."""
        self._sampling = Sampling(
            config.temperature, config.top_p, config.top_k, config.max_response_tokens
        )

    def close(self) -> None:
        """End the reward function's processes."""
        if isinstance(self._reward, RewardProcess | WeightedReward):
            self._reward.close()

    def state(self) -> dict:
        """What a checkpoint needs to go on from here, beside the stream's state."""
        groups = {"groups_per_step": self._config.groups_per_step}
        ahead = self._ahead.groups if self._ahead else []
        return {"carried": [*ahead, *self.carried], "sent": self._sent} | groups

    def restore(self, state: dict) -> None:
        """Go on from where `state` was taken; earlier versions stored no `sent`."""
        self.carried, self._sent = state["carried"], tuple(state.get("sent", (0, 0)))

    async def collect(
        self, step: int, progress: Progress = lambda *_: None, later: int = 0
    ) -> StepGroups:
        """Sample until the step has its groups or `max_rounds` are used up.

        After any exception the stream and the carried groups are as they were before the call. A
        step that is sampled a second time, as its first groups could not be trained on, gets groups
        of other ids and seeds.

        Args:
            step: rollout step; part of every sample's seed.
            progress: called with the number of responses that just came in, 0 every second in
                between, and what the step has so far; an exception it raises ends the step.
            later: weight updates between now and the step.

        Raises:
            NotEnoughGroups: too few groups passed and `on_exhausted` is `error`.
            ValueError: naming the photo that is bad, the prompt that is too long or the reward
                function that failed; or too many responses had to be drawn again.
        """
        if self._ahead is not None:
            found, self._ahead = self._ahead, None
            return found
        position, carried = self._stream.state(), self.carried
        started = time.perf_counter()
        try:
            found = await self._collect(step, progress, later)
            found.seconds = time.perf_counter() - started
            return found
        except BaseException:
            self._stream.restore(position)
            self.carried = carried
            raise

    async def collect_ahead(self, step: int, progress: Progress) -> None:
        """Sample the step after the next weight update: the next `collect` gives its groups. Once
        they are whole they are part of the state, as carried ones."""
        self._ahead = await self.collect(step, progress, later=1)

    async def _collect(self, step: int, progress: Progress, later: int) -> StepGroups:
        config = self._config
        wanted = config.groups_per_step
        limit = math.inf if config.max_rounds is None else config.max_rounds * wanted
        result = StepGroups(
            self._fresh_carried(later), self._sent[1] if self._sent[0] == step else 0
        )
        redrawn = Counter(getattr(self._engine, "redrawn", {}))
        self._rewarding = asyncio.Semaphore(REWARDS_AT_ONCE)  # of this call's event loop
        self.carried = []
        result.passing = {group.id for group in result.groups}
        fill = self._stream_in if config.streaming else self._rounds
        async with together() as tasks:
            beat = tasks.create_task(_beat(progress, result))
            await fill(step, limit, result, progress)
            beat.cancel()
        if len(result.groups) < wanted and config.on_exhausted == "error":
            raise NotEnoughGroups(
                f"step {step}: {len(result.groups)} of {wanted} groups passed in "
                f"rollout.max_rounds = {config.max_rounds} rounds ({result.prompts_sent} prompts); "
                "see rollout.on_exhausted"
            )
        if hasattr(self._engine, "redrawn"):
            result.count_redrawn(self._engine.redrawn - redrawn, step)
        self._sent = (step, result.first + result.prompts_sent)
        if config.surplus == "carry":
            self.carried = result.groups[wanted:]
        result.groups = result.groups[:wanted]
        result.filled_up = sum(group.id not in result.passing for group in result.groups)
        return result

    async def _rounds(
        self, step: int, limit: float, result: StepGroups, progress: Progress
    ) -> None:
        """Sample one batch after the other; every run gives the same groups."""
        config = self._config
        wanted = config.groups_per_step
        while len(result.groups) < wanted and result.prompts_sent < limit:
            size = min(config.prompts_per_batch or wanted, limit - result.prompts_sent)
            batch = [self._next_group(step, result) for _ in range(size)]
            passes = await self._sample(batch, step, result, progress)
            chosen = {group.id for group in batch if passes[group.id]}
            result.passing |= chosen
            spent = result.prompts_sent >= limit
            if config.on_exhausted == "keep_last_round" and (spent or not chosen):
                missing = max(0, wanted - len(result.groups) - len(chosen))
                failed = [group.id for group in batch if group.id not in chosen]
                chosen = chosen.union(failed[:missing])
            result.groups += [group for group in batch if group.id in chosen]

    async def _stream_in(
        self, step: int, limit: float, result: StepGroups, progress: Progress
    ) -> None:
        """Keep enough groups in flight, and count each one as soon as it has its rewards; with
        `ordered` as soon as all that were asked for before it have theirs too.

        When the step is full, the groups that were not counted are aborted and their triplets go
        back to the stream, finished or not with `ordered`: which groups a step gets does not depend
        on how long they take. Without a limit `keep_last_round` keeps a round's worth of groups of
        which none passed, as batches do: the step would never end.
        """
        config, wanted = self._config, self._config.groups_per_step
        ordered, keeps = config.ordered, config.on_exhausted == "keep_last_round"
        endless, round_size = keeps and math.isinf(limit), config.prompts_per_batch or wanted
        running: dict[asyncio.Task[dict[str, bool]], Group] = {}
        failed: list[Group] = []
        self._passed, self._tried = self._passed / 2, self._tried / 2  # older steps count less

        def count(task: asyncio.Task[dict[str, bool]]) -> None:
            group = running.pop(task)
            passes = task.result()[group.id]
            self._passed, self._tried = self._passed + passes, self._tried + 1
            if passes:
                result.passing.add(group.id)
                failed[:] = [] if endless else failed
            (result.groups if passes else failed).append(group)

        async with together() as tasks:
            while (missing := wanted - len(result.groups)) > 0:
                while len(running) < self._room(missing) and result.prompts_sent < limit:
                    group = self._next_group(step, result)
                    task = tasks.create_task(self._sample([group], step, result, progress))
                    running[task] = group
                if not running:
                    break
                for task in await _finished(running, ordered):
                    if not ordered or len(result.groups) < wanted:
                        count(task)
                if endless and len(failed) >= round_size:
                    result.groups += failed[: max(0, wanted - len(result.groups))]
                    failed.clear()
            for task in running:
                task.cancel()
        for task in [task for task in running if not (ordered or task.cancelled())]:
            count(task)  # it had finished before it could be cancelled
        self._stream.put_back([group.triplet for group in running.values()])
        if keeps and missing > 0:
            result.groups += failed[-missing:]

    def _room(self, missing: int) -> int:
        """Groups that may be in flight: those expected to fill the step, and some more."""
        likely = math.ceil(OVERSAMPLE * missing * self._tried / self._passed)
        return min(likely, 1 + math.ceil(self._config.max_in_flight / self._group_size))

    def _fresh_carried(self, later: int) -> list[Group]:
        """Carried groups that were sampled at most max_staleness weight versions before the step
        begins, `later` versions from now."""
        oldest = self._engine.weight_version + later - self._config.max_staleness
        return [g for g in self.carried if min(r.weight_version for r in g.responses) >= oldest]

    def _next_group(self, step: int, result: StepGroups) -> Group:
        """A group without responses, of the next triplet."""
        triplet = next(self._stream)
        group_id = f"{step}.{result.first + result.prompts_sent}.{triplet.id}"
        result.prompts_sent += 1
        photos = (triplet.anchor, triplet.positive, triplet.negative)
        return Group(group_id, triplet, self.prompts.ids(triplet, photos), [])

    async def _sample(
        self, groups: Sequence[Group], step: int, result: StepGroups, progress: Progress
    ) -> dict[str, bool]:
        """Sample the responses of groups, and reward each group once it is complete.

        A reward function that raises ends the sampling at once.

        Returns:
            Whether each group passes the filter, by group id.
        """
        by_id = {group.id: group for group in groups}
        requests = [request for group in groups for request in self._requests(group, step)]
        done: dict[str, list[Completion]] = {group_id: [] for group_id in by_id}
        rewarding: dict[str, asyncio.Task[bool]] = {}
        async with together() as tasks:
            async for completion in self._engine.generate(requests, self._sampling):
                group_id = completion.request_id.rpartition(".")[0]
                done[group_id].append(completion)
                progress(1, result)
                if len(done[group_id]) == self._group_size:
                    self._fill(by_id[group_id], done[group_id])
                    rewarded = self._reward_group(by_id[group_id], result)
                    rewarding[group_id] = tasks.create_task(rewarded)
            sampled = time.perf_counter()
            await asyncio.gather(*rewarding.values())
            if not self._config.streaming:
                result.reward_seconds += time.perf_counter() - sampled
        if missing := [group_id for group_id in by_id if group_id not in rewarding]:
            raise RuntimeError(f"step {step}: the engine did not finish group(s) {missing}")
        passes = {group_id: task.result() for group_id, task in rewarding.items()}
        result.rewarded += groups
        progress(0, result)
        return passes

    def check_prompts(self, anchors: Iterable[Anchor]) -> None:
        """Raises ValueError for a prompt that no triplet of these anchors may have."""
        for anchor in anchors:
            self.prompts.ids(anchor, (anchor.image, *anchor.positives, *anchor.negatives))

    def _requests(self, group: Group, step: int) -> list[Request]:
        """One request for the anchor image and one for the positive one, unless n is 0."""
        halves = {
            "anchor": (group.triplet.anchor, self._config.n_anchor),
            "positive": (group.triplet.positive, self._config.n_positive),
        }
        return [
            Request(
                id=f"{group.id}.{role}",
                group_id=group.id,
                prompt_ids=group.prompt_ids,
                images=(image,),
                n=n,
                seed=self._seed,
                step=step,
            )
            for role, (image, n) in halves.items()
            if n
        ]

    def _fill(self, group: Group, completions: list[Completion]) -> None:
        """Add completions to their group: those on the anchor first, each half by index."""
        opening = answer_opening(self._tokenizer, group.prompt_ids)
        for completion in sorted(completions, key=lambda c: (c.request_id, c.index)):
            said = self._tokenizer.decode(completion.token_ids, skip_special_tokens=True)
            group.responses.append(
                Response(
                    role=completion.request_id.rpartition(".")[2],
                    token_ids=completion.token_ids,
                    rollout_logprobs=completion.rollout_logprobs,
                    finish_reason=completion.finish_reason,
                    weight_version=completion.weight_version,
                    text=opening + said,
                )
            )

    async def _reward_group(self, group: Group, result: StepGroups) -> bool:
        """Reward a complete group; returns whether it passes the filter, and counts it."""
        triplet, config = group.triplet, self._config
        images = {"anchor": triplet.anchor, "positive": triplet.positive}
        rows = [
            {
                "response": response.text,
                "response_length": len(response.token_ids),
                "ground_truth": triplet.sub_category,
                "question": triplet.question,
                "images": [images[response.role]],
                "role": response.role,
                "group_id": group.id,
                "finish_reason": response.finish_reason,
                "super_category": triplet.super_category,
                "names": tuple(self._names.get(triplet.super_category, ())),
                "options": self.prompts.options(triplet),
                "letter": self.prompts.letter(triplet),
            }
            for response in group.responses
        ]
        async with self._rewarding:
            timeout_s = config.reward_timeout_s
            outcomes = await call_reward(self._reward, rows, timeout_s, self._is_reserved)
        for response, outcome in zip(group.responses, outcomes, strict=True):
            penalised = config.cut_off == "penalise" and response.finish_reason == "length"
            response.reward = outcome["overall"] - penalised * config.cut_off_penalty
            response.metrics = {k: v for k, v in outcome.items() if k != "overall"}
        passes = keep_group(outcomes) or not config.dynamic_sampling
        result.groups_done += 1
        result.groups_kept += passes
        return passes
