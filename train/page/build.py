"""The report page: one HTML file with everything in it, or the same page served live.

Curves are drawn by plotly.js, which the plotly package ships and which is written into the page:
hovering, zooming, stacked areas and pictures to save are its work. The rest is plain JavaScript.
Data stand in the page as JSON, and the page shows texts as texts: nothing that a policy has said is
ever read as HTML.
"""

from __future__ import annotations

import base64
import json
import time
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from PIL import Image

from tercet.core.data.decoding import opened, upright_rgb
from tercet.train.logs.metrics import METRICS, MORE_PANELS, PANELS, SECONDS, Metric
from tercet.train.page.groups import LoggedGroups, chosen, confusion, spread_out
from tercet.train.page.runs import Run, read_run

HERE = Path(__file__).parent
SCRIPTS = ("dom.js", "charts.js", "groups.js", "tables.js", "page.js")
PHOTO_PIXELS = 320
"""Longest side of a photo on the page."""
MOST_BYTES = 30_000_000
"""Of a page; groups are left out beyond that."""
OTHER = "Other metrics"


class Report:
    """What the page shows of some runs.

    Args:
        folders: of the runs.
        evaluations: folders of evaluations beside those inside the runs' own, for the first run.
        seed: of the groups that are chosen at random.

    Raises:
        ValueError: a folder is no run's.
    """

    def __init__(self, folders: Sequence[Path], evaluations: Sequence[Path], seed: int):
        self._folders, self._evaluations, self._seed = folders, evaluations, seed
        self.runs = self._read()
        self.groups = [LoggedGroups(run) for run in self.runs]

    def refresh(self) -> None:
        """Read what has been written since."""
        self.runs = self._read()
        for logged, run in zip(self.groups, self.runs, strict=True):
            logged.refresh(run)

    def _read(self) -> list[Run]:
        named = zip(self._folders, names_of(self._folders), strict=True)
        given = [self._evaluations, *[()] * (len(self._folders) - 1)]
        return [read_run(*run, more) for run, more in zip(named, given, strict=True)]

    def data(self) -> dict:
        """All but groups and photos."""
        return {
            "made": time.strftime("%Y-%m-%d %H:%M"),
            "panels": panels(self.runs),
            "runs": [
                _run_data(run, logged) for run, logged in zip(self.runs, self.groups, strict=True)
            ],
            "differences": differences(self.runs),
        }

    def sample(self, room: int) -> tuple[list[dict], dict[str, str]]:
        """Groups for the page and their photos as data URIs, of at most so many bytes together.

        The steps are taken from all over the runs, so that what has no room is missing evenly.
        """
        groups: list[dict] = []
        photos: dict[str, str] = {}
        queues = []
        for number, logged in enumerate(self.groups):
            ids = chosen(logged.briefs, self._seed)
            steps = enumerate(spread_out([*ids]))
            queues += [(rank, number, step, ids[step]) for rank, step in steps]
        for _, number, step, wanted in sorted(queues):
            logged = self.groups[number]
            for group in logged.read(step):
                if group["id"] not in wanted:
                    continue
                group["run"] = number
                fresh = {
                    name: thumbnail(logged.photos[name])
                    for name in group["photos"].values()
                    if name not in photos
                }
                room -= len(script_json(group)) + sum(len(uri) + 30 for uri in fresh.values())
                if room < 0:
                    return groups, photos
                groups.append(group)
                photos |= fresh
        return groups, photos

    def page(self, live: bool) -> str:
        """The page; one that is served gets groups and photos when it shows them."""
        data = self.data() | {"live": live}
        if not live:
            room = MOST_BYTES - len(plotly()) - len(script_json(data)) - 200_000
            data["groups"], data["photos"] = self.sample(room)
            lost = sum(not uri for uri in data["photos"].values())
            if lost:
                of = f"{lost:,} of {len(data['photos']):,} photos"
                data["lost_photos"] = f"{of} cannot be read any more: moved, removed or damaged"
        loader = FileSystemLoader(HERE)
        environment = Environment(loader=loader, autoescape=True, undefined=StrictUndefined)
        read = {name: (HERE / name).read_text(encoding="utf-8") for name in (*SCRIPTS, "page.css")}
        return environment.get_template("page.html").render(
            title=", ".join(run.name for run in self.runs),
            css=read["page.css"],
            plotly=plotly(),
            scripts=[read[name] for name in SCRIPTS],
            data=script_json(data),
        )


