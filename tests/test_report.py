"""The report of runs: what it reads, chooses and counts, and what it says where that fails."""

from __future__ import annotations

import fcntl
import gzip
import http.client
import json
import re
import threading
from pathlib import Path

import pytest
from report_support import HOSTILE, NAMES, make_run, metrics_of

from tercet.train import report
from tercet.train.logs.group_files import step_files
from tercet.train.page import build
from tercet.train.page.build import Report, names_of, script_json
from tercet.train.page.groups import Brief, chosen, confusion, spread_out
from tercet.train.page.runs import read_run
from tercet.train.page.serve import LiveServer

pytestmark = pytest.mark.core


@pytest.fixture(autouse=True)
def no_plotly(monkeypatch):
    """5 MB less to write in every test."""
    monkeypatch.setattr(build, "plotly", lambda: "")


def problems(folder: Path) -> str:
    return "\n".join(read_run(folder, "run", []).problems)


def embedded(page: str) -> dict:
    start = page.index('type="application/json">') + len('type="application/json">')
    return json.loads(page[start : page.index("</script>", start)])


def test_the_command_writes_the_page_beside_the_run(tmp_path, monkeypatch, capsys):
    folder = make_run(tmp_path / "mine", 3)
    monkeypatch.setattr("sys.argv", ["report", str(folder)])
    report.main()
    page = (folder / "report.html").read_text()
    assert capsys.readouterr().out == f"wrote {folder}/report.html: {len(page) / 1e6:.1f} MB\n"
    data = embedded(page)
    (run,) = data["runs"]
    assert run["state"] == "3 of 3 steps" and run["problems"] == []
    assert run["metrics"]["reward"] == [metrics_of(step)["reward"] for step in (1, 2, 3)]
    assert run["groups_logged"] == 15 and run["group_steps"] == [1, 2, 3]
    elsewhere = page.replace("http://www.w3.org/2000/svg", "")  # a name, never fetched
    assert "<script src" not in page and not re.search("https?://", elsewhere)
    titles = {panel["title"]: [s["name"] for s in panel["series"]] for panel in data["panels"]}
    assert titles["Other metrics"] == ["my_score"] and titles["Memory"] == ["peak_mem_gib"]
    assert "kept_length" in titles["Response length and groups kept"]


def test_options_are_read_with_runs_in_front():
    options = report.read(["a", "b", "--out=c.html"])
    assert (options.runs, options.out) == (["a", "b"], "c.html")
    with pytest.raises(ValueError, match="runs"):
        report.read(["--out=c.html"])


def test_a_folder_that_is_no_run_is_named(tmp_path):
    with pytest.raises(ValueError, match=rf"{tmp_path}/no is no run's folder: it has none of met"):
        Report([tmp_path / "no"], [], 0)
    make_run(tmp_path / "demo" / "tapo", 1)
    with pytest.raises(ValueError, match="runs inside it are tapo$"):
        Report([tmp_path / "demo"], [], 0)


