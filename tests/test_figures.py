import itertools
import json

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from PIL import Image

from tercet.train.logs import figures

pytestmark = pytest.mark.core


@pytest.fixture
def drawn(monkeypatch):
    """The figures that were saved."""
    kept, save = [], figures._save

    def keep(figure, png):
        save(figure, png)
        kept.append(figure)

    monkeypatch.setattr(figures, "_save", keep)
    return kept


def write_metrics(path, steps):
    rows = []
    for step in range(steps):
        row = {"step": step, "reward": 0.4 + step / 100, "accuracy": 0.3, "kl": 0.02}
        row |= {"entropy": 1.5, "loss": -0.01 * step, "lr": 1e-6, "response_length": 300.0 + step}
        row |= {"acceptance": 0.6, "clip_frac_high": 0.01, "groups": 4.0}
        if step != 1:
            row["grad_norm"] = 1.0 + step
        row |= {"seconds_generate": 5.0, "seconds_reward": 0.25, "seconds_update": 2.0}
        rows.append(row)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rows


def assert_no_text_overlaps(figure):
    FigureCanvasAgg(figure).draw()
    renderer = figure.canvas.get_renderer()
    texts = list(figure.texts)
    for axis in (axis for axis in figure.axes if axis.axison):
        legend = axis.get_legend()
        texts += [axis.title, axis.xaxis.label, axis.yaxis.label]
        for side in (axis.xaxis, axis.yaxis):
            low, high = sorted(side.get_view_interval())
            ticks = [tick for tick in side.get_major_ticks() if low <= tick.get_loc() <= high]
            texts += [label for tick in ticks for label in (tick.label1, tick.label2)]
        texts += legend.get_texts() if legend else []
    boxes = [
        (text.get_text(), text.get_window_extent(renderer).padded(-1))
        for text in texts
        if text.get_visible() and text.get_text()
    ]
    assert len(boxes) > 10
    for (text, box), (other, other_box) in itertools.combinations(boxes, 2):
        assert text == other or not box.overlaps(other_box), (text, other)


@pytest.mark.parametrize("steps", [1, 70])
def test_curves_show_what_the_file_says(tmp_path, drawn, steps):
    rows = write_metrics(tmp_path / "metrics.jsonl", steps)
    figures.draw_curves(tmp_path / "metrics.jsonl", tmp_path / "plots" / "curves.png")
    assert Image.open(tmp_path / "plots" / "curves.png").size[0] > 1500
    axes = {axis.get_title(): axis for axis in drawn[0].axes if axis.get_title()}
    assert list(axes) == [*figures.PANELS, "Seconds a step"]
    reward = axes["Reward"].get_lines()[0]
    assert reward.get_xdata().tolist() == list(range(steps))
    assert reward.get_ydata().tolist() == [row["reward"] for row in rows]
    norm = axes["Gradient norm and learning rate"].get_lines()[0]
    assert norm.get_xdata().tolist() == [step for step in range(steps) if step != 1]
    labels = [text.get_text() for text in axes["Seconds a step"].get_legend().get_texts()]
    assert labels == ["generate", "reward", "update"]
    seconds = axes["Seconds a step"]
    if steps == 1:
        assert {bar.get_height() for bar in seconds.patches} == {5.0, 0.25, 2.0}
        assert max(bar.get_y() + bar.get_height() for bar in seconds.patches) == 7.25
        assert reward.get_marker() == "o"
    else:
        assert seconds.dataLim.y1 == 7.25
        mean = axes["Reward"].get_lines()[1].get_ydata()
        assert mean[50] == pytest.approx(np.mean([rows[i]["reward"] for i in range(48, 53)]))
        assert mean[0] == pytest.approx(np.mean([rows[i]["reward"] for i in range(3)]))
    assert_no_text_overlaps(drawn[0])


def test_only_panels_with_data_are_drawn(tmp_path, drawn):
    (tmp_path / "m.jsonl").write_text('{"step": 0, "lr": 0.1}\n{"step": 1, "lr": 0.0}\n')
    figures.draw_curves(tmp_path / "m.jsonl", tmp_path / "c.png")
    titles = [axis.get_title() for axis in drawn[0].axes if axis.get_title()]
    assert titles == ["Gradient norm and learning rate"]


