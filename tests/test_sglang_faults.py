"""Faults of servers, networks and users, on a real SGLang server behind a proxy.

Needs TERCET_SGLANG_PYTHON, the Python of the server's environment: `make test-sglang` sets it.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace

import httpx
import pytest
from proxy import Fault, Proxy
from sglang_support import (
    FLAGS,
    NEEDS_SERVER,
    PYTHON,
    assert_same_as_local,
    change_weights,
    collect,
    make_engine,
    make_requests,
    make_server,
    processes_in,
    training_options,
)

from tercet.rollout import endpoint
from tercet.rollout.engine import Sampling
from tercet.rollout.server import Server, ServerError, free_ports
from tercet.rollout.sglang import SglangEngine
from tercet.train import tapo
from tercet.train.cli.interrupt import Interrupted

pytestmark = NEEDS_SERVER


@pytest.fixture
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)


@pytest.fixture
def proxy(server):
    with Proxy(server.url) as proxy:
        yield proxy


def changed(**about):
    """A change of a reply, or of the last message of a streamed one."""

    def change(content: bytes) -> bytes:
        *before, last = [line for line in content.decode().split("\n\n") if "meta_info" in line]
        message = json.loads(last.removeprefix("data: "))
        message["meta_info"] |= {
            name: value(message["meta_info"]) if callable(value) else value
            for name, value in about.items()
        }
        if not content.startswith(b"data: "):
            return json.dumps(message).encode()
        return "\n\n".join([*before, f"data: {json.dumps(message)}", "data: [DONE]", ""]).encode()

    return change


def with_token(token: int):
    """The sampled tokens with the first one replaced."""
    return lambda about: [[-1.0, token, None], *about["output_token_logprobs"][1:]]


FAULTS = {
    "late": lambda policy: Fault(delay_s=12.0),
    "dropped": lambda policy: Fault(drop=True, times=2),
    "status 500": lambda policy: Fault(status=500),
    "status 503": lambda policy: Fault(status=503, times=3),
    "status 429": lambda policy: Fault(status=429),
    "nothing of it": lambda policy: Fault(keep=0.0),
    "half of it": lambda policy: Fault(keep=0.5),
    "not JSON": lambda policy: Fault(change=lambda content: b"data: {{{\n\ndata: [DONE]\n\n"),
    "no end": lambda policy: Fault(change=lambda content: content.replace(b"data: [DONE]", b"")),
    "empty": lambda policy: Fault(change=lambda content: b"data: [DONE]\n\n"),
    "old weights": lambda policy: Fault(change=changed(weight_version="0"), times=2),
    "aborted": lambda policy: Fault(change=changed(finish_reason={"type": "abort"})),
    "no log-probs": lambda policy: Fault(change=changed(output_token_logprobs=[])),
    "an image token": lambda policy: Fault(
        change=changed(output_token_logprobs=with_token(policy.banned_ids[0])), times=2
    ),
}


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("name", FAULTS)
def test_a_spoilt_answer_is_asked_for_again(policy, proxy, photos, tmp_path, name, n, short_pauses):
    """Every sample is yielded once, and none from a faulty reply, be it streamed (the first of two
    samples) or whole."""
    if n == 1 and name == "no end":
        pytest.skip("an answer in one piece has no end mark")
    engine = make_engine(policy, [proxy.url], tmp_path, timeout_s=10.0 if name == "late" else 60.0)
    engine.update_weights(policy.model.named_parameters(), 1)
    proxy.fault = FAULTS[name](policy)
    assert_same_as_local(policy, engine, make_requests(policy, photos, n=n))
    assert proxy.fault.hits == proxy.fault.times


@pytest.mark.parametrize(
    "fault, said",
    [
        (Fault(status=400), "refused a request: 400 the proxy says no"),
        (Fault(change=changed(prompt_tokens=7), times=100), "counts 7 prompt tokens, the trainer "),
        (Fault(status=503, times=100), r"failed 5 times: http://\S+: status 503"),
        (Fault(drop=True, times=100), r"failed 5 times: http://\S+: RemoteProtocolError"),
    ],
)
def test_what_does_not_pass_is_an_error_that_names_it(
    policy, proxy, photos, tmp_path, fault, said, short_pauses
):
    engine = make_engine(policy, [proxy.url], tmp_path)
    engine.update_weights(policy.model.named_parameters(), 1)
    proxy.fault = fault
    with pytest.raises(ServerError, match=said):
        collect(engine, make_requests(policy, photos, n=2))
    proxy.fault = None
    assert_same_as_local(policy, engine, make_requests(policy, photos, n=1))


def test_log_probs_after_top_p_are_noticed_at_the_start(policy, proxy, tmp_path):
    assert make_engine(policy, [proxy.url], tmp_path).full_vocabulary

    def renormalised(content: bytes) -> bytes:
        reply = json.loads(content)
        for entry in reply["meta_info"]["output_token_logprobs"]:
            entry[0] = 0.0
        return json.dumps(reply).encode()

    proxy.fault = Fault(change=renormalised)
    assert not make_engine(policy, [proxy.url], tmp_path).full_vocabulary


@pytest.mark.parametrize("way", ["disk", "distributed", "tensor"])
@pytest.mark.parametrize("fault", [Fault(status=500), Fault(drop=True), Fault(status=400)])
def test_a_weight_update_that_fails_once_is_done_again(policy, proxy, photos, tmp_path, way, fault):
    engine = make_engine(policy, [proxy.url], tmp_path, way=way, timeout_s=20.0)
    engine.update_weights(policy.model.named_parameters(), 1)
    change_weights(policy)
    path = f"/update_weights_from_{way}"
    proxy.fault = Fault(path, status=fault.status, drop=fault.drop)
    engine.update_weights(policy.model.named_parameters(), 2)
    assert proxy.fault.hits == 1
    assert_same_as_local(policy, engine, make_requests(policy, photos, n=1))


@pytest.mark.parametrize(
    ("way", "path"),
    [
        ("disk", "/update_weights_from_disk"),
        ("disk", "/model_info"),
        ("distributed", "/init_weights_update_group"),
        ("distributed", "/update_weights_from_distributed"),
        ("tensor", "/begin_weight_update"),
        ("tensor", "/update_weights_from_tensor"),
        ("tensor", "/end_weight_update"),
    ],
)
def test_a_signal_ends_a_weight_update_that_hangs(policy, proxy, tmp_path, way, path):
    """The signal comes while the request waits; the next update works as ever."""
    engine = make_engine(policy, [proxy.url], tmp_path, way=way)
    (asked,) = engine._endpoints
    proxy.fault = Fault(path, delay_s=45.0, drop=True)
    begun = time.monotonic()

    def check_stop() -> None:
        if proxy.fault.hits and time.monotonic() > begun + 1:
            raise Interrupted(signal.SIGTERM)

    asked.check_stop = check_stop
    with pytest.raises(Interrupted):
        engine.update_weights(policy.model.named_parameters(), 1)
    assert proxy.fault.hits == 1 and time.monotonic() < begun + 40
    asked.check_stop = lambda: None
    engine.update_weights(policy.model.named_parameters(), 2)
    assert asked.version() == "2"


def test_a_server_that_keeps_its_old_weights_is_found_out(policy, proxy, photos, tmp_path):
    engine = make_engine(policy, [proxy.url], tmp_path)
    wrong = lambda content: json.dumps(json.loads(content) | {"weight_version": "3"}).encode()  # noqa: E731
    proxy.fault = Fault("/model_info", times=2, change=wrong)
    with pytest.raises(ServerError, match="has weights 3 after an update to 4"):
        engine.update_weights(policy.model.named_parameters(), 4)


def test_a_server_killed_during_a_weight_update_is_restarted(policy, server, photos, tmp_path):
    engine = make_engine(policy, [server], tmp_path, way="distributed", timeout_s=60.0)
    engine.update_weights(policy.model.named_parameters(), 1)
    change_weights(policy)

    def weights():
        for n, named in enumerate(policy.model.named_parameters()):
            if n == 10:
                os.killpg(server.process_group, signal.SIGKILL)
            yield named

    engine.update_weights(weights(), 2)
    assert_same_as_local(policy, engine, make_requests(policy, photos, n=1))


def test_a_server_killed_while_it_generates_is_restarted(policy, server, photos, tmp_path):
    """Every sample is yielded once, and the new server has the current weights. Two samples are in
    flight, so that others are still to come when it is killed."""
    engine = make_engine(policy, [server], tmp_path, concurrency=2)
    requests = make_requests(policy, photos, n=2)
    engine.update_weights(policy.model.named_parameters(), 4)
    long = Sampling(temperature=0.0, max_tokens=64)
    want = collect(engine, requests, long)

    async def run():
        done = []
        async for completion in engine.generate(requests, long):
            if not done:
                os.killpg(server.process_group, signal.SIGKILL)
            done.append(completion)
        return done

    found = sorted(asyncio.run(run()), key=lambda c: (c.request_id, c.index))
    assert [(c.request_id, c.index) for c in found] == [(c.request_id, c.index) for c in want]
    assert [c.token_ids for c in found] == [c.token_ids for c in want]
    assert {c.weight_version for c in found} == {4} and server.is_healthy()


def test_a_hung_server_is_restarted(policy, server, photos, tmp_path):
    engine = make_engine(policy, [server], tmp_path, timeout_s=15.0)
    engine.update_weights(policy.model.named_parameters(), 5)
    os.killpg(server.process_group, signal.SIGSTOP)
    found = collect(engine, make_requests(policy, photos, n=1))
    assert len(found) == 3 and server.is_healthy()


def test_a_server_in_another_dtype_is_refused(tmp_path):
    """A float32 policy that is served in float16, by a server that runs already."""
    argv = training_options(tmp_path, steps=1)
    flags = ["float16" if flag == "float32" else flag for flag in FLAGS]
    server = Server(tmp_path / "policy", PYTHON, tmp_path / "server", arguments=flags)
    with server, pytest.raises(ValueError, match="float32 explains 0.0001 .rollout.mismatch_limit"):
        tapo.main([*argv, f"--rollout.urls=['{server.url}']"])


def test_log_probs_at_another_temperature_are_refused(tmp_path, server, monkeypatch):
    """As with SGLANG_RETURN_ORIGINAL_LOGPROB=1: half as much temperature as is asked for."""
    argv = training_options(tmp_path, steps=1)
    body = SglangEngine._body

    def hot(engine, request, sampling):
        return body(engine, request, replace(sampling, temperature=1.0))

    monkeypatch.setattr(SglangEngine, "_body", hot)
    with pytest.raises(ValueError, match="the servers' log-probs differ by"):
        tapo.main([*argv, f"--rollout.urls=['{server.url}']", "--rollout.temperature=0.5"])


def test_the_server_dies_with_a_killed_trainer(policy, tmp_path):
    policy.save(tmp_path / "model")
    port = free_ports(1)[0]
    script = f"""