def test_a_run_that_is_written_is_told_from_one_that_crashed(tmp_path):
    folder = make_run(tmp_path / "run", 3)
    environment = {"steps of the run": 60}
    (folder / "environment.json").write_text(json.dumps(environment))
    assert read_run(folder, "run", []).state == "ended at step 3 of 60: stopped, or crashed"
    with open(folder / ".lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        assert read_run(folder, "run", []).state == "running, 3 of 60 steps"
    assert read_run(folder, "run", []).state.startswith("ended")
    failed = folder / "failed" / "step_000004"
    failed.mkdir(parents=True)
    (failed / "error.txt").write_text("Traceback ...\nValueError: a photo is gone\n")
    assert "an update failed (step_000004): ValueError: a photo is gone" in problems(folder)


def test_a_run_without_steps_is_a_page(tmp_path):
    folder = make_run(tmp_path / "run", 0)
    data = embedded(Report([folder], [], 0).page(live=False))
    assert data["runs"][0]["state"] == "no step was finished" and data["panels"] == []
    (folder / "metrics.jsonl").unlink()
    data = embedded(Report([folder], [], 0).page(live=False))
    assert data["runs"][0]["state"] == "no step was finished"


def test_an_older_run_shows_what_there_is(tmp_path):
    folder = make_run(tmp_path / "run", 2)
    for file in step_files(folder / "groups").values():
        file.unlink()
    (folder / "environment.json").unlink()
    said = problems(folder)
    assert "no groups were logged" in said and "environment.json is not there" in said
    (folder / "config.yaml").unlink()
    assert "config.yaml is not there" in problems(folder)
    data = embedded(Report([folder], [], 0).page(live=False))
    assert data["runs"][0]["metrics"]["reward"] and data["groups"] == []


def test_damaged_lines_are_left_out(tmp_path):
    folder = make_run(tmp_path / "run", 3)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 4, "rew')
    assert len(read_run(folder, "run", []).steps) == 3 and problems(folder) == ""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    lines = [lines[0], "nonsense", *lines[1:3], "[" * 100_000, '{"step": 5, "reward": "high"}']
    (folder / "metrics.jsonl").write_text("\n".join(lines))
    run = read_run(folder, "run", [])
    assert [step["step"] for step in run.steps] == [1, 2, 3, 5] and "line 2" in run.problems[0]
    assert run.steps[-1] == {"step": 5}


def test_damaged_groups_are_named_and_the_others_shown(tmp_path):
    folder = make_run(tmp_path / "run", 3)
    files = step_files(folder / "groups")
    files[1].write_bytes(files[1].read_bytes()[:100])
    lines = gzip.decompress(files[2].read_bytes()).splitlines()
    files[2].write_bytes(gzip.compress(lines[0] + b'\n{"step": 2, "id": "half"}\n' + lines[1]))
    data = embedded(Report([folder], [], 0).page(live=False))
    said = "\n".join(data["runs"][0]["problems"])
    assert "step_000001.jsonl.gz cannot be read" in said
    assert "step_000002.jsonl.gz, line 2: not a group" in said
    assert {group["step"] for group in data["groups"]} == {2, 3}


def test_lost_photos_are_counted(tmp_path):
    folder = make_run(tmp_path / "run", 3)
    (folder / "photos" / "0.png").unlink()
    (folder / "photos" / "1.png").write_bytes(b"no photo")
    data = embedded(Report([folder], [], 0).page(live=False))
    assert data["lost_photos"].startswith("2 of 6 photos cannot be read any more")
    (folder / "triplets.json").write_text(json.dumps({"root": "photos/..", "names": {}}))
    assert "lost_photos" in embedded(Report([folder], [], 0).page(live=False))


def test_what_a_policy_says_cannot_leave_its_place(tmp_path):
    folder = make_run(tmp_path / "run", 1, text=HOSTILE + "</script>\u2028")
    page = Report([folder], [], 0).page(live=False)
    data = embedded(page)
    assert data["groups"][0]["responses"][0]["text"].startswith(HOSTILE)
    assert HOSTILE not in page and "<img" not in page and "\u2028" not in page
    assert json.loads(script_json(["<&>\u2029", "\ud800"])) == ["<&>\u2029", "?"]


def test_secrets_stay_out_of_the_page(tmp_path):
    """Earlier versions wrote the key of a server among the options."""
    folder = make_run(tmp_path / "run", 1)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("api_key: null", "api_key: sesame"))
    page = Report([folder], [], 0).page(live=False)
    assert "sesame" not in page and "rollout.temperature" in page


def test_a_page_has_a_limit_and_the_steps_are_spread(tmp_path, monkeypatch):
    folder = make_run(tmp_path / "run", 40)
    whole = embedded(Report([folder], [], 0).page(live=False))
    assert len({group["step"] for group in whole["groups"]}) == 40
    data = Report([folder], [], 0).data()
    room = 80_000
    monkeypatch.setattr(build, "MOST_BYTES", len(script_json(data)) + 200_000 + room)
    part = embedded(Report([folder], [], 0).page(live=False))
    used = len(script_json(part["groups"])) + len(script_json(part["photos"]))
    assert room / 2 < used <= room
    shown = sorted({group["step"] for group in part["groups"]})
    assert shown[0] == 1 and shown[-1] == 40 and 3 <= len(shown) <= 20
    assert part["runs"][0]["groups_logged"] == 200


def test_the_groups_of_a_step_are_best_worst_most_disputed_and_one_drawn(tmp_path):
    def brief(name: str, reward: float, spread: float) -> Brief:
        return Brief(1, name, "a", "bird", "wren", reward, reward, spread, 4, ())

    briefs = [brief("low", 0.1, 0.0), brief("high", 1.0, 0.1), brief("torn", 0.5, 0.5)]
    briefs += [brief(f"other{n}", 0.5, 0.2) for n in range(40)]
    found = chosen(briefs, 0)[1]
    assert found[:3] == ["high", "low", "torn"] and len(found) == 4 and found[3].startswith("other")
    assert chosen(briefs[::-1], 0)[1] == found
    assert len({chosen(briefs, seed)[1][3] for seed in range(9)}) > 3


