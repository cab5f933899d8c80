"""The demo's own parts: rewards dealt anew, scores, tables, verdicts, and all stages in small."""

from __future__ import annotations

import ast
import json
import re
from collections import Counter
from dataclasses import asdict
from itertools import count
from pathlib import Path

import numpy as np
import pytest

from tercet.core.data.manifest import Manifest
from tercet.core.rewards import fine_r1_strict
from tercet.core.types import EvalQuestion
from tercet.train.demo import __main__ as commands
from tercet.train.demo import arms, comparison, jobs, scores, stages
from tercet.train.demo.arms import (
    ARMS,
    DAPO,
    LABELS,
    LEDGER,
    PERMUTED,
    RELEASED,
    START,
    TAPO,
    Job,
    Row,
)
from tercet.train.demo.progress import Progress
from tercet.train.demo.scores import ACCURACIES, GREYS, Scores, write_greys
from tercet.train.demo.stages import VERSION, Seed, claim
from tercet.train.evaluation.held_out import Result
from tercet.train.logs.figures import draw_figures

ROOT = Path(__file__).parents[1]


def test_permuted_rewards_keep_what_a_group_earns_and_lose_who_earned_it():
    names = ("least auklet", "crested auklet")
    said = ["least auklet"] * 3 + ["crested auklet"] * 7
    moved = 0
    for group in range(20):
        rows = [
            {
                "response": f"<think>.</think><answer>{name}</answer>",
                "ground_truth": "least auklet",
                "names": names,
                "group_id": f"g{group}",
            }
            for name in said
        ]
        true, dealt = fine_r1_strict(rows), arms.permuted_reward(rows)
        assert Counter(r["overall"] for r in dealt) == Counter(r["overall"] for r in true)
        assert dealt == arms.permuted_reward(rows)
        moved += dealt != true
    assert moved > 15


def made(seen: str, unseen: str = "01", **more) -> Scores:
    hits = {"seen": seen, "unseen": unseen, "seen_closed": "1", "unseen_closed": "0"}
    shares = {"wings": 0.5, "tail": 0.25, "body": 0.75}
    return Scores(hits, shares, **({"grey": 0.6, "form": 0.99, "length": 23.0} | more))


def row(seed: int, arm: str, seen: str, unseen: str = "01", equal: str = "responses") -> Row:
    return Row(seed, arm, equal, 60, 80.0, made(seen, unseen))


def test_attribute_shares_are_those_of_the_one_name_in_the_answer():
    known = ("azure dusky skipper", "azure misty skipper", "amber dusky skipper")

    def answer(output: str) -> Result:
        question = EvalQuestion("x.png", "?", known, known[0], "butterfly", "seen")
        return Result(question, output, {})

    said = [
        f"<think>.</think><answer>{known[0]}</answer>",
        f"<think>.</think><answer>{known[1]}</answer>",
        f"<think>.</think><answer>{known[2]}</answer>",
        f"<think>.</think><answer>{known[0]}, {known[1]}</answer>",
        f"<think>{known[0]}</think>",
    ]
    shares = scores._attribute_shares([answer(text) for text in said], known, "spelled")
    assert shares == pytest.approx({"wings": 2 / 5, "tail": 2 / 5, "body": 3 / 5})


def test_blank_pictures_have_one_grey_each(tmp_path):
    from PIL import Image

    paths = write_greys(tmp_path / "grey", 28)
    for path, grey in zip(paths, GREYS, strict=True):
        assert np.array_equal(np.asarray(Image.open(path)), np.full((28, 28, 3), grey))


def test_difference_is_the_mean_over_seeds_of_paired_differences():
    rows = [
        row(0, START, "0000"), row(0, TAPO, "0111"),
        row(1, START, "1100"), row(1, TAPO, "1010"),
        row(2, START, "0101"),
    ]  # fmt: skip
    value, low, high = comparison.difference(rows, TAPO, START, "seen")
    assert value == pytest.approx(100 * (0.75 + 0.0) / 2)
    assert low < value < high
    assert comparison.difference(rows, DAPO, START, "seen") is None


