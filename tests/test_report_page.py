"""The report's page in a real browser (headless Chromium), with every other host blocked."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading

import pytest
from report_support import HOSTILE, NAMES, make_run, metrics_of

from tercet.train.page.build import Report
from tercet.train.page.serve import LiveServer

playwright = pytest.importorskip("playwright.sync_api")

BROWSERS = ("chromium", "chromium-browser", "google-chrome")
STEPS = 200
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 390, "height": 844}


@pytest.fixture(scope="module")
def browser():
    path = os.environ.get("TERCET_BROWSER") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if path is None:
        pytest.skip(f"no browser: none of {', '.join(BROWSERS)}, and TERCET_BROWSER is not set")
    blocked = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=path, args=["--no-sandbox", blocked])
        yield started
        started.close()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return make_run(tmp_path_factory.mktemp("runs") / "mine", STEPS, text=HOSTILE)


@pytest.fixture(scope="module")
def file(run):
    path = run / "report.html"
    path.write_text(Report([run], [], 0).page(live=False), encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def opened(browser):
    """Opens a page; afterwards nothing must have been said on its console, nor asked of a host."""
    said, asked, contexts = [], [], []

    def open_page(address: str, viewport=DESKTOP, **options):
        contexts.append(browser.new_context(viewport=viewport, **options))
        page = contexts[-1].new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: said.append(f"error: {error}"))
        page.on("request", lambda request: asked.append(request.url))
        page.goto(address)
        page.wait_for_selector(".js-plotly-plot .scatterlayer path")
        return page

    yield open_page
    for context in contexts:
        context.close()
    assert said == []
    here = re.compile(r"(file|data|blob):|http://127\.0\.0\.1:")
    assert [url for url in asked if not here.match(url)] == []


def cards(page) -> list[str]:
    return page.locator("#cards article h3").all_text_contents()


def select(page, name: str, value: str) -> None:
    page.locator(f"#filters [name={name}]").select_option(value)


def test_two_hundred_steps_open_within_three_seconds(browser, file):
    """Seconds that the page's main thread works, which other processes do not add to."""
    page = browser.new_page()
    session = page.context.new_cdp_session(page)
    session.send("Performance.enable", {"timeDomain": "threadTicks"})
    page.goto(file)
    page.wait_for_selector(".js-plotly-plot .scatterlayer path", timeout=60_000)
    found = {m["name"]: m["value"] for m in session.send("Performance.getMetrics")["metrics"]}
    page.close()
    assert 0.05 < found["TaskDuration"] < 3


def test_a_drawn_point_is_that_of_the_file(opened, file):
    """What the pointer shows at a step, and the points of every curve of a panel."""
    page = opened(file)
    plot = page.locator('.plot[data-title="Reward"]')
    drawn = plot.evaluate("p => p.data.map((t) => [t.meta, t.x, t.y])")
    expected = [metrics_of(step) for step in range(1, STEPS + 1)]
    assert [name for name, _, _ in drawn][:2] == ["reward", "accuracy"]
    for name, x, y in drawn:
        assert x == [line["step"] for line in expected]
        assert y == [line.get(name) for line in expected]
    axis = "p => [p._fullLayout.xaxis.l2p(57) + p._fullLayout._size.l, p._fullLayout._size.t + 30]"
    x, y = plot.evaluate(axis)
    plot.hover(position={"x": x, "y": y})
    page.wait_for_selector(".hoverlayer text")
    shown = " ".join(plot.locator(".hoverlayer text").all_text_contents())
    assert "step 57" in shown and f"reward : {metrics_of(57)['reward']:.4g}" in shown, shown


