"""Options of the commands that do not train: one dataclass each, one docstring per field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import PositiveInt

from tercet.core.config import DataConfig, ModelConfig
from tercet.core.option_types import (
    Device,
    Few,
    Flags,
    Gpus,
    PathOrEmpty,
    PathText,
    PerStep,
    Seconds,
    Seed,
    TemperatureOrZero,
    Url,
    Word,
)


@dataclass
class TripletsConfig:
    """Options of train/make_triplets.py."""

    out: PathText
    """Folder that gets triplets.json."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parquet: PathText | None = None
    """File for the released columns; None: it is not written."""


@dataclass
class EngineConfig:
    """Where answers are sampled; options as those of the same names in training."""

    engine: Literal["local", "sglang"] = "local"
    """local: in this process. sglang: on SGLang servers, started or already running."""
    sglang_python: PathOrEmpty = ""
    """Python interpreter of the environment with sglang; servers are started with it."""
    server_gpus: list[Gpus] = field(default_factory=lambda: [""])
    """GPUs of each server to start, as `0` or `2,3`; an empty entry: those of this process."""
    sglang_args: Flags = ""
    """Further flags of sglang.launch_server, as on a command line."""
    urls: list[Url] = field(default_factory=list)
    """Addresses of running SGLang servers that serve `model.path`."""
    api_key_file: PathOrEmpty = ""
    """File with the key of the servers; without it the variable TERCET_API_KEY is read."""
    start_timeout_s: Seconds = 600.0
    """Longest that a server may take to load."""
    request_timeout_s: Seconds = 600.0
    """Longest that one answer may take."""
    max_in_flight: PerStep = 256
    """Most requests sent to the servers at once."""
    max_rows: PerStep = 256
    """Most answers that are decoded at once in this process."""


@dataclass
class EvalConfig:
    """Options of train/eval_fgvr.py."""

    questions: list[PathText]
    """JSON Lines of questions as published, or triplets.json of our own; several at once."""
    out: PathText = "eval"
    """Folder for answers, scores and tables; with the same options a killed run goes on there."""
    rescore: PathText | None = None
    """File of answers that are scored; no model is asked, and no photos are needed."""
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: EngineConfig = field(default_factory=EngineConfig)
    name: Word | None = None
    """The model's name in the tables; None: the last part of its path."""
    modes: list[Literal["closed", "open"]] = field(default_factory=lambda: ["closed", "open"])
    """closed: the options are in the prompt. open: they are not."""
    prompt: Literal["released", "stage2"] = "released"
    """Wording of the prompt: that of the released evaluation, or stage 2's (open mode alone)."""
    options: Literal["released"] = "released"
    """Order of the options: as they stand in the file."""
    images: list[PathText] = field(default_factory=list)
    """Folders in which photos are found by the end of their path; none: paths are relative to the
    file of questions."""
    missing: Literal["error", "wrong", "skip"] = "error"
    """Questions whose photo is missing or damaged: an error, wrong answers, or left out."""
    per_class: PositiveInt | None = None
    """Questions about each sub-category of a file, drawn; None: all."""
    trials: Few = 1
    """Answers to each question; with several, tables show mean and standard error."""
    temperature: TemperatureOrZero = 0.0
    """0: greedy."""
    seed: Seed = 0
    """Of sampling."""
    max_tokens: PositiveInt = 2048
    """Longest answer."""
    text_encoder: PathText | None = "google/siglip-base-patch16-256"
    """Folder or hub id of the text encoder of the similarity; None: no similarity."""
    domain_words: Literal["released", "super_category"] = "released"
    """Word for the super-category, and the rule for cars' names: from the photo's path as in the
    released script, or from the super-category."""
    device: Device = "auto"
    """auto: cuda where there is a GPU, else cpu."""


@dataclass
class PlanConfig:
    """Options of train/plan.py, beside those of train/tapo.py."""

    recipe: Word | None = None
    """A file of train/recipes, without .yaml."""
    gpus: Few = 4
    """GPUs that train."""
    gpu: Word = "A6000"
    """Their type, a name of train/fit/roofline.py: H100 for instance."""
    prompt_tokens: PositiveInt = 316
    """Mean, the photo included."""
    photo_tokens: PositiveInt = 256
    """Mean."""
    response_tokens: PositiveInt = 350
    """Mean."""


@dataclass
class SeedsConfig:
    """Options of the demo, beside those of train/tapo.py."""

    seeds: list[Seed] = field(default_factory=list)
    """Seeds that are run beside their controls."""
    names: Literal["spelled", "opaque"] = "spelled"
    """Whether a sub-category's name spells its attributes."""
    out: PathText = "runs/demo_seeds"
    """Folder that gets a folder for each seed."""