import time
from tercet.rollout.server import Server
server = Server({str(tmp_path / "model")!r}, {PYTHON!r}, {str(tmp_path)!r},
                arguments={FLAGS!r}, port={port})
server.start()
print("up", server.process_group, flush=True)
time.sleep(600)
"""
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, text=True
    ) as trainer:
        group = int(trainer.stdout.readline().split()[1])
        assert httpx.get(f"http://127.0.0.1:{port}/health", timeout=5).status_code == 200
        trainer.kill()
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            break
        time.sleep(0.2)
    else:
        pytest.fail("the server outlives its trainer")


def test_bad_configuration_is_named_at_once(policy, server, tmp_path):
    started = time.monotonic()
    nowhere = f"http://127.0.0.1:{free_ports(1)[0]}"
    with pytest.raises(ServerError, match="does not answer"):
        make_engine(policy, [nowhere], tmp_path)
    with pytest.raises(ValueError, match="twice"):
        make_engine(policy, [nowhere, nowhere], tmp_path)
    with pytest.raises(ValueError, match="holds no config.json"):
        Server(tmp_path / "none", PYTHON, tmp_path)
    with pytest.raises(ValueError, match="is no program"):
        Server(server.model_path, tmp_path / "python", tmp_path)
    with pytest.raises(ServerError, match="is taken"):
        make_server(policy, tmp_path / "model", port=server.port).start()
    with pytest.raises(ServerError, match="ended with code"):
        make_server(policy, tmp_path / "model", arguments=["--no-such-flag"]).start()
    assert time.monotonic() - started < 300


def test_a_server_that_starts_too_slowly_is_stopped(policy, tmp_path):
    server = make_server(policy, tmp_path / "model", start_timeout_s=2.0)
    started = time.monotonic()
    with pytest.raises(ServerError, match="did not answer in 2 s"):
        server.start()
    assert time.monotonic() - started < 300
    assert not server.is_running() and processes_in(server.work_dir) == []


def test_a_stopped_training_leaves_a_checkpoint_and_no_server(tmp_path):
    """SIGTERM while it samples."""
    argv = training_options(tmp_path, steps=10_000)
    argv += [f"--rollout.sglang_python={PYTHON}", f"--rollout.sglang_args={' '.join(FLAGS)}"]
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    command = [sys.executable, os.path.join(root, "train", "tapo.py"), *argv]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    metrics = tmp_path / "run" / "metrics.jsonl"
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as trainer:
        deadline = time.monotonic() + 600
        while not (metrics.exists() and metrics.read_text()) and time.monotonic() < deadline:
            assert trainer.poll() is None
            time.sleep(0.5)
        trainer.terminate()
        assert trainer.wait(300) == 128 + signal.SIGTERM
    assert list((tmp_path / "run" / "checkpoints").glob("step_*"))
    assert processes_in(tmp_path / "run" / "sglang" / "server_0") == []