def test_curves_are_zoomed_hidden_and_smoothed(opened, file):
    page = opened(file)
    plot = page.locator('.plot[data-title="Reward"]')
    box = plot.bounding_box()
    page.mouse.move(box["x"] + 150, box["y"] + 90)
    page.mouse.down()
    page.mouse.move(box["x"] + 300, box["y"] + 95, steps=5)
    page.mouse.up()
    page.wait_for_function(
        """() => { const [a, b] = document.querySelector('.plot[data-title="Reward"]')
                   .layout.xaxis.range ?? [0, 200]; return b - a < 120 }"""
    )
    legend = plot.locator("xpath=../div[@class='legend']/button")
    assert legend.all_text_contents()[:2] == ["reward", "accuracy"]
    legend.nth(1).click()
    visible = plot.evaluate("p => p.data.map((t) => t.visible)")
    assert visible == [True, False, *[True] * (len(visible) - 2)]
    page.locator("#smooth").fill("2")
    assert page.locator("#window").text_content() == "5 steps"
    traces = plot.evaluate("p => p.data.filter((t) => t.meta === 'reward').map((t) => t.y)")
    values = [metrics_of(step)["reward"] for step in range(1, STEPS + 1)]
    assert traces[0] == values
    assert traces[1][50] == pytest.approx(sum(values[48:53]) / 5)
    assert traces[1][0] == pytest.approx(sum(values[:3]) / 3)


def test_filters_show_the_groups_that_they_name(opened, file):
    page = opened(file)
    total = page.locator("#count").text_content()
    assert re.fullmatch(r"(\d+) groups of \1 in this page; 1,000 were logged\.", total)
    for state, right in (("wrong", "0"), ("solved", "4")):
        select(page, "state", state)
        assert cards(page) and all(f"{right} of 4 right" in text for text in cards(page))
        assert all("dropped" in text for text in cards(page))
    select(page, "state", "lost")
    assert all("lost" in text and "0 of 4 right" in text for text in cards(page))
    select(page, "state", "")
    select(page, "step", "77")
    assert cards(page) and all("step 77 " in text for text in cards(page))
    page.locator("#filters [name=text]").fill("no such text")
    assert cards(page) == [] and page.locator("#count").text_content().startswith("0 groups of")
    page.locator("#filters [name=text]").fill("")
    select(page, "step", "")
    before = len(cards(page))
    page.locator("#more").click()
    assert len(cards(page)) == 2 * before


@pytest.mark.parametrize("viewport", [DESKTOP, PHONE], ids=["desktop", "phone"])
def test_a_group_shows_three_photos_with_their_names_side_by_side(opened, file, viewport):
    page = opened(file, viewport, has_touch=viewport == PHONE)
    figures = page.locator("#cards article").first.locator("figure")
    assert figures.count() == 3
    sizes = figures.locator("img").evaluate_all("all => all.map((i) => i.naturalWidth)")
    assert len(sizes) == 3 and all(60 <= width <= 110 for width in sizes)
    names = figures.locator("figcaption").all_text_contents()
    assert [name[:8] for name in names] == ["anchor" + names[0][6:8], "positive", "negative"]
    assert all(name.endswith(tuple(NAMES)) for name in names)
    assert names[0].removeprefix("anchor") == names[1].removeprefix("positive") != names[2][8:]
    boxes = figures.evaluate_all("all => all.map((f) => f.getBoundingClientRect().top)")
    assert len(set(boxes)) == 1
    wide = "() => document.documentElement.scrollWidth"
    assert page.evaluate(wide) <= viewport["width"]


def test_what_the_policy_says_stays_text(opened, file):
    page = opened(file)
    assert page.title() == "mine · Tercet"
    text = page.locator("#cards .text").first
    assert text.text_content().startswith(HOSTILE)
    assert text.locator("script, img").count() == 0