def test_bootstrap_interval_is_that_of_the_normal_limit():
    """Many seeds and questions with independent hits: the interval's width is known."""
    rng, rows, seeds, questions = np.random.default_rng(1), [], 40, 100
    for seed in range(seeds):
        for arm, share in ((START, 0.3), (TAPO, 0.5)):
            hits = "".join(map(str, (rng.uniform(size=questions) < share).astype(int)))
            rows.append(row(seed, arm, hits))
    value, low, high = comparison.difference(rows, TAPO, START, "seen")
    assert abs(value - 20) < 4
    error = 100 * np.sqrt((0.21 + 0.25) / (seeds * questions))
    # Seeds are drawn as well, which counts the questions' noise twice.
    assert (high - low) / (2 * 1.96 * error) == pytest.approx(np.sqrt(2), rel=0.25)


@pytest.mark.parametrize(
    ("tapo", "unseen", "permuted", "failed"),
    [
        (56, 49, 51, []),
        (54, 50, 50, ["TAPO: seen"]),
        (60, 48, 50, ["TAPO: unseen"]),
        (60, 60, 52, ["TAPO, rewards permuted: seen"]),
    ],
)
def test_verdicts(tapo, unseen, permuted, failed):
    def hits(number):
        return "1" * number + "0" * (100 - number)

    rows = [row(0, START, hits(50), hits(50)), row(0, TAPO, hits(tapo), hits(unseen))]
    rows += [row(0, PERMUTED, hits(permuted), hits(50)), row(0, LABELS, hits(60), hits(40))]
    lines = comparison.verdicts(rows, "opaque")
    fails = [line for line in lines if line.startswith("FAIL")]
    assert len(fails) == len(failed)
    assert all(name in line for name, line in zip(failed, fails, strict=True))
    assert [line for line in lines if line.startswith("not run")] == [
        f"not run  DAPO: {name}, at least {bound}"
        for name, bound in (("seen", "+5"), ("unseen", "-1"))
    ]
    assert lines[-1].startswith("pass  SFT, labels: unseen -10.0")
    assert len(comparison.verdicts(rows, "spelled")) == len(lines) - 1


def test_tables_show_every_number():
    rows = [row(0, TAPO, "0001"), row(1, TAPO, "0111")]
    line = comparison.seed_table(rows[:1]).splitlines()[-1]
    assert line == (
        "| TAPO | 25.0 [5, 70] | 50.0 [9, 91] | 100.0 [21, 100] | 0.0 [0, 79] "
        "| 50.0 | 25.0 | 75.0 | 60.0 | 99.0 | 23.0 | 80 |"
    )
    line = comparison.mean_table(rows).splitlines()[-1]
    assert line.startswith("| TAPO (2) | 50.0 | 50.0 | 100.0 | 0.0 | 50.0 |")
    whole = comparison.report([*rows, row(0, START, "0000"), row(1, START, "0000")], "spelled")
    assert "| TAPO | 2 | +50.0 [" in whole and "pass  TAPO: seen +50.0" in whole
    assert whole.count("as many") == 1
    timed = comparison.report([*rows, row(0, DAPO, "0011", equal="time")], "spelled")
    assert timed.count("as many") == 2 and timed.count("| TAPO (2) |") == 2


def test_the_figure_of_gains_leaves_out_what_was_not_run(tmp_path):
    whole = [row(seed, arm, "0011") for seed in (0, 1) for arm in (START, TAPO, LABELS)]
    comparison.draw_gains({"spelled": whole, "opaque": whole[:2]}, tmp_path / "gains.png")
    assert (tmp_path / "gains.png").stat().st_size > 5000


@pytest.mark.parametrize("names", ["spelled", "opaque"])
def test_the_docs_show_the_kept_rows(names):
    rows = arms.read_rows(ROOT / "bench" / "results" / f"demo_{names}.jsonl")
    text = (ROOT / "docs" / "demo.md").read_text(encoding="utf-8")
    parts = comparison.report(rows, names).split("\n\n")
    assert len(parts) > 7 and not [p for p in parts if not p.startswith("#") and p not in text]


def test_a_ledger_survives_a_line_that_was_cut(tmp_path):
    path = tmp_path / LEDGER
    rows = [row(0, START, "01"), row(0, TAPO, "11")]
    lines = [json.dumps(asdict(one)) + "\n" for one in rows]
    path.write_text(lines[0] + lines[1][:20])
    assert arms.read_rows(path) == rows[:1]
    with path.open("a") as opened:
        opened.write(lines[1])
    assert arms.read_rows(path) == rows


