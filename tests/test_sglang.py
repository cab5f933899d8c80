"""The SGLang engine against a real server on a CPU: tokens, log-probs, weights, training.

Needs TERCET_SGLANG_PYTHON, the Python of the server's environment: `make test-sglang` sets it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from sglang_support import (
    FLAGS,
    NEEDS_SERVER,
    PYTHON,
    assert_same_as_local,
    avoid_image_tokens,
    change_weights,
    collect,
    make_engine,
    make_requests,
    make_server,
    processes_in,
    training_options,
)
from support import LENGTH, tiny

from tercet.core.config import ModelConfig, ParallelConfig, TapoConfig
from tercet.core.data.stream import TripletStream
from tercet.core.data.vision import PromptEncoder
from tercet.core.models import FAMILIES
from tercet.core.prompts import chat_ids
from tercet.core.rollout_config import RolloutConfig
from tercet.core.types import Anchor, Request
from tercet.rollout.engine import Sampling
from tercet.rollout.judge import Judge
from tercet.rollout.launch import SAME_PIXELS
from tercet.rollout.sampler import GroupSampler
from tercet.rollout.server import ServerError
from tercet.train import tapo
from tercet.train.cli.arguments import overridden
from tercet.train.cli.command_line import parse
from tercet.train.learner.ranks import Ranks
from tercet.train.run.assemble import build_policy

pytestmark = NEEDS_SERVER


@pytest.mark.parametrize("way", ["disk", "distributed", "tensor"])
def test_every_way_of_weights_gives_the_local_engines_answers(
    policy, server, photos, tmp_path, way
):
    """Tokens and log-probs after each of two updates: no trace of the old weights is left."""
    engine = make_engine(policy, [server], tmp_path, way=way)
    requests = make_requests(policy, photos)
    for version in (1, 2):
        change_weights(policy)
        engine.update_weights(policy.model.named_parameters(), version)
        assert_same_as_local(policy, engine, requests)
    assert not list(tmp_path.glob("tercet-weights-*"))


def test_a_prompt_is_prefilled_once(policy, engine, photos):
    requests = make_requests(policy, photos, n=4)[:1]
    engine.update_weights(policy.model.named_parameters(), 3)
    assert len(collect(engine, requests)) == 4
    length = len(PromptEncoder(policy)(requests[0].prompt_ids, requests[0].images))
    assert engine.cached_tokens == 3 * (length - 1) and engine.prompt_tokens == 4 * length


def test_sampling_gives_full_vocabulary_logprobs(policy, engine, photos):
    """Before top_p and top_k: those that plain transformers computes for the same tokens."""
    requests = make_requests(policy, photos, n=2)
    engine.update_weights(policy.model.named_parameters(), 3)
    sampling = Sampling(temperature=0.7, top_p=0.3, max_tokens=8)
    for completion in collect(engine, requests, sampling):
        request = next(r for r in requests if r.id == completion.request_id)
        prompt = PromptEncoder(policy)(request.prompt_ids, request.images)
        ids = torch.cat([prompt.input_ids, torch.tensor(completion.token_ids)])[None]
        logits = policy.model(
            input_ids=ids,
            mm_token_type_ids=(ids == policy.model.config.image_token_id).int(),
            pixel_values=prompt.images[0].pixel_values,
            image_grid_thw=prompt.images[0].grid_thw,
        ).logits[0, len(prompt) - 1 : -1]
        logprobs = (logits / 0.7).log_softmax(-1)
        want = logprobs.gather(1, torch.tensor(completion.token_ids)[:, None])[:, 0]
        got = torch.tensor(completion.rollout_logprobs)
        torch.testing.assert_close(got, want.detach(), atol=1e-5, rtol=0)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("architecture", [name for name in FAMILIES if name != "qwen2_5_vl"])
def test_other_architectures_with_a_head_of_their_own(architecture, tied, photos, tmp_path):
    """Weight names, on every way; the other tests' policy is a Qwen2.5-VL with a tied head."""
    parts = tiny(architecture, tie_word_embeddings=tied)
    with make_server(parts, tmp_path / "model") as server:
        for version, way in enumerate(("disk", "distributed", "tensor"), start=1):
            change_weights(parts)
            engine = make_engine(parts, [server], tmp_path, way=way)
            engine.update_weights(parts.model.named_parameters(), version)
            assert_same_as_local(parts, engine, make_requests(parts, photos, n=1))