def test_tokens_are_shaded_by_where_the_photo_matters(opened, file):
    """The log-probs differ by a token's place: 0, 1, 2, 3 ...; a colour is full at 3."""
    page = opened(file)
    select(page, "state", "mixed")
    tokens = page.locator("#cards .text").first.locator("span")
    colours = tokens.evaluate_all("all => all.map((t) => t.style.backgroundColor)")
    assert colours[0] == "" and colours[3] == colours[5] == "rgba(0, 114, 178, 0.6)"
    assert colours[1] == "rgba(0, 114, 178, 0.2)"
    tokens.nth(3).click()
    said = page.locator("#token").text_content()
    assert '" bird"' in said and "log π -0.5 · on the negative -3.5" in said
    assert "sampler -0.25" in said
    select(page, "shade", "advantage")
    wrong = page.locator("#cards .response", has_text="✗ wrong").first.locator(".text span").first
    assert wrong.evaluate("t => t.style.backgroundColor") == "rgba(213, 94, 0, 0.15)"
    select(page, "shade", "none")
    colours = tokens.evaluate_all("all => all.map((t) => t.style.backgroundColor)")
    assert set(colours) == {""}


def test_right_and_wrong_follow_accuracy(opened, file):
    page = opened(file)
    for card in page.locator("#cards article").all():
        right = int(re.search(r"(\d) of 4 right", card.locator("h3").text_content())[1])
        marks = card.locator(".facts b").all_text_contents()
        assert marks.count("✓ right") == right and marks.count("✗ wrong") == 4 - right


def test_light_and_dark(opened, file):
    colour = "() => getComputedStyle(document.body).backgroundColor"
    for scheme, expected in (("light", "rgb(245, 245, 243)"), ("dark", "rgb(22, 24, 27)")):
        page = opened(file, color_scheme=scheme)
        assert page.evaluate(colour) == expected
        page.locator("#theme").click()
        assert page.evaluate(colour) != expected
        page.locator("#theme").click()
        assert page.evaluate(colour) == expected


def test_runs_lie_over_each_other_and_their_differences_are_shown(opened, run, tmp_path):
    other = make_run(tmp_path / "other", 30, "--loss.kl_coef=0.5", "--model.path=large")
    path = tmp_path / "both.html"
    path.write_text(Report([run, other], [], 0).page(live=False), encoding="utf-8")
    page = opened(path.as_uri())
    plot = page.locator('.plot[data-title="Loss"]')
    assert plot.evaluate("p => p.data.map((t) => t.name)") == [
        "mine: total",
        "mine: policy gradient",
        "other: total",
        "other: policy gradient",
    ]
    assert plot.evaluate("p => p.data.map((t) => t.y.length)") == [STEPS, STEPS, 30, 30]
    rows = page.locator("#setup table").first.locator("tr").all_text_contents()
    assert "loss.kl_coef0.030.5" in rows
    assert "These runs began from different models" in page.locator("#runs").text_content()
    select(page, "run", "1")
    assert cards(page) and all(text.startswith("other · ") for text in cards(page))


def test_a_page_without_steps_says_so(browser, tmp_path):
    folder = make_run(tmp_path / "new", 0)
    (tmp_path / "new.html").write_text(Report([folder], [], 0).page(live=False), encoding="utf-8")
    page = browser.new_page()
    page.goto((tmp_path / "new.html").as_uri())
    assert page.locator("#panels").text_content() == "No step has been finished yet."
    assert page.locator("#count").text_content() == "No groups were logged."
    page.close()


def test_the_live_page_follows_the_run(opened, tmp_path):
    folder = make_run(tmp_path / "run", 3)
    with LiveServer(Report([folder], [], 0), 0) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        page = opened(server.address)
        page.wait_for_selector("#cards article")
        assert len(cards(page)) == 5 and all("step 3 " in text for text in cards(page))
        page.wait_for_function(
            "() => [...document.querySelectorAll('#cards img')].every((i) => i.naturalWidth > 50)"
        )
        select(page, "step", "1")
        page.wait_for_selector("#cards h3:has-text('step 1 ')")
        with open(folder / "metrics.jsonl", "a") as file:
            file.write(json.dumps(metrics_of(4)) + "\n")
        page.evaluate("news()")
        plot = page.locator('.plot[data-title="Reward"]')
        assert plot.evaluate("p => p.data[0].y.at(-1)") == metrics_of(4)["reward"]
        assert all("step 1 " in text for text in cards(page))  # what was looked at stays
        server.shutdown()
        thread.join()