def test_progress_scales_its_plan_by_what_was_run(capsys, monkeypatch):
    clock = iter([0.0, 0.1, 200.1, 280.1])
    monkeypatch.setattr("tercet.train.demo.progress.time.perf_counter", lambda: next(clock))
    progress = Progress([("drawing", 10), ("base", 100), ("TAPO", 300), ("scores", 30)])
    for _ in range(4):
        progress.begin()
    assert capsys.readouterr().out.splitlines() == [
        "[1/4] drawing: about 7 min left of the whole",
        "[2/4] base: about 7 min left of the whole",  # the pictures were there already
        "[3/4] TAPO: about 11 min left of the whole",  # base took 200 s, not 100
        "[4/4] scores: about 21 s left of the whole",
    ]


def test_a_folder_of_other_options_is_refused(tmp_path):
    seed = Seed(tmp_path, 0, "spelled")
    claim(seed, [])
    claim(seed, ["--run.keep_last=5"])
    for other, more, said in (
        (Seed(tmp_path, 1, "spelled"), [], "run.seed 0 -> 1"),
        (Seed(tmp_path, 0, "opaque"), [], "names spelled -> opaque"),
        (Seed(tmp_path, 0, "spelled", "qwen3_vl"), [], "architecture qwen2_5_vl -> qwen3_vl"),
        (seed, ["--loss.kl_coef=0.5"], "loss.kl_coef [0-9.]+ -> 0.5"),
    ):
        with pytest.raises(ValueError, match=f"holds the demo with other options .{said}.: give"):
            claim(other, more)


def test_a_folder_from_before_an_option_was_there_goes_on(tmp_path):
    seed, noted = Seed(tmp_path, 0, "spelled"), tmp_path / "options.json"
    claim(seed, [])
    now = json.loads(noted.read_text())
    del now["options"]["rollout.overlap"]
    noted.write_text(json.dumps(now))
    claim(seed, [])
    assert json.loads(noted.read_text())["options"]["rollout.overlap"] == "off"


def test_overwrite_moves_the_folder_of_other_options_aside(tmp_path):
    out = tmp_path / "demo"
    claim(Seed(out, 0, "spelled"), [])
    claim(Seed(out, 1, "opaque"), ["--run.overwrite=true"])
    then, now = (json.loads((p / "options.json").read_text()) for p in (tmp_path / "demo.1", out))
    assert (then["names"], then["options"]["run.seed"]) == ("spelled", 0)
    assert (now["names"], now["options"]["run.seed"]) == ("opaque", 1)