def test_lora_of_a_bfloat16_policy_reaches_a_float32_server(policy, server, photos, tmp_path):
    """With served_dtype float32 its log-probs are those of base and additions, unrounded."""
    parts, ranks = tiny(), Ranks(torch.device("cpu"), ParallelConfig())
    avoid_image_tokens(parts)
    for parameter in parts.model.parameters():  # not the frequencies of rotary positions
        parameter.data = parameter.data.bfloat16()
    config = TapoConfig(
        model=ModelConfig(lora_rank=4, lora_alpha=8),
        rollout=RolloutConfig(engine="sglang", served_dtype="float32"),
    )
    lora = build_policy(parts, config, ranks)
    with torch.no_grad():
        for name, weight in lora.model.named_parameters():
            if "lora_B" in name:
                weight += 2e-4 * torch.randn_like(weight)
    engine = make_engine(policy, [server], tmp_path)
    engine.update_weights(lora.sampled_weights(), 5)
    lora.model.float()
    assert_same_as_local(parts, engine, make_requests(parts, photos, n=1))
    engine.update_weights(policy.model.named_parameters(), 6)


def collect_groups(policy, engine, photos, seed: int, **options):
    anchors = [
        Anchor(str(i), photo, (photos[i - 1],), (photos[i - 2],), "Which bird?", "bird", "wren")
        for i, photo in enumerate(photos)
    ]
    odd = lambda rows: [{"overall": len(row["response"]) % 7} for row in rows]  # noqa: E731
    defaults = {"engine": "sglang", "groups_per_step": 3, "n_anchor": 2, "n_positive": 2}
    defaults |= {"max_response_tokens": 16, "max_rounds": 2, "on_exhausted": "keep_last_round"}
    sampler = GroupSampler(
        engine,
        TripletStream(anchors, positive="fixed", seed=seed),
        policy.tokenizer,
        PromptEncoder(policy),
        RolloutConfig(**(defaults | options)),
        reward=odd,
        names={},
        system_prompt=None,
        seed=seed,
    )
    return asyncio.run(sampler.collect(0))


def said(result) -> list:
    return [(g.id, [(r.role, r.token_ids) for r in g.responses]) for g in result.groups]


def test_batches_give_the_same_groups_in_every_run(policy, engine, photos):
    engine.update_weights(policy.model.named_parameters(), 4)
    found = [
        collect_groups(policy, engine, photos, seed=1, dispatch="batch", temperature=0.0)
        for _ in range(2)
    ]
    assert said(found[0]) == said(found[1]) and len(found[0].groups) == 3


def test_a_stream_fills_a_step_from_the_server(policy, engine, photos):
    engine.update_weights(policy.model.named_parameters(), 4)
    result = collect_groups(policy, engine, photos, seed=1)
    assert len(result.groups) == 3
    assert all(len(group.responses) == 4 for group in result.groups)
    assert {r.weight_version for r in result.sampled} == {4}