def names_of(folders: Sequence[Path]) -> list[str]:
    """What runs are called: as much of the end of each path as tells them apart."""
    parts = [folder.absolute().parts for folder in folders]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-count:]) for p in parts]
        if len(set(names)) == len(names):
            break
    return names


def script_json(value: object) -> str:
    """JSON that can stand in a script element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text.encode("utf-8", errors="replace").decode()


def plotly() -> str:
    """plotly.js, as the package ships it."""
    from plotly.offline import get_plotlyjs  # a second's import, for the page alone

    return get_plotlyjs()


def thumbnail(key: str) -> str:
    """A photo as a small JPEG in a data URI; empty where it cannot be read."""
    content = thumbnail_bytes(key)
    return "data:image/jpeg;base64," + base64.b64encode(content).decode() if content else ""


def thumbnail_bytes(key: str) -> bytes:
    """A photo as a small JPEG; empty where it cannot be read."""
    try:
        with opened(key) as image:
            small = upright_rgb(image)
            small.thumbnail((PHOTO_PIXELS, PHOTO_PIXELS), Image.Resampling.LANCZOS)
            buffer = BytesIO()
            small.save(buffer, "JPEG", quality=82)
    except ValueError:
        return b""
    return buffer.getvalue()


def panels(runs: Sequence[Run]) -> list[dict]:
    """The panels of curves that the runs have data for, in the order of the metrics' table."""
    recorded = {name: None for run in runs for step in run.steps for name in step}
    titles = PANELS | MORE_PANELS
    listed = {metric.name for metric in METRICS}
    others = [
        Metric(name, "a metric of the reward function", panel=OTHER, curve=name)
        for name in recorded
        if name not in listed and name != "step" and not name.startswith(SECONDS)
    ]
    found = []
    for title, right in (titles | {OTHER: ""}).items():
        series = [
            {"name": m.name, "label": m.curve, "meaning": m.meaning, "right": m.right}
            for m in (*METRICS, *others)
            if m.panel == title and m.name in recorded
        ]
        if series:
            found.append({"title": title, "right": right, "series": series})
    return found


def _run_data(run: Run, logged: LoggedGroups) -> dict:
    names = {name: None for step in run.steps for name in step}
    briefs = logged.briefs
    return {
        "name": run.name,
        "folder": str(run.folder),
        "command": run.command,
        "state": run.state,
        "problems": run.problems,
        "metrics": {name: [step.get(name) for step in run.steps] for name in names},
        "phases": [name for name in names if name.startswith(SECONDS)],
        "options": run.options,
        "changed": run.changed,
        "environment": run.environment,
        "group_steps": logged.steps,
        "groups_logged": len(briefs),
        "lost": sorted(logged.lost()),
        "confusion": confusion(briefs),
        "evaluations": run.evaluations,
    }


def differences(runs: Sequence[Run]) -> list[dict]:
    """Options and facts of which not all runs have the same."""
    if len(runs) < 2:
        return []
    facts = [{"model (digest)": run.model} | run.options | run.environment for run in runs]
    names = dict.fromkeys(name for fact in facts for name in fact)
    rows = [{"name": name, "values": [fact.get(name) for fact in facts]} for name in names]
    shown = [row for row in rows if any(value != row["values"][0] for value in row["values"])]
    return [row for row in shown if row["name"] not in ("run.out", "started")]