@pytest.mark.parametrize(
    "text, problem",
    [
        ("", "holds no step"),
        ('{"reward": 1}\n{"step": 0}\n', "line 1: not a JSON object with a step"),
        ('{"step": 0\n', "holds no step"),  # an end that was cut off
        ('{"step": 0, "groups": 4}\n', "none of its metrics has a panel"),
    ],
)
def test_a_file_without_curves_is_named(tmp_path, text, problem):
    (tmp_path / "m.jsonl").write_text(text)
    with pytest.raises(ValueError, match=rf"m\.jsonl.*{problem}"):
        figures.draw_curves(tmp_path / "m.jsonl", tmp_path / "c.png")
    assert not (tmp_path / "c.png").exists()


def a_row(**changes):
    def response(role, correct, text):
        reward = 1.0 if correct else 0.1
        return {"role": role, "text": text, "correct": correct, "reward": reward, "advantage": -0.5}

    long = "<think>" + "a pale stripe over the eye " * 60 + "</think><answer>least auklet</answer>"
    row = {
        "anchor": Image.new("RGB", (400, 300), "teal"),
        "positive": Image.new("L", (30, 400), 99),
        "negative": Image.new("RGBA", (500, 10), "red"),
        "question": "Which bird costs $5^$?",
        "truth": "least auklet",
        "responses": [
            response("anchor", True, long),
            response("anchor", False, "<answer>\ncrested\tauklet\n</answer>"),
            *[response("positive", i < 2, "") for i in range(5)],
        ],
    }
    return row | changes


def test_samples_show_what_was_said(tmp_path, drawn):
    name = "a parakeet auklet whose name is far too long for its photo"
    unjudged = [response | {"correct": None} for response in a_row()["responses"][1:2] * 4]
    rows = [a_row(), a_row(truth=name, responses=[]), a_row(question="What?", responses=unjudged)]
    figures.draw_samples(rows, tmp_path / "samples.png")
    assert Image.open(tmp_path / "samples.png").mode == "RGBA"
    texts = [text.get_text() for text in drawn[0].texts]
    colours = {text.get_text(): text.get_color() for text in drawn[0].texts}
    assert texts.count("Q  Which bird costs $5^$?") == 2
    assert f"A  {name}" in texts and texts.count("a parakeet auklet whose…") == 2
    assert colours["✔  on the anchor photo: reward 1.00, advantage -0.50"] == "#1a7f37"
    assert colours["✘  on the anchor photo: reward 0.10, advantage -0.50"] == "#c62828"
    assert colours["○  on the anchor photo: reward 0.10, advantage -0.50"] == "#333333"
    assert "   … 4 responses on the anchor photo" in texts
    assert "   <answer> crested auklet </answer>" in texts
    (end,) = [text for text in texts if text.endswith("<answer>least auklet</answer>")]
    start = texts.index(next(text for text in texts if text.startswith("   <think>a pale")))
    assert texts.index(end) - start == 2  # three lines of a text of fourteen
    assert texts.count("   (empty)") == figures.PER_ROLE
    assert "   … 5 responses on the positive photo, 2 of them correct" in texts
    assert max(map(len, texts)) <= figures.TEXT_COLUMNS
    assert len([axis for axis in drawn[0].axes if axis.images]) == 9
    assert_no_text_overlaps(drawn[0])
    width, height = drawn[0].get_size_inches() * drawn[0].dpi
    renderer = drawn[0].canvas.get_renderer()
    for text in drawn[0].texts:
        box = text.get_window_extent(renderer)
        assert box.x0 >= 0 and box.y0 >= 0 and box.x1 <= width and box.y1 <= height


def test_samples_need_a_row_and_leave_the_photos_as_they_are(tmp_path):
    with pytest.raises(ValueError, match="no triplet"):
        figures.draw_samples([], tmp_path / "s.png")
    row = a_row()
    figures.draw_samples([row], tmp_path / "s.png")
    assert row["anchor"].size == (400, 300)
