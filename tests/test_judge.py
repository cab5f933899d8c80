"""The judge against a chat endpoint on this machine: answers, scores, cache, faults."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import threading
import time
from contextlib import contextmanager
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tercet.core.config import TapoConfig
from tercet.core.data.vision import data_uri
from tercet.core.prompts import VERIFIER
from tercet.core.rewards import best_of_rollouts, call_reward
from tercet.core.rollout_config import RolloutConfig
from tercet.core.weighted_reward import PartFailed
from tercet.rollout import endpoint, rewarding
from tercet.rollout.judge import Judge, judged, judged_part, read_number, verified_part
from tercet.rollout.server import ServerError, free_ports

pytestmark = pytest.mark.core


class Endpoint:
    """A chat endpoint that answers `say(body)`, after replies with `statuses`.

    An answer that is no text is sent as it is: a choice of its own, or the bytes of a reply.
    """

    def __init__(self, say=lambda body: "85", statuses=()):
        self.say, self.statuses = say, list(statuses)
        self.bodies: list[dict] = []
        self.headers: list[dict] = []
        self.running = self.most = 0


@contextmanager
def serving(chat: Endpoint):
    lock = threading.Lock()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with lock:
                chat.bodies.append(body)
                chat.headers.append(dict(self.headers))
                chat.running += 1
                chat.most = max(chat.most, chat.running)
                status = chat.statuses.pop(0) if chat.statuses else 200
            time.sleep(0.02)
            with lock:
                chat.running -= 1
            said = chat.say(body)
            if isinstance(said, str):
                said = {"message": {"content": said}}
            if not isinstance(said, bytes):
                said = json.dumps({"choices": [said]}).encode()
            content = said if status == 200 else b"not now"
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=[0.02], daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}/v1"
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch):
    monkeypatch.setattr(endpoint, "FIRST_PAUSE_S", 0.01)


@pytest.mark.parametrize(
    "text, score",
    [
        ("85", 85.0),
        (" 85.5\n", 85.5),
        ("Score: 85", 85.0),
        ("Score (0-100): 85", 85.0),
        ("85/100", 85.0),
        ("I give 85 out of 100, with 2 remarks", 85.0),
        ("0", 0.0),
        ("100", 100.0),
        ("101", None),
        ("-3", None),
        ("no number", None),
        ("", None),
        ("<think>perhaps 30/100</think> 85/100", 85.0),
        ("<think>perhaps 30/100", None),
        ("30 <think> or 40", None),
        ("9" * 400, None),
        ("85/1000", None),
    ],
)
def test_scores_are_read(text, score):
    assert read_number(text) == score


def test_scores_of_another_range():
    assert read_number("7/10", high=10) == 7.0
    assert read_number("70", high=10) is None


@pytest.mark.parametrize("part", ["9", "9 ", " ", "-", ".", "9.", "/", "out of", "<think>", "a"])
def test_a_score_is_read_in_linear_time(part):
    """10^6 characters, and twice as many take about twice as long."""
    text = part * (1_000_000 // len(part))
    started = time.process_time()
    read_number(text)
    read_number("9" * 200_000)
    assert time.process_time() - started < 5  # quadratic: hours


def ended(content, reason) -> dict:
    return {"message": {"content": content}, "finish_reason": reason}


SPOILT = {
    "null": ended(None, "stop"),
    "null and no reason": ended(None, None),
    "a number": ended(85, "stop"),
    "a list": ended([{"type": "text", "text": "85"}], "stop"),
    "an object": ended({"text": "85"}, "stop"),
    "a boolean": ended(True, "stop"),
    "a reason that is a number": ended("85", 3),
    "a reason that is a list": ended("85", ["stop"]),
    "a message that is text": {"message": "85"},
    "a message that is null": {"message": None},
    "no message": {},
    "a choice that is a list": [],
    "no choices": b'{"choices": []}',
    "choices that are an object": b'{"choices": {"0": {}}}',
    "a list of choices": b"[]",
    "null alone": b"null",
    "not JSON": b"85",
    "bad UTF-8": json.dumps({"choices": [ended("x", "stop")]}).encode().replace(b"x", b"\xff"),
    "a lone surrogate": b'{"choices": [{"message": {"content": "\\ud800"}}]}',
    "deep": b"[" * 100_000,
    "an error": b'{"error": "out of memory"}',
    "too long": b'{"choices": [' + b" " * (2 << 20) + b"]}",
}


@pytest.mark.parametrize("name", SPOILT)
def test_a_bad_answer_is_asked_for_again_and_never_kept(name, tmp_path):
    replies = [SPOILT[name], "85"]
    with serving(Endpoint(lambda body: replies.pop(0))) as url:
        judge = Judge(url, "m", cache=tmp_path / "answers.sqlite")
        assert asyncio.run(judge.score("Good?")) == 85.0
    assert replies == []
    chat = Endpoint(lambda body: SPOILT[name])
    with serving(chat) as url, pytest.raises(ServerError, match=f"judge {url}: 5 bad answers"):
        asyncio.run(Judge(url, "m").score("Good?"))
    assert len(chat.bodies) == 5


def test_an_answer_that_is_cut_off_is_asked_for_with_more_tokens(tmp_path):
    """It holds no score: neither half a number nor one in a thought."""
    chat = Endpoint(lambda body: ended("Score: 85", "stop" if body["max_tokens"] > 8 else "length"))
    with serving(chat) as url:
        assert asyncio.run(Judge(url, "m", max_tokens=2).score("Good?")) == 85.0
    assert [body["max_tokens"] for body in chat.bodies] == [2, 16]


@pytest.mark.parametrize(
    "content, reason",
    [
        ("Score: 8", "length"),
        ("<think>Is it 30?", "length"),
        (None, "length"),
        ("Score: 8", "content_filter"),
        (None, "content_filter"),
        ("", "stop"),
    ],
)
def test_what_is_no_whole_answer_holds_no_score_and_is_not_kept(content, reason, tmp_path):
    chat = Endpoint(lambda body: ended(content, reason))
    with serving(chat) as url:
        judge = Judge(url, "m", max_tokens=2, cache=tmp_path / "answers.sqlite")
        assert [asyncio.run(judge.score("Good?")) for _ in range(2)] == [None, None]
        assert asyncio.run(judge.ask("Good?")) == (content or "")
    tries = [2, 16] if reason == "length" else [2]
    assert [body["max_tokens"] for body in chat.bodies] == tries * 3


def test_more_tokens_than_the_endpoint_gives_are_no_error():
    chat = Endpoint(lambda body: ended("Score: 8", "length"))
    with serving(chat) as url:
        judge = Judge(url, "m", max_tokens=2)
        ask = judge._answer

        async def refusing(client, body):
            if body["max_tokens"] > 2:
                raise ServerError("max_tokens is too large", 400)
            return await ask(client, body)

        judge._answer = refusing
        assert asyncio.run(judge.score("Good?")) is None


def test_a_cache_that_is_none_is_named(tmp_path):
    (tmp_path / "answers.sqlite").write_text("this is no database, but a longer text")
    for path in (tmp_path / "answers.sqlite", tmp_path / "no" / "folder"):
        with pytest.raises(ValueError, match=f"^judge: the cache {path} cannot be used: "):
            Judge("http://127.0.0.1:1/v1", "m", cache=path)


def test_answers_from_before_they_were_checked_are_not_used(tmp_path):
    """Such a cache may hold half numbers, and "" for null."""
    cache = tmp_path / "answers.sqlite"
    with serving(Endpoint()) as url:
        content = [{"type": "text", "text": "Good?"}]
        body = {"model": "m", "messages": [{"role": "user", "content": content}]}
        body |= {"temperature": 0.0, "max_tokens": 16}
        old = blake2b(json.dumps([url, body]).encode(), digest_size=16).hexdigest()
        Judge(url, "m", cache=cache).close()
        with sqlite3.connect(cache) as rows:
            rows.execute("INSERT INTO answers VALUES (?, '8')", (old,))
        assert asyncio.run(Judge(url, "m", cache=cache).score("Good?")) == 85.0


@pytest.mark.parametrize("url", ["", "localhost", "http://u:geheim@x/v1"])
def test_a_bad_address_is_named(url):
    with pytest.raises(ValueError, match="^judge: ") as caught:
        Judge(url, "m")
    assert "geheim" not in str(caught.value)


def test_a_question_carries_its_photo_and_the_key(photos):
    chat = Endpoint(lambda body: "a wren")
    with serving(chat) as url:
        judge = Judge(url + "/", "m", api_key="secret", max_tokens=5)
        assert asyncio.run(judge.ask("Which bird?", [photos[0]])) == "a wren"
    (body,) = chat.bodies
    assert body["model"] == "m" and body["temperature"] == 0 and body["max_tokens"] == 5
    image, text = body["messages"][0]["content"]
    assert image == {"type": "image_url", "image_url": {"url": data_uri(photos[0])}}
    assert text == {"type": "text", "text": "Which bird?"}
    assert chat.headers[0]["Authorization"] == "Bearer secret"


def test_answers_are_kept_across_runs_and_told_apart(photos, tmp_path):
    chat = Endpoint()
    with serving(chat) as url:
        for _ in range(2):
            judge = Judge(url, "m", cache=tmp_path / "answers.sqlite")
            assert asyncio.run(judge.score("Good?", [photos[0]])) == 85.0
            judge.close()
        assert len(chat.bodies) == 1
        judge = Judge(url, "m", cache=tmp_path / "answers.sqlite")
        asyncio.run(judge.score("Good?", [photos[1]]))
        asyncio.run(judge.score("Bad?", [photos[0]]))
        asyncio.run(Judge(url, "n", cache=tmp_path / "answers.sqlite").score("Good?", [photos[0]]))
    assert len(chat.bodies) == 4


def test_what_passes_by_itself_is_waited_for():
    chat = Endpoint(statuses=[503, 500, 429])
    with serving(chat) as url:
        assert asyncio.run(Judge(url, "m").ask("Good?")) == "85"
    assert len(chat.bodies) == 4


def test_a_refused_question_is_an_error_at_once():
    chat = Endpoint(statuses=[400])
    with serving(chat) as url, pytest.raises(ServerError, match="refused a request: 400 not now"):
        asyncio.run(Judge(url, "m").ask("Good?"))
    assert len(chat.bodies) == 1


def test_an_endpoint_that_is_down_is_an_error_after_a_while():
    url = f"http://127.0.0.1:{free_ports(1)[0]}/v1"
    started = time.monotonic()
    with pytest.raises(ServerError, match=rf"judge {url}: no answer in 1 s: ConnectError"):
        asyncio.run(Judge(url, "m", patience_s=1.0).ask("Good?"))
    assert 1 <= time.monotonic() - started < 60


def test_a_reward_asks_about_every_response_at_once(photos):
    """Two calls, each in its own event loop, with no more questions in flight than allowed."""
    chat = Endpoint(
        lambda body: body["messages"][0]["content"][1]["text"].partition("answer ")[2].split()[0]
    )
    rows = [
        {
            "question": "Which bird?",
            "response": f"answer {n * 10 if n < 9 else 'none'}",
            "ground_truth": "wren",
            "images": [photos[0]],
            "group_id": "g",
        }
        for n in range(10)
    ]
    with serving(chat) as url:
        reward = judged(Judge(url, "m", concurrency=3), "{question} {ground_truth} {response}")
        for _ in range(2):
            found = asyncio.run(call_reward(reward, rows))
    # Scores that lack one cannot be compared: the group teaches nothing.
    assert [f["overall"] for f in found] == [0.0] * 10
    assert [f["unreadable"] for f in found] == [0.0] * 9 + [1.0]
    assert chat.most == 3
    texts = {body["messages"][0]["content"][1]["text"] for body in chat.bodies}
    assert "Which bird? wren answer 10" in texts
    # One was asked again, in other words; the second call found all answers in the cache.
    assert len(chat.bodies) == 11
    assert [text for text in texts if "nothing but a number from 0 to 100" in text]


def test_a_reward_whose_judge_is_down_names_its_group(photos):
    judge = Judge(f"http://127.0.0.1:{free_ports(1)[0]}/v1", "m", patience_s=0.1)
    row = {"question": "", "response": "", "ground_truth": "", "images": [], "group_id": "7.x"}
    with pytest.raises(ValueError, match="group 7.x: it raised ServerError.*no answer in 0 s"):
        asyncio.run(call_reward(judged(judge, "{response}"), [row]))


def test_a_part_is_the_scores_of_a_group_or_none_at_all(photos):
    row = {"question": "", "ground_truth": "wren", "images": [photos[0]]}
    rows = [row | {"response": str(number)} for number in (0, 25, 100)]
    chat = Endpoint(lambda body: body["messages"][0]["content"][1]["text"].partition("\n")[0])
    with serving(chat) as url:
        part = judged_part(Judge(url, "m"), "{response}")
        assert asyncio.run(part(rows)) == [0.0, 0.25, 1.0]
        with pytest.raises(PartFailed):
            asyncio.run(part([*rows, row | {"response": "good"}]))
    gone = judged_part(Judge(url, "m", patience_s=0.0), "{response}")
    with pytest.raises(PartFailed, match="no answer in 0 s"):
        asyncio.run(gone(rows))


def test_a_weighted_reward_goes_on_without_a_judge_that_fails(monkeypatch, photos):
    """Its weight goes to the other parts, for the whole group, and the group is counted."""
    monkeypatch.setattr(rewarding, "PATIENCE_S", 0.0)
    responses = ["<answer>wren</answer>", "<answer>gull</answer>"]
    rows = [
        {
            "question": "",
            "ground_truth": "wren",
            "images": [photos[0]],
            "response": r,
            "group_id": 1,
        }
        for r in responses
    ]
    reward = {"format": 0.2, "classification": 0.3, "judge_reasoning": 0.5}
    with serving(Endpoint(lambda body: "80")) as url:
        config = RolloutConfig(reward=reward, judge_url=url, judge_model="m")
        function = rewarding.load_reward(TapoConfig(rollout=config))
        found = asyncio.run(call_reward(function, rows))
    assert [f["overall"] for f in found] == pytest.approx([0.3 + 0.4, 0.4], abs=1e-15)
    assert [(f["accuracy"], f["judge_reasoning"]) for f in found] == [(1, 0.8), (0, 0.8)]
    assert [f["judge_reasoning_left_out"] for f in found] == [0.0, 0.0]
    rows[0]["response"] += " "  # not in the cache
    found = asyncio.run(call_reward(function, rows))
    assert [f["overall"] for f in found] == pytest.approx([0.3 / 0.5, 0.0], abs=1e-15)
    assert [f["judge_reasoning_left_out"] for f in found] == [1.0, 1.0]
    assert all("judge_reasoning" not in f for f in found)


def test_a_judge_that_is_not_there_is_named_at_the_start():
    url = f"http://127.0.0.1:{free_ports(1)[0]}/v1"
    options = {"reward": {"format": 1.0, "judge_reasoning": 1.0}}
    with pytest.raises(ValueError, match="judge_reasoning needs rollout.judge_url and rollout"):
        rewarding.load_reward(TapoConfig(rollout=RolloutConfig(**options)))
    with pytest.raises(ValueError, match=f"rollout.judge_url: judge {url}: no answer in 0 s: Conn"):
        named = RolloutConfig(**options, judge_url=url, judge_model="m")
        rewarding.load_reward(TapoConfig(rollout=named))


@pytest.mark.parametrize(
    ("categories", "values"),
    [
        (["generic", "wrong", "less specific", "less specific", None], [0, 0, 1, 1, 0]),
        (["specific", "more specific", "less specific"], [1, 1, 0]),
        (["abstain", "wrong", None], [1, 0, 0]),
        (["wrong", "wrong", None], [0, 0, 0]),
        (["generic", "generic"], [1, 1]),
    ],
)
def test_the_best_answers_of_a_group_are_rewarded(categories, values):
    assert best_of_rollouts(categories) == values


def test_a_verifier_is_asked_once_about_an_answer_and_again_where_it_rambles():
    said = {
        "dog": "generic",
        "spitz": "<think>generic?</think> Less specific.",
        "cat": "It is not specific but wrong",
        "samoyed": "hm",
    }

    def say(body) -> str:
        question = body["messages"][0]["content"]
        question = question if isinstance(question, str) else question[-1]["text"]
        answer = question.partition("A model answered: ")[2].split("\n")[0]
        assert "samoyed" in question.splitlines()[0]
        return (
            "specific" if answer == "samoyed" and "say one of these." in question else said[answer]
        )

    answers = ["dog", "spitz", "dog", "samoyed", "cat"]
    rows = [{"ground_truth": "samoyed", "response": f"<answer>{a}</answer>"} for a in answers]
    rows.append({"ground_truth": "samoyed", "response": "a samoyed"})
    with serving(chat := Endpoint(say)) as url:
        part = verified_part(Judge(url, "m"), VERIFIER)
        assert asyncio.run(part(rows)) == [0, 0, 0, 1, 0, 0]
        assert len(chat.bodies) == 5  # four answers, one of them twice
        said["samoyed"] = "wrong"
        assert asyncio.run(part([rows[0], rows[1], rows[4]])) == [0, 1, 0]
        with pytest.raises(PartFailed, match="no answer that can be read"):
            said["poodle"] = "<think>specific"
            poodle = {"ground_truth": "samoyed", "response": "<answer>poodle</answer>"}
            asyncio.run(part([rows[0], poodle]))


def test_a_verifier_is_a_part_of_a_reward():
    reward = {"format": 0.1, "best_of_rollouts": 0.9}
    rows = [
        {"ground_truth": "samoyed", "response": r, "group_id": 1}
        for r in ("<think>a</think><answer>dog</answer>", "<answer>cat</answer>")
    ]
    with serving(Endpoint(lambda body: "generic" if "dog" in str(body) else "wrong")) as url:
        config = RolloutConfig(reward=reward, judge_url=url, judge_model="m")
        function = rewarding.load_reward(TapoConfig(rollout=config))
        found = asyncio.run(call_reward(function, rows))
    assert [f["overall"] for f in found] == pytest.approx([1.0, 0.0], abs=1e-15)
    assert [f["best_of_rollouts_left_out"] for f in found] == [0.0, 0.0]
