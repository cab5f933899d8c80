"""Forms of the loss in the demo: margins, processes side by side, the table and the decision."""

from __future__ import annotations

import copy
import os
import signal
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from support import tiny

from tercet.core.data.manifest import Manifest
from tercet.core.data.vision import PromptEncoder
from tercet.core.prompts import chat_ids, stage2_text
from tercet.core.types import Photo
from tercet.train.demo import forms
from tercet.train.demo.arms import FORMS, RELEASED, START, Row, read_rows
from tercet.train.demo.jobs import jobs_of
from tercet.train.demo.margins import margins_of
from tercet.train.demo.pool import Task, run_tasks
from tercet.train.demo.scores import Scores
from tercet.train.demo.species import SPECIES, SUPER_CATEGORY, chain_of_thought
from tercet.train.demo.stages import Seed

ROOT = Path(__file__).resolve().parents[1]


def logprob(model, encoder, prompt_ids: list[int], image: str, target: list[int]) -> float:
    """Log-prob of a target behind its prompt, as transformers alone computes it."""
    prompt = encoder(tuple(prompt_ids), (image,))
    ids = torch.cat([prompt.input_ids, torch.tensor(target)])[None]
    photo = prompt.images[0]
    logits = model(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        pixel_values=photo.pixel_values,
        image_grid_thw=photo.grid_thw,
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
    ).logits[0, len(prompt) - 1 : -1]
    return float(logits.log_softmax(-1)[range(len(target)), target].sum())


@torch.no_grad()
def test_margins_are_those_of_plain_forward_passes(photos):
    parts = tiny()
    encoder = PromptEncoder(parts)
    asked = ["Which butterfly?", "What is it?", "What kind?"]
    names = [species.name for species in SPECIES[:3]]
    of = [Photo(*given) for given in zip(photos, [SUPER_CATEGORY] * 3, names, asked, strict=True)]
    nearest = {names[0]: [names[1], names[2]], names[1]: [names[2]], names[2]: [names[0]]}
    manifest = Manifest([], [], {"seen": of[:2], "unseen": of[2:]}, {}, {}, {})
    manifest.look_alikes = {SUPER_CATEGORY: nearest}
    plain, expected = copy.deepcopy(parts.model).eval(), []
    for here, there in ((0, 1), (1, 2), (2, 0)):
        messages = [{"role": "user", "content": f"<image>{stage2_text(asked[here])}"}]
        prompt = chat_ids(parts.tokenizer, messages, 1)
        said = chain_of_thought(SPECIES[here])
        target = [*parts.tokenizer.encode(said, add_special_tokens=False), parts.turn_end]
        on = [logprob(plain, encoder, prompt, photos[i], target) for i in (here, there)]
        expected.append(on[0] - on[1])
    found = margins_of(parts, encoder, manifest, "spelled")
    assert found["seen"] == pytest.approx(np.mean(expected[:2]), abs=1e-3)
    assert found["unseen"] == pytest.approx(expected[2], abs=1e-3)
    assert max(map(abs, expected)) > 0.01


def work(folder: Path, number: int, needs: int | None = None) -> int:
    """What tasks of these tests do: leave a mark, having found another task's."""
    assert needs is None or (folder / str(needs)).exists()
    assert torch.get_num_threads() == 1
    print(f"task {number} in process {os.getpid()}")
    (folder / str(number)).touch()
    return number**2


def test_tasks_run_in_processes_and_wait_for_each_other(tmp_path):
    def task(number: int, needs: int | None = None, after: tuple[str, ...] = ()) -> Task:
        run = partial(work, tmp_path, number, needs)
        return Task(str(number), run, tmp_path / "logs" / f"{number}.log", after)

    def wait_task(name: str, after: tuple[str, ...] = ()) -> Task:
        return Task(name, partial(time.sleep, 60), tmp_path / f"{name}.log", after)

    found: dict[str, object] = {}
    tasks = [task(1, needs=2, after=("2",)), task(2), task(3, needs=99), task(4, after=("3",))]
    tasks.append(wait_task("long"))
    clock = time.monotonic()
    late, failed = run_tasks(
        tasks, 2, lambda done, result: found.update({done.name: result}), limit_s=4
    )
    assert time.monotonic() - clock < 30
    assert found == {"1": 1, "2": 4}
    assert [task.name for task in failed] == ["3"]
    assert late == ["4", "long"]
    logs = {path.stem: path.read_text() for path in (tmp_path / "logs").iterdir()}
    assert "AssertionError" in logs["3"]
    processes = {logs[name].split()[-1] for name in ("1", "2")}
    assert len(processes | {str(os.getpid())}) == 3