@pytest.mark.parametrize("then", [{"run.seed": 0}, {"version": VERSION - 1, "names": "spelled"}])
def test_a_folder_of_another_version_is_moved_aside(tmp_path, capsys, then):
    out = tmp_path / "demo"
    out.mkdir()
    (out / "options.json").write_text(json.dumps(then))
    (out / "precious.txt").write_text("kept")
    claim(Seed(out, 0, "spelled"), [])
    assert [p.name for p in out.iterdir()] == ["options.json"]
    assert (tmp_path / "demo.1" / "precious.txt").read_text() == "kept"
    assert re.search(
        r"holds another version of the demo: .* is now in .*demo\.1", capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--seeds", "0", "1", "0"], r"seeds must be different numbers.*\[0, 1, 0\]"),
        (["--seeds"], "seeds"),
        (["--out", "x"], "out is for several seeds"),
        (["--names", "latin"], "names.*latin"),
        (["--architecture", "llama"], "architecture must be one of qwen2_5_vl, .*, got 'llama'"),
        (["--data.path", "x"], "data.path cannot be given"),
    ],
)
def test_what_the_command_refuses(argv, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=said):
        commands.main(argv)
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Everything in small; returns options of train/tapo.py."""
    monkeypatch.setattr(stages, "BASE_PICTURES", {"spelled": 12, "opaque": 12})
    monkeypatch.setattr(stages, "BASE_STEPS", {"spelled": 1, "opaque": 1})
    monkeypatch.setattr(stages, "STAGE1_STEPS", {"spelled": 1, "opaque": 1})
    monkeypatch.setattr(stages, "PICTURES", {"train": 2, "sft": 1, "test": 1})
    monkeypatch.setattr(stages, "SIZE", 28)
    monkeypatch.setattr(scores, "MAX_TOKENS", 6)
    monkeypatch.setattr(scores, "GREYS", range(40, 60, 20))
    monkeypatch.setattr("tercet.train.sft.draw_figures", lambda *_: None)
    monkeypatch.setattr("tercet.train.tapo.draw_figures", lambda *_: None)
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    for name in ("demo_base.yaml", "demo_stage1.yaml", "demo.yaml"):
        text = (stages.RECIPES / name).read_text()
        text = text.replace("samples_per_step: 32", "samples_per_step: 4")
        (recipes / name).write_text(text.partition("run:")[0] + "run: {steps: 1}\n")
    monkeypatch.setattr(stages, "RECIPES", recipes)
    # Nothing is learnt here: groups are trained on whether or not they pass.
    argv = ["--data.shots=2", "--rollout.groups_per_step=2", "--rollout.max_response_tokens=6"]
    return [*argv, "--rollout.on_exhausted=keep_last_round"]


def test_the_notebook_runs_and_shows_its_figures(small, tmp_path, monkeypatch, capsys):
    root = Path(__file__).resolve().parents[1]
    notebook = json.loads((root / "docs" / "demo.ipynb").read_text(encoding="utf-8"))
    assert notebook["nbformat"] == 4
    (tmp_path / "train").symlink_to(root / "train")
    (tmp_path / "docs").mkdir()
    monkeypatch.chdir(tmp_path / "docs")  # where a notebook is opened
    main = commands.main
    monkeypatch.setattr(commands, "main", lambda argv: main([*argv, *small]))
    monkeypatch.setattr("tercet.train.tapo.draw_figures", draw_figures)
    names, shown = {}, []
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [] and cell["execution_count"] is None
            *body, last = ast.parse("".join(cell["source"])).body
            exec(compile(ast.Module(body, []), "cell", "exec"), names)
            if isinstance(last, ast.Expr):
                shown.append(eval(compile(ast.Expression(last.value), "cell", "eval"), names))
            else:
                exec(compile(ast.Module([last], []), "cell", "exec"), names)
    assert [step["step"] for step in names["steps"]] == [1, 2, 3]
    figures = [value for value in shown if value is not None]
    assert [Path(figure.filename).name for figure in figures] == ["curves.png", "samples.png"]
    assert min(figures[0].size + figures[1].size) > 300
    assert f"acceptance {names['steps'][2]['acceptance']:.3f}" in capsys.readouterr().out


def test_a_killed_run_of_all_arms_goes_on_where_it_was(small, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(jobs, "ARMS", (TAPO, LABELS))
    argv = ["--seeds", "5", "--names", "opaque", "--out", str(tmp_path / "out"), *small]
    trained, train = count(), stages._timed

    def killed(run, folder):
        if next(trained) == 3:  # after base, stage 1 and TAPO
            raise KeyboardInterrupt
        return train(run, folder)

    monkeypatch.setattr(stages, "_timed", killed)
    with pytest.raises(KeyboardInterrupt):
        commands.main(argv)
    kept = (tmp_path / "out" / "seed_5" / LEDGER).read_text()
    assert [json.loads(line)["arm"] for line in kept.splitlines()] == [START, TAPO]
    monkeypatch.setattr(stages, "_timed", train)
    commands.main(argv)
    assert (tmp_path / "out" / "seed_5" / LEDGER).read_text().startswith(kept)
    rows = arms.read_rows(tmp_path / "out" / "seed_5" / LEDGER)
    expected = [(START, "responses"), (TAPO, "responses"), (LABELS, "responses")]
    assert [(r.arm, r.equal) for r in rows] == [*expected, (LABELS, "time")]
    assert all(set(r.scores.hits) == set(ACCURACIES) for r in rows)
    assert [len(rows[0].scores.hits[name]) for name in ACCURACIES] == [75, 50, 75, 50]
    assert rows[1].cpu_s > 0 and rows[3].steps >= 1

    def fails(*_):
        raise AssertionError("a finished arm is trained again")

    monkeypatch.setattr(arms, "_train", fails)
    before = capsys.readouterr().out
    commands.main(argv)
    table = (tmp_path / "out" / "table.md").read_text()
    assert table.strip() in before and table.strip() in capsys.readouterr().out


def test_the_demo_of_another_family(small, tmp_path, capsys):
    """Base stage, stage 1, triplets, TAPO and scores of a tiny Qwen3-VL."""
    out = tmp_path / "out"
    commands.main(["--architecture=qwen3_vl", f"--run.out={out}", *small])
    rows = arms.read_rows(out / LEDGER)
    assert [r.arm for r in rows] == [START, TAPO]
    (trained,) = (out / "tapo" / "checkpoints").glob("step_*")
    for folder in (out / "random", trained):
        assert json.loads((folder / "config.json").read_text())["model_type"] == "qwen3_vl"
    side = json.loads((trained / "preprocessor_config.json").read_text())["size"]["longest_edge"]
    assert side == 32**2  # pictures of 28 pixels: one token
    assert (out / "table.md").read_text().strip() in capsys.readouterr().out


def test_every_arm_is_trained_from_the_same_start(small, tmp_path, monkeypatch):
    margins = []
    monkeypatch.setattr(arms, "evaluate", lambda *given: margins.append(given[-1]) or made("01"))
    seed = Seed(tmp_path / "out", 5, "spelled")
    stages.prepare(seed, small)
    rows = [arms.run_arm(Job(seed, arm, "responses"), small) for arm in ARMS]
    assert [r.arm for r in rows] == list(ARMS)
    assert arms.run_arm(Job(seed, "flow, exact", "responses", True), small).arm == "flow, exact"
    assert margins == [False] * len(ARMS) + [True]
    config = (seed.out / "flow_exact" / "config.yaml").read_text()
    for line in ("update_on: anchor", "neg_grad: flow", "entropy_form: exact", "kl_coef: 0.01"):
        assert f"  {line}\n" in config
    nearest = Manifest.read(seed.triplets).nearest["butterfly"]
    assert len(nearest) == 75
    near = [
        len(set(name.split()) - set(others[0].split())) == 1 for name, others in nearest.items()
    ]
    assert stages.near_share(seed) == np.mean(near)
    anchors = set()
    for arm in ARMS:
        config = (seed.out / arms.folder_of(arm) / "config.yaml").read_text()
        assert str(seed.start) in config
        if arm in arms.TAPO_ARMS:
            found = (seed.out / arms.folder_of(arm) / "triplets.json").read_text()
            anchors.add(json.dumps(json.loads(found)["anchors"]))
    assert len(anchors) == 1 and len(json.loads(anchors.pop())) == 150
    labels = json.loads((seed.out / "sft_labels.json").read_text())
    oracle = json.loads((seed.out / "sft_exact_thoughts_oracle.json").read_text())
    assert labels[0]["images"] == oracle[0]["images"]
    answer = labels[0]["messages"][1]["content"]
    assert re.fullmatch("<answer>[a-z ]+</answer>", answer)
    assert oracle[0]["messages"][1]["content"].endswith(answer)


def test_a_run_of_forms_side_by_side_keeps_each_row_and_ends_in_time(tmp_path, monkeypatch, capsys):
    """Two seeds of which one fails and one form of the other takes too long."""
    argv = ["--seeds", "7", "8", "--arms", "released", "flow", "flow, exact"]
    argv += ["--out", str(tmp_path), "--workers", "2", "--minutes", "1"]
    asked = []

    def run_tasks(tasks, workers, done, limit_s):
        asked.append(([task.name for task in tasks], [task.after for task in tasks]))
        assert (workers, limit_s) == (2, 60)
        for task in tasks[:4]:
            if task.name == "seed 8":
                continue
            done(task, None if task.name == "seed 7" else row(7, task.run.args[0].arm, "01"))
        return [tasks[4].name], [tasks[1]]

    (tmp_path / "seed_7").mkdir()
    monkeypatch.setattr(jobs, "run_tasks", run_tasks)
    monkeypatch.setattr(commands, "forms_report", lambda rows: f"{len(rows)} rows")
    with pytest.raises(ValueError, match=r"failed, .*: seed 8 \(.*seed_8.log\)"):
        commands.main(argv)
    names, after = asked[0]
    first = [f"seed 7: {arm}, equal responses" for arm in (START, RELEASED)]
    assert names[:4] == ["seed 7", "seed 8", *first]
    assert after[2:] == [("seed 7",)] * 4 + [("seed 8",)] * 4
    said = capsys.readouterr().out
    assert f"not done: {names[4]}; the same command goes on" in said and "2 rows" in said
    with pytest.raises(ValueError, match="failed"):
        commands.main(argv)
    assert asked[1][0] == [*names[:2], *names[4:]]
