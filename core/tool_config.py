"""Options of the commands that do not train: one dataclass each, one docstring per field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import PositiveInt

from tercet.core.config import DataConfig, ModelConfig
from tercet.core.option_types import (
    Device,
    Few,
    FewOrNone,
    PathText,
    PerStep,
    Seconds,
    Seed,
    Share,
    Url,
    Word,
)


@dataclass
class PrepareConfig:
    """Options of train/prepare.py."""

    root: PathText
    """Folder of the data sets; it may also be given first, without --root."""
    out: PathText | None = None
    """Folder that gets manifest.json and stage1.json; None: root."""
    questions: PathText | None = None
    """Folder of the released question files, which say what is seen; None: that is drawn."""
    stage1: PathText | None = None
    """The released stage-1 records; None: stage1.json is not written."""
    on_missing: Literal["error", "skip"] = "error"
    """A photo that is listed but not there ends it, or is left out and counted."""
    seen_fraction: Share = 0.6
    """Share of each data set's sub-categories that is seen, where it is drawn."""
    seed: Seed = 0
    """Seed of that draw."""


@dataclass
class TripletsConfig:
    """Options of train/make_triplets.py."""

    out: PathText
    """Folder that gets triplets.json."""
    data: DataConfig = field(default_factory=DataConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    parquet: PathText | None = None
    """File for the released columns; None: it is not written."""
    sheet: FewOrNone = 24
    """Most triplets on the contact sheet, triplets.png; 0: it is not drawn."""


@dataclass
class CotConfig:
    """Options of train/make_cot.py."""

    data: PathText
    """A triplets.json, whose stage-1 photos are taken, or any photo set."""
    out: PathText
    """Folder that gets stage1.json, the samples, and what the teacher said."""
    direct: bool = False
    """Records of the answer alone, without a teacher."""
    review: bool = False
    """Also write review.html, to look through the samples and correct them."""
    reviewed: PathText | None = None
    """The review.json that review.html saved: stage1.json is written anew; nothing is asked."""
    url: Url | None = None
    """Base address of the teacher's endpoint, ending in /v1; TERCET_API_KEY is its key."""
    teacher: Word | None = None
    """Name of the model that it serves."""
    embedder: Word = "intfloat/e5-large-v2"
    """Text encoder, a folder or hub id; endpoint: the teacher's own /v1/embeddings."""
    concepts: Literal["photo", "label"] = "photo"
    """Candidates come from a photo's descriptions, or are asked for once a sub-category."""
    descriptions: Few = 2
    """Descriptions of a photo under each of the five instructions."""
    cots_per_class: Few = 1
    """Records of a sub-category; from a photo set, also the most photos of one."""
    tries: Few = 16
    """Most samples for each of them."""
    description_tokens: PositiveInt = 256
    """Longest description."""
    concept_tokens: PositiveInt = 1024
    """Longest list of concepts."""
    cot_tokens: PositiveInt = 2048
    """Longest chain of thought."""
    concurrency: Few = 16
    """Most requests in flight."""
    timeout_s: Seconds = 300.0
    """Longest that one answer may take."""
    patience_s: Seconds = 600.0
    """How long a teacher that is down is waited for."""
    on_bad_image: Literal["error", "skip"] = "error"
    """A missing or corrupt photo ends the run, or is left out and counted."""
    seed: Seed = 0
    """Seed of the choice of photos and questions."""


@dataclass
class EvalConfig:
    """Options of train/eval_fgvr.py."""

    data: PathText
    """A triplets.json, or JSON Lines of questions."""
    model: ModelConfig = field(default_factory=ModelConfig)
    prompt: Literal["stage2", "open_world", "closed_world"] = "open_world"
    per_class: PositiveInt | None = None
    """Photos of each sub-category; None: all."""
    max_tokens: PositiveInt = 2048
    """Longest answer."""
    max_rows: PerStep = 256
    """Most answers that are decoded at once."""
    device: Device = "auto"
    """auto: cuda where there is a GPU, else cpu."""
    out: PathText = "eval.json"
    """File for every answer, and the table."""


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
    """Options of several seeds of the demo, beside those of train/tapo.py."""

    seeds: list[Seed] = field(default_factory=list)
    """Seeds that are run beside their controls."""
    out: PathText = "runs/demo_seeds"
    """Folder that gets a folder for each seed."""
