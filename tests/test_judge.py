"""The judge against a chat endpoint on this machine: answers, scores, cache, faults."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from tercet.core.data.vision import data_uri
from tercet.core.rewards import call_reward
from tercet.rollout import endpoint
from tercet.rollout.judge import Judge, judged, read_number
from tercet.rollout.server import ServerError, free_ports

pytestmark = pytest.mark.core


class Endpoint:
    """A chat endpoint that answers `say(body)`, after replies with `statuses`."""

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
            message = {"choices": [{"message": {"content": chat.say(body)}}]}
            content = json.dumps(message).encode() if status == 200 else b"not now"
            self.send_response(status)
            self.send_header("content-length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
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
    ],
)
def test_scores_are_read(text, score):
    assert read_number(text) == score


def test_scores_of_another_range():
    assert read_number("7/10", high=10) == 7.0
    assert read_number("70", high=10) is None


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
    chat = Endpoint(lambda body: body["messages"][0]["content"][1]["text"].split()[-1])
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
    assert [f["overall"] for f in found] == [*(n / 10 for n in range(9)), 0.0]
    assert [f["unreadable"] for f in found] == [0.0] * 9 + [1.0]
    assert chat.most == 3
    texts = {body["messages"][0]["content"][1]["text"] for body in chat.bodies}
    assert "Which bird? wren answer 10" in texts
    assert len(chat.bodies) == 10  # the second call found all answers in the cache


def test_a_reward_whose_judge_is_down_names_its_group(photos):
    judge = Judge(f"http://127.0.0.1:{free_ports(1)[0]}/v1", "m", patience_s=0.1)
    row = {"question": "", "response": "", "ground_truth": "", "images": [], "group_id": "7.x"}
    with pytest.raises(ValueError, match="group 7.x: it raised ServerError.*no answer in 0 s"):
        asyncio.run(call_reward(judged(judge, "{response}"), [row]))