def test_a_signal_ends_the_processes_too(tmp_path):
    def end_parent() -> None:
        os.kill(os.getppid(), signal.SIGTERM)
        time.sleep(60)

    def leave_mark() -> None:
        (tmp_path / "process").write_text(str(os.getpid()))
        time.sleep(60)

    named = {"long": leave_mark, "kill": end_parent}
    tasks = [Task(name, run, tmp_path / f"{name}.log") for name, run in named.items()]
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        run_tasks(tasks, 2, lambda *_: None, limit_s=30)
    assert signal.getsignal(signal.SIGTERM) == before
    if (tmp_path / "process").exists():  # else it was ended before it began
        with pytest.raises(ProcessLookupError):
            os.kill(int((tmp_path / "process").read_text()), 0)


def row(seed: int, arm: str, seen: str, margin: float, unseen: str = "0110") -> Row:
    hits = {"seen": seen, "unseen": unseen, "seen_closed": "1", "unseen_closed": "0"}
    margins = {"seen": margin, "unseen": margin + 3}
    return Row(seed, arm, "responses", 60, 80.0, Scores(hits, {}, 0.6, 0.99, 23.0, margins))


GOOD, BAD = "01" * 100, "01" * 60 + "00" * 40


def rows_of_three() -> list[Row]:
    """Two whole seeds and a third; the form of the highest margin is less accurate."""
    rows = []
    for seed in (0, 1):
        rows += [row(seed, START, BAD, 1.0), row(seed, RELEASED, GOOD, 2.0 + seed)]
        rows += [row(seed, "flow, exact", GOOD, 3.0 + seed), row(seed, "flow", BAD, 9.0)]
    return [*rows, row(2, START, BAD, 100.0)]


def test_margin_is_the_mean_over_all_held_out_pictures():
    assert forms.margin(row(0, "flow", "01" * 4, 1.0)) == pytest.approx((8 * 1.0 + 4 * 4.0) / 12)


def test_the_form_with_the_highest_margin_that_loses_no_accuracy_is_best():
    kept = forms.whole_seeds(rows_of_three())
    assert {r.seed for r in kept} == {0, 1}
    assert forms.best_form(kept) == "flow, exact"
    more = [r for r in kept if r.arm != "flow"] + [row(s, "flow", GOOD, 9.0) for s in (0, 1)]
    assert forms.best_form(more) == "flow"
    worse = [row(s, "flow", GOOD, 9.0, unseen="0000") for s in (0, 1)]
    assert forms.best_form([r for r in kept if r.arm != "flow"] + worse) == "flow, exact"
    uneven = [
        row(0, "flow", "01" * 90 + "00" * 10, 9.0),
        row(1, "flow", "11" * 10 + "01" * 90, 9.0),
    ]
    assert forms.best_form([r for r in kept if r.arm != "flow"] + uneven) == "flow, exact"
    assert forms.best_form([r for r in kept if r.arm != RELEASED]) is None


def test_the_report_shows_means_over_whole_seeds():
    text = forms.forms_report(rows_of_three())
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in text.splitlines()}
    share = (204 * 2.5 + 3 * 4) / 204  # margins of 200 seen pictures and 4 unseen ones
    assert lines[RELEASED].startswith(f"| released | {share:.2f} | 5.50 |  | 50.0 | 50.0 |  |  |")
    assert "| +1.00 [+1.00, +1.00] | 50.0 | 50.0 | +0.0 [+0.0, +0.0] |" in lines["flow, exact"]
    assert text.startswith("2 of 3 seeds have every arm: [0, 1].\n")
    assert text.endswith("The highest margin without loss of accuracy has `flow, exact`.")
    alone = forms.forms_table([r for r in rows_of_three() if r.seed == 0])
    assert "| 3.06 | 6.00 | +1.00 | 50.0 |" in alone
    assert forms.forms_report([row(2, START, BAD, 1.0), row(3, "flow", BAD, 1.0)]).startswith("no")


def test_the_figure_shows_every_form(tmp_path):
    forms.draw_forms(forms.whole_seeds(rows_of_three()), tmp_path / "forms.png")
    assert (tmp_path / "forms.png").stat().st_size > 5000


def test_the_docs_show_the_kept_rows():
    rows = read_rows(ROOT / "bench" / "results" / "forms.jsonl")
    text = (ROOT / "docs" / "algorithm.md").read_text(encoding="utf-8")
    assert forms.forms_table(forms.whole_seeds(rows)) in text


def test_arms_are_chosen_by_a_word_or_by_name(tmp_path):
    seeds = [Seed(tmp_path / str(number), number, "spelled") for number in (5, 6)]
    whole = jobs_of(["forms"], seeds)
    assert [job.arm for job in whole] == 2 * [START, *FORMS]
    assert [job.seed.number for job in whole] == [5] * 10 + [6] * 10
    assert [job.arm for job in jobs_of([RELEASED, "flow"], seeds[:1])] == [START, RELEASED, "flow"]
    assert [job.seed.number for job in jobs_of(["controls"], seeds)][:4] == [5, 6, 5, 6]
    for chosen in (["forms", "flow"], ["flow", "flow"], ["TAPO"], []):
        with pytest.raises(ValueError, match="arms must be controls, forms, or different ones"):
            jobs_of(chosen, seeds)
