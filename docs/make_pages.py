"""Writes docs/options.md from the docstrings of the options; and what mkdocs cannot do by itself.

    python docs/make_pages.py

mkdocs calls `on_files` and `on_page_markdown`: figures of the benchmarks and CONTRIBUTING.md lie
outside of docs/, and formulas become MathML, which browsers show without a script.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import get_type_hints

ROOT = Path(__file__).resolve().parents[1]
OPTIONS = Path(__file__).with_name("options.md")
FIGURES, CONTRIBUTING = "bench/results", "CONTRIBUTING.md"
CODE_OR_MATH = re.compile(r"^```math\n(.*?)^```$|^```.*?^```$|`[^`\n]*`|\$([^$]+)\$", re.S | re.M)
"""A formula on its own, other code, or a formula within a line."""
INTRODUCTION = """# Every option

Written by `docs/make_pages.py` from the docstrings in core/; do not edit. Options are given as
`--loss.kl_coef 0.02`, or in a YAML file under the same names ([training.md](training.md) has the
rules). The defaults of train/tapo.py are those of the preset `tercet`; another one (`--run.preset`)
changes some: core/presets.py lists them.
"""


def meanings(kind: type) -> dict[str, str]:
    """The docstring of each field of a dataclass, inherited ones included, on one line each."""
    found: dict[str, str] = {}
    for base in reversed(kind.__mro__[:-1]):
        (tree,) = ast.parse(textwrap.dedent(inspect.getsource(base))).body
        for field, after in zip(tree.body, [*tree.body[1:], None], strict=True):
            is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
            if isinstance(field, ast.AnnAssign) and is_text:
                found[field.target.id] = " ".join(after.value.value.split())
    return found


def _default(field, prefix: str) -> str:
    from tercet.core.presets import PRESETS

    value = field.default_factory() if field.default is MISSING else field.default
    value = PRESETS["tercet"].get(f"{prefix}{field.name}", value)
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value).replace("'", "") or "empty"


def rows(kind: type, prefix: str = "") -> Iterator[str]:
    """A row of a table for each option of a dataclass, without those of its sections."""
    from tercet.core.option_types import PathText, allowed

    said, hints = meanings(kind), get_type_hints(kind)
    for field in fields(kind):
        if is_dataclass(hints[field.name]):
            continue
        is_needed = field.default is MISSING and field.default_factory is MISSING
        default = "" if is_needed else f"`{_default(field, prefix)}`"
        words = allowed(hints[field.name]).replace(PathText.__doc__, "a path")
        meaning = re.sub(r"\bNone\b", "null", said.get(field.name, ""))
        text = " | ".join(cell.replace("|", "\\|") for cell in (words, default, meaning))
        yield f"| `--{prefix}{field.name}` | {' '.join(text.split())} |"


def table(title: str, kind: type, prefix: str = "") -> str:
    """A heading, and the options of a dataclass below it."""
    head = f"## {title}\n\n| option | allowed | default | meaning |\n| --- | --- | --- | --- |\n"
    return head + "\n".join(rows(kind, prefix)) + "\n"


def options_page() -> str:
    """The text of docs/options.md."""
    from tercet.core import config, log_config, tool_config
    from tercet.core.parallel_config import ParallelConfig
    from tercet.core.rollout_config import RolloutConfig

    parts = [INTRODUCTION]
    for name, kind, prefix in (
        ("train/tapo.py: data", config.DataConfig, "data."),
        ("train/tapo.py and train/sft.py: model", config.ModelConfig, "model."),
        ("train/tapo.py: rollout", RolloutConfig, "rollout."),
        ("train/tapo.py: loss", config.LossConfig, "loss."),
        ("train/tapo.py: optim", config.TapoOptimConfig, "optim."),
        ("train/tapo.py and train/sft.py: parallel", ParallelConfig, "parallel."),
        ("train/tapo.py: run", config.TapoRunConfig, "run."),
        ("train/sft.py: data", config.SftDataConfig, "data."),
        ("train/sft.py: optim", config.SftOptimConfig, "optim."),
        ("train/sft.py: run", config.SftRunConfig, "run."),
        ("train/doctor.py", tool_config.DoctorConfig, ""),
        ("train/plan.py", tool_config.PlanConfig, ""),
        ("train/prepare.py", tool_config.PrepareConfig, ""),
        ("train/make_triplets.py", tool_config.TripletsConfig, ""),
        ("train/make_cot.py", tool_config.CotConfig, ""),
        ("train/eval_fgvr.py", tool_config.EvalConfig, ""),
        ("train/eval_fgvr.py: an endpoint, also as judge", tool_config.ChatConfig, "chat."),
        ("train/eval_fgvr.py and train/predict.py: rollout", tool_config.EngineConfig, "rollout."),
        ("train/predict.py", tool_config.PredictConfig, ""),
        ("train/analyse.py", tool_config.AnalyseConfig, ""),
        ("train/report.py", log_config.ReportConfig, ""),
        ("train/export.py", tool_config.ExportConfig, ""),
    ):
        parts.append(table(name, kind, prefix))
    return "\n".join(parts)


def on_files(files, config):
    """Add the figures of the benchmarks to the site."""
    from mkdocs.structure.files import File

    for figure in sorted((ROOT / FIGURES).glob("*.png")):
        place = f"figures/{figure.name}"
        files.append(File.generated(config, place, abs_src_path=str(figure)))
    text = (ROOT / CONTRIBUTING).read_text(encoding="utf-8")
    files.append(File.generated(config, CONTRIBUTING, content=text.replace("](docs/", "](")))
    return files


def on_page_markdown(markdown: str, page, config, files) -> str:
    """Let links to those files lead to their place in the site, and set formulas."""
    markdown = markdown.replace(f"](../{FIGURES}/", "](figures/")
    return CODE_OR_MATH.sub(_formula, markdown.replace(f"](../{CONTRIBUTING}", f"]({CONTRIBUTING}"))


def _formula(found: re.Match) -> str:
    """MathML of a formula; what is none stays as it is."""
    from latex2mathml.converter import convert

    block, within = found.groups()
    if block is None:
        return found[0] if within is None else convert(within)
    return convert(re.sub(r"\\tag\{(\d+)\}", r"\\qquad (\1)", block), display="block")


if __name__ == "__main__":
    OPTIONS.write_text(options_page(), encoding="utf-8")
