"""Sampling ahead in a thread, with a scripted engine: what the next step gets, and what is lost."""

from __future__ import annotations

import asyncio
import threading
import time
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from test_sampler import (  # noqa: F401
    Script,
    ScriptedEngine,
    anchors,
    collect,
    encoder,
    make,
    parts,
    ranks,
)

from tercet.core.config import LossConfig, ParallelConfig, TapoConfig
from tercet.core.mismatch import cap_of
from tercet.train.cli.arguments import overridden
from tercet.train.cli.command_line import parse
from tercet.train.learner.ranks import Ranks
from tercet.train.run.ahead import Ahead

pytestmark = pytest.mark.core

OVERLAP = ["--rollout.overlap=one_step", "--rollout.engine=sglang"]


class Stuck(ScriptedEngine):
    """Its second batch fails with `error` or in `ask`, or is never finished."""

    error: Exception | None = None

    def ask(self) -> None: ...

    async def generate(self, requests, sampling):
        if self.batches:
            self.ask()
            if self.error:
                raise self.error
            await asyncio.sleep(600)
        async for completion in super().generate(requests, sampling):
            yield completion


def make_run(sampler, *, total_steps=9, stop=lambda: None):
    said: list[str] = []
    return SimpleNamespace(
        config=SimpleNamespace(rollout=SimpleNamespace(overlap="one_step")),
        sampler=sampler,
        ranks=Ranks(torch.device("cpu"), ParallelConfig()),
        log=SimpleNamespace(say=said.append, phase=lambda *_, **__: nullcontext(), said=said),
        stop=SimpleNamespace(check=stop),
        steps_done=0,
        total_steps=total_steps,
    )


@pytest.fixture
def begun(make):  # noqa: F811
    """Opens what samples ahead, with the second step begun."""
    opened = []

    def begin(script, **more):
        run = make_run(make(script, engine=more.pop("engine", None), surplus="carry"), **more)
        collect(run.sampler)
        ahead = Ahead(run)
        opened.append(ahead)
        ahead.begin()
        return run, ahead

    yield begin
    for ahead in opened:
        ahead.close()


def test_the_next_step_gets_the_groups_of_the_weights_before(begun, make, parts):  # noqa: F811
    plain = make(Script(set(range(4)), set(range(6))))
    collect(plain)
    expected = collect(plain, step=1)

    run, ahead = begun(Script(set(range(4)), set(range(6)), set(range(4))))
    ahead.wait()
    run.sampler._engine.weight_version = 1
    found = collect(run.sampler, step=1)
    assert ranks(found.groups) == ranks(expected.groups)
    said = [[r.token_ids for r in g.responses] for g in found.groups]
    assert said == [[r.token_ids for r in g.responses] for g in expected.groups]
    assert found.figures() | {"tokens_per_s": 0} == expected.figures() | {"tokens_per_s": 0}
    assert found.seconds > 0 and len(run.sampler._engine.batches) == 2
    response = found.groups[0].responses[0]
    assert response.weight_version == 0
    assert cap_of(response, LossConfig(), version=1) == 2.0  # carried_cap: not on-policy any more
    assert ranks(collect(run.sampler, step=2).groups) == ["2.0", "2.1", "2.2", "2.3"]


def test_what_was_sampled_ahead_is_saved_as_carried_groups(begun, make):  # noqa: F811
    run, ahead = begun(Script(set(range(4)), set(range(6))))
    ahead.wait()
    state, position = run.sampler.state(), run.sampler._stream.state()
    assert ranks(state["carried"]) == ["1.0", "1.1", "1.2", "1.3"]
    again = make(Script())
    again.restore(state)
    again._stream.restore(position)
    again._engine.weight_version = 1
    found = collect(again, step=1)
    assert ranks(found.groups) == ["1.0", "1.1", "1.2", "1.3"] and found.prompts_sent == 0


def test_what_is_not_finished_is_given_up_whole(begun, parts):  # noqa: F811
    engine = Stuck(parts.tokenizer)
    run, ahead = begun(Script(set(range(4))), engine=engine)
    position = {"epoch": 0, "cursor": 4, "returned": []}
    ahead.stop()
    assert run.sampler._stream.state() == position and run.sampler.state()["carried"] == []
    ahead.wait()  # there is nothing to wait for any more
    assert run.sampler._ahead is None


@pytest.mark.parametrize("when", ["during the update", "in the wait for it"])
def test_weights_are_refused_while_it_samples_and_the_step_is_sampled_later(begun, parts, when):  # noqa: F811
    engine, asked = Stuck(parts.tokenizer), threading.Event()
    run, ahead = begun(Script(set(range(4)), set(range(6))), engine=engine)
    ahead.stop()
    ahead.check_weights()

    def ask():
        time.sleep(0.3 * (when == "in the wait for it"))
        asked.set()
        ahead.check_weights()

    engine.ask = ask
    ahead.begin()
    if when == "during the update":
        asked.wait(30)
    ahead.wait()
    (said,) = run.log.said
    assert said.startswith("step 2 is not sampled ahead: a server was restarted")
    engine.weight_version = 1
    engine.batches.clear()
    found = collect(run.sampler, step=1)
    assert ranks(found.groups) == ["1.0", "1.1", "1.2", "1.3"]
    assert {r.weight_version for group in found.groups for r in group.responses} == {1}


def test_errors_and_interruptions_of_the_thread_come_out_of_the_wait(begun, parts):  # noqa: F811
    engine = Stuck(parts.tokenizer)
    engine.error = ValueError("photo a3.png is bad")
    _, ahead = begun(Script(set(range(4))), engine=engine)
    with pytest.raises(ValueError, match=r"a3\.png"):
        ahead.wait()

    def stop():
        raise KeyboardInterrupt

    _, ahead = begun(Script(set(range(4))), engine=Stuck(parts.tokenizer), stop=stop)
    with pytest.raises(KeyboardInterrupt):
        ahead.wait()


def test_nothing_is_sampled_after_the_last_step(begun):
    run, ahead = begun(Script(set(range(4)), set(range(4))), total_steps=1)
    ahead.wait()
    assert len(run.sampler._engine.batches) == 1 and run.sampler._ahead is None


@pytest.mark.parametrize(
    "more, message",
    [
        (["--rollout.engine=local"], "needs servers with GPUs of their own"),
        (["--rollout.colocated=true"], "needs servers with GPUs of their own"),
        (["--rollout.max_staleness=0"], "needs rollout.max_staleness of at least 1"),
        (["--loss.carried_cap=null"], "needs importance weights"),
    ],
)
def test_options_that_overlap_cannot_have(more, message, capsys):
    options = ["--data.path=photos", "--model.path=model", *OVERLAP]
    assert parse(TapoConfig, options, "")[0].rollout.overlap == "one_step"
    with pytest.raises((ValueError, SystemExit)) as error:
        parse(TapoConfig, overridden(options, more), "")
    assert message in f"{error.value}{capsys.readouterr().err}"
    assert parse(TapoConfig, [], "")[0].rollout.overlap == "off"