@pytest.mark.gpu
def test_batches_of_seeded_samples_are_the_same_in_every_run(policy, photos, tmp_path):
    """The CPU's backend takes no seeds."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    flags = ["--enable-deterministic-inference", "--mem-fraction-static", "0.3", *SAME_PIXELS]
    with make_server(policy, tmp_path / "model", arguments=flags) as server:
        engine = make_engine(policy, [server], tmp_path)
        engine.update_weights(policy.model.named_parameters(), 1)
        one, same, other = (
            collect_groups(policy, engine, photos, seed=seed, dispatch="batch")
            for seed in (1, 1, 2)
        )
    assert said(one) == said(same) != said(other)


def test_several_calls_share_the_server_and_can_be_aborted(policy, engine, photos):
    """As with streaming: aborted samples are not yielded, all others are."""
    engine.update_weights(policy.model.named_parameters(), 4)
    requests = make_requests(policy, photos, n=3)
    long = Sampling(temperature=1.0, max_tokens=500)

    async def ask(request):
        return [completion async for completion in engine.generate([request], long)]

    async def run():
        tasks = [asyncio.create_task(ask(request)) for request in requests]
        await asyncio.sleep(0.5)
        engine.abort([requests[1].id])
        tasks[2].cancel()
        return await asyncio.gather(*tasks, return_exceptions=True)

    started = time.monotonic()
    first, second, third = asyncio.run(run())
    assert sorted(c.index for c in first) == [0, 1, 2]
    assert len(second) < 3 and isinstance(third, asyncio.CancelledError)
    # Nothing runs on: the server is idle at once.
    engine._endpoints[0].drain()
    assert time.monotonic() - started < 300


def test_sleeping_servers_take_new_weights_when_they_wake(policy, engine, photos):
    engine.sleep()
    change_weights(policy)
    engine.wake()
    engine.update_weights(policy.model.named_parameters(), 5)
    assert_same_as_local(policy, engine, make_requests(policy, photos, n=1))


def test_groups_go_to_the_server_with_the_fewest_samples(policy, server, photos, tmp_path):
    """Two addresses of one server: both prompts of a group at one of them."""
    other = server.url.replace("127.0.0.1", "localhost")
    engine = make_engine(policy, [server.url, other], tmp_path)
    engine.update_weights(policy.model.named_parameters(), 6)
    found = {}
    run = engine._run

    def noted(session, job):
        found.setdefault(job.request.group_id, set()).add(job.endpoint.url)
        return run(session, job)

    engine._run = noted
    assert len(collect(engine, make_requests(policy, photos, n=2))) == 6
    assert found == {"g0": {server.url}, "g1": {other}}
    assert [endpoint.load for endpoint in engine._endpoints] == [0, 0]


def test_the_judge_asks_a_real_endpoint_about_a_photo(policy, server, engine, photos, tmp_path):
    """Its greedy answer is that of the engine to the same chat."""
    engine.update_weights(policy.model.named_parameters(), 7)
    question = "What bird is this?"
    messages = [{"role": "user", "content": "<image>" + question}]
    ids = tuple(chat_ids(policy.tokenizer, messages, 1))
    request = Request("g0.anchor", "g0", ids, (photos[0],), 1, seed=0, step=0)
    tokens = collect(engine, [request], Sampling(temperature=0.0, max_tokens=16))[0].token_ids
    # Cut off after 2 tokens, it is asked for 16.
    judge = Judge(server.url + "/v1", "policy", max_tokens=2, cache=tmp_path / "answers.sqlite")
    answer = asyncio.run(judge.ask(question, [photos[0]]))
    assert answer.strip() == policy.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def test_a_broadcast_reaches_several_servers(policy, server, photos, tmp_path):
    """One of them asks for a key."""
    with make_server(policy, tmp_path / "model", api_key="secret") as other:
        with pytest.raises(ServerError, match="does not answer.*401"):
            make_engine(policy, [other], tmp_path, key="wrong")
        engine = make_engine(policy, [server, other], tmp_path, way="distributed", key="secret")
        for version in (1, 2):
            change_weights(policy)
            engine.update_weights(policy.model.named_parameters(), version)
            assert_same_as_local(policy, engine, make_requests(policy, photos, n=2))
        engine._sync.close()


def train_three_steps(folder, monkeypatch, *more: str) -> list[dict]:
    lengths = lambda rows: [{"overall": row["response_length"] / 10} for row in rows]  # noqa: E731
    monkeypatch.setattr(tapo, "load_reward", lambda spec: lengths)
    config, _, resolved = parse(TapoConfig, overridden(training_options(folder, steps=3), more), "")
    tapo.train(config, resolved)
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def assert_trained_with_synced_weights(rows: list[dict], log: str, ending: str) -> None:
    """Weights are sent before the first step and after each; the sampler's log-probs are the
    trainer's."""
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert all(row["grad_norm"] > 0 and row["groups"] == 4 for row in rows)
    assert all(0 < row["mismatch_max"] < 1e-4 for row in rows)
    assert log.count(f'"POST /{ending} HTTP/1.1" 200') == 4


def test_training_samples_on_a_server_and_leaves_none(tmp_path, monkeypatch):
    own = [f"--rollout.sglang_python={PYTHON}", f"--rollout.sglang_args={' '.join(FLAGS)}"]
    rows = train_three_steps(tmp_path, monkeypatch, *own)
    folder = tmp_path / "run" / "sglang" / "server_0"
    log = (folder / "sglang.log").read_text()
    assert_trained_with_synced_weights(rows, log, "update_weights_from_disk")
    assert processes_in(folder) == []


def test_training_shares_a_running_server_that_sleeps_during_updates(tmp_path, monkeypatch, server):
    """Attached, colocated, weights as handles; the server runs on after the trainer has ended."""
    before = len(server.log_path.read_text())
    more = [f"--rollout.urls=['{server.url}']", "--rollout.weight_sync=tensor"]
    rows = train_three_steps(tmp_path, monkeypatch, *more, "--rollout.colocated=true")
    log = server.log_path.read_text()[before:]
    assert_trained_with_synced_weights(rows, log, "end_weight_update")
    assert log.count('"POST /release_memory_occupation HTTP/1.1" 200') == 3
    assert log.count('"POST /resume_memory_occupation HTTP/1.1" 200') == 3
    assert server.is_healthy()