def test_steps_are_spread_out():
    assert spread_out([]) == [] and spread_out([7]) == [7]
    assert spread_out([1, 2, 3, 4, 5]) == [5, 1, 3, 4, 2]
    order = spread_out(range(100))
    assert sorted(order) == [*range(100)] and {99, 0} == {*order[:2]}
    assert all(min(abs(step - one) for one in order[:16]) < 13 for step in range(100))


def test_confusion_counts_wrong_names_by_period(tmp_path):
    folder = make_run(tmp_path / "run", 16)
    logged = Report([folder], [], 0).groups[0]
    found = confusion(logged.briefs)
    assert found["periods"] == [(step, step + 1) for step in range(1, 17, 2)]
    # Group n asks for name n % 3; of 4 responses 2, 4, 0, 3 and 1 are wrong.
    times = {
        name: sum(wrong for n, wrong in enumerate((2, 4, 0, 3, 1)) if n % 3 == k) * 16
        for k, name in enumerate(NAMES)
    }
    pairs = {(pair["truth"], pair["said"]): pair for pair in found["pairs"]}
    assert {pair[0]: entry["total"] for pair, entry in pairs.items()} == {
        name: count for name, count in times.items() if count
    }
    assert pairs[NAMES[0], NAMES[1]]["shares"] == [5 / 8] * 8


def test_a_group_is_lost_where_its_anchor_was_right_before(tmp_path):
    folder = make_run(tmp_path / "run", 2)
    logged = Report([folder], [], 0).groups[0]
    # Groups 1 and 4 have one anchor: the first is all wrong, the other has right answers.
    assert logged.lost() == {(2, "1.1.a1")}


def test_evaluations_are_found(tmp_path):
    folder = make_run(tmp_path / "run", 1)
    for place in (folder / "eval" / "step_000001", tmp_path / "elsewhere"):
        place.mkdir(parents=True)
        (place / "table.csv").write_text("questions,mode,n,closed\nbirds,closed,40,62.5\n")
    run = read_run(folder, "run", [tmp_path / "elsewhere"])
    row = {"questions": "birds", "mode": "closed", "n": "40", "closed": "62.5"}
    assert run.evaluations == [
        {"title": "eval/step_000001", "rows": [row]},
        {"title": "../elsewhere", "rows": [row]},
    ]


def test_runs_are_told_apart_and_differences_listed(tmp_path):
    one = make_run(tmp_path / "a" / "run", 1, "--model.path=small")
    two = make_run(tmp_path / "b" / "run", 2, "--model.path=large", "--loss.kl_coef=0.5")
    assert names_of([one, two]) == ["a/run", "b/run"] and names_of([one]) == ["run"]
    data = Report([one, two], [], 0).data()
    rows = {row["name"]: row["values"] for row in data["differences"]}
    assert rows == {
        "model.path": ["small", "large"],
        "loss.kl_coef": [0.03, 0.5],
        "steps of the run": [1, 2],
    }
    assert data["runs"][1]["changed"] == ["model.path", "loss.kl_coef", "run.out"]


@pytest.fixture
def live(tmp_path):
    with LiveServer(Report([make_run(tmp_path / "run", 2)], [], 0), 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def get(server: LiveServer, path: str, host: str = "127.0.0.1") -> tuple[int, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", server.server_port, timeout=20)
    connection.request("GET", path, headers={"Host": f"{host}:{server.server_port}"})
    reply = connection.getresponse()
    return reply.status, reply.read()


def test_the_live_page_reads_what_is_asked_for(live, tmp_path):
    status, page = get(live, "/")
    assert status == 200 and embedded(page.decode())["live"] is True
    groups = json.loads(get(live, "/groups/0/2")[1])
    assert len(groups) == 5 and {group["step"] for group in groups} == {2}
    status, photo = get(live, f"/photo/{groups[0]['photos']['anchor']}")
    assert status == 200 and photo[:2] == b"\xff\xd8"
    with open(tmp_path / "run" / "metrics.jsonl", "a") as file:
        file.write(json.dumps(metrics_of(3)) + "\n")
    assert json.loads(get(live, "/data.json")[1])["runs"][0]["metrics"]["step"] == [1, 2, 3]


ELSEWHERE = ["/nothing", "/groups/0/9", "/groups/7/1", "/groups/0/x", "/photo/a"]


@pytest.mark.parametrize("path", [*ELSEWHERE, "/photo/../../etc/passwd"])
def test_the_live_page_gives_nothing_else(live, path):
    assert get(live, path)[0] == 404


def test_the_live_page_is_for_this_machine_alone(live):
    assert live.server_address[0] == "127.0.0.1"
    assert get(live, "/", host="elsewhere.example")[0] == 403