def test_the_next_step_is_sampled_while_this_one_is_trained_on(tmp_path, monkeypatch):
    """From step 2 on by weights that are one step old, so that there is no mismatch to measure."""
    own = [f"--rollout.sglang_python={PYTHON}", f"--rollout.sglang_args={' '.join(FLAGS)}"]
    rows = train_three_steps(tmp_path, monkeypatch, *own, "--rollout.overlap=one_step")
    assert all(row["grad_norm"] > 0 and row["groups"] == 4 for row in rows)
    assert 0 < rows[0]["mismatch_max"] < 1e-4
    assert not any("mismatch_max" in row for row in rows[1:])
    assert all(row["reward"] > 0 and row["tokens_per_s"] > 0 for row in rows)
    log = (tmp_path / "run" / "sglang" / "server_0" / "sglang.log").read_text()
    places = [log.find('"POST /update_weights_from_disk')]
    while places[-1] >= 0:
        places.append(log.find('"POST /update_weights_from_disk', places[-1] + 1))
    between = [log[a:b].count('"POST /generate') for a, b in zip(places, places[1:], strict=False)]
    # Steps 1 and 2 before the first update, step 3 before the second, none before the third.
    assert between[0] > between[1] > 0 and between[2] == 0 and len(places) == 5


KILLING = """import itertools, os, pathlib, signal
calls = itertools.count(1)
def place(rows):
    if next(calls) in (4, 5):  # step 1's last group is there, step 2's first of four
        for process in pathlib.Path('/proc').iterdir():
            try:
                line = (process / 'cmdline').read_text()
                if 'sglang.launch_server' in line and RUN in line:
                    os.killpg(os.getpgid(int(process.name)), signal.SIGKILL)
            except (OSError, ValueError):
                pass
    return [{'overall': n / 10} for n in range(len(rows))]  # every group passes
"""


def train_on_two_ranks(folder: Path, *more: str) -> list[dict]:
    root = Path(__file__).resolve().parents[1]
    torchrun = str(Path(sys.executable).with_name("torchrun"))
    script = ["--standalone", "--nproc-per-node", "2", str(root / "train" / "tapo.py")]
    options = overridden(training_options(folder, steps=2), more)
    done = subprocess.run(
        [torchrun, *script, *options],
        cwd=folder,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=1200,
    )
    print(done.stdout)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("what to run next") == 1
    return [json.loads(line) for line in (folder / "run" / "metrics.jsonl").open()]


def test_two_ranks_share_a_server(tmp_path, server):
    """The server gets the full weights of a sharded policy: its log-probs are the trainer's."""
    (tmp_path / "lengths.py").write_text(LENGTH)
    more = ["--rollout.reward=lengths:length", f"--rollout.urls=['{server.url}']"]
    rows = train_on_two_ranks(tmp_path, *more)
    assert len(rows) == 2 and all(0 < row["mismatch_max"] < 1e-4 for row in rows)


def test_two_ranks_that_overlap_sample_later_where_a_server_died(tmp_path, capsys):
    """While the policy is updated it gets no weights; at the step's end both ranks gather them."""
    own = [f"--rollout.sglang_python={PYTHON}", f"--rollout.sglang_args={' '.join(FLAGS)}"]
    (tmp_path / "killing.py").write_text(f"RUN = {str(tmp_path / 'run')!r}\n" + KILLING)
    more = ["--rollout.dispatch=batch", "--rollout.max_in_flight=2", "--rollout.overlap=one_step"]
    rows = train_on_two_ranks(tmp_path, "--rollout.reward=killing:place", *own, *more)
    assert len(rows) == 2 and all(row["grad_norm"] > 0 for row in rows)
    assert "step 2 is not sampled ahead: a server was restarted" in capsys.readouterr().out


def test_two_ranks_restart_a_server_that_dies(tmp_path):
    """During the weight sync and while it samples: both ranks gather the weights again."""
    own = [f"--rollout.sglang_python={PYTHON}", f"--rollout.sglang_args={' '.join(FLAGS)}"]
    (tmp_path / "killing.py").write_text(f"RUN = {str(tmp_path / 'run')!r}\n" + KILLING)
    # Two samples in flight: when a step's first group is whole, others have still to be drawn.
    more = ["--rollout.dispatch=batch", "--rollout.max_in_flight=2"]
    rows = train_on_two_ranks(tmp_path, "--rollout.reward=killing:place", *own, *more)
    assert len(rows) == 2 and all(0 < row["mismatch_max"] < 1e-4 for row in rows)
    log = (tmp_path / "run" / "sglang" / "server_0" / "sglang.log").read_text()
    # At the start, after step 1 (on the second server), on the third, after step 2.
    assert log.count('"POST /update_weights_from_disk HTTP/1.1" 200') == 4
    assert processes_in(tmp_path / "run" / "sglang" / "server_0") == []
