"""Options of the commands that do not train: one dataclass each, one docstring per field."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jsonargparse.typing import PositiveFloat, PositiveInt

from tercet.core.config import DataConfig, ModelConfig
from tercet.core.option_types import (
    Bits,
    Device,
    Few,
    FewOrNone,
    Flags,
    Gpus,
    PathOrEmpty,
    PathText,
    PerStep,
    Seconds,
    Seed,
    Share,
    Temperature,
    TemperatureOrZero,
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
    by_layer: bool = False
    """With data.genus: say for every layer of the embedder how often the nearest sub-category is of
    the same genus. It embeds the anchors again."""


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
class ChatConfig:
    """An OpenAI-compatible chat endpoint that takes images."""

    url: Url | None = None
    """Its address, ending in /v1; None: there is none."""
    model: Word = "default"
    """Name of the model that it serves."""
    api_key_file: PathOrEmpty = ""
    """File with its key; without it the variable TERCET_API_KEY is read."""
    concurrency: PerStep = 16
    """Most questions in flight."""
    timeout_s: Seconds = 300.0
    """Longest that one answer may take."""
    patience_s: Seconds = 600.0
    """Longest wait for an endpoint that is down or refuses for now."""


@dataclass
class EvalConfig:
    """Options of train/eval_fgvr.py."""

    questions: list[PathText] = field(default_factory=list)
    """JSON Lines of questions as published, or triplets.json of our own; several at once."""
    out: PathText = "eval"
    """Folder for answers, scores and tables; with the same options a killed run goes on there."""
    rescore: PathText | None = None
    """File of answers that are scored; no model is asked, and no photos are needed."""
    compare: list[PathText] = field(default_factory=list)
    """Two folders of evaluations of the same questions; their difference is all that is done."""
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: EngineConfig = field(default_factory=EngineConfig)
    chat: ChatConfig = field(default_factory=ChatConfig)
    """A chat endpoint that is asked in place of `model`."""
    judge: ChatConfig = field(default_factory=ChatConfig)
    """A chat endpoint that judges the answers (the Reasoning-Answer protocol)."""
    clip: PathText | None = None
    """Folder or hub id of a CLIP or SigLIP that chooses among the options, in place of a model that
    answers."""
    clip_templates: Literal["one", "imagenet"] = "one"
    """one: "a photo of a NAME", as in the paper. imagenet: the mean over CLIP's 80 templates."""
    name: Word | None = None
    """The model's name in the tables; None: the last part of its path."""
    modes: list[Literal["closed", "open"]] = field(default_factory=lambda: ["closed", "open"])
    """closed: the options are in the prompt. open: they are not."""
    prompt: Literal[
        "released", "stage2", "appendix", "choice", "both", "cot", "step_by_step", "in_context"
    ] = "released"
    """Wording of the prompt (docs/evaluation.md): that of the released evaluation, stage 2's (open
    mode alone), the paper's appendix, ReFine-RFT's three, or the two baselines of Fine-R1."""
    demonstrations: PathText | None = None
    """triplets.json whose training photos are shown with --prompt in_context."""
    options: Literal["released", "shuffled", "rotated"] = "released"
    """Order of the options in a prompt: as they stand in the file, drawn for each question, or
    every question once with the true option at each place."""
    images: list[PathText] = field(default_factory=list)
    """Folders in which photos are found by the end of their path; none: paths are relative to the
    file of questions."""
    missing: Literal["error", "wrong", "skip"] = "error"
    """Questions whose photo is missing or damaged: an error, wrong answers, or left out."""
    leaks: list[PathText] = field(default_factory=list)
    """triplets.json files or stage-1 records whose photos are searched for in the questions."""
    leak_distance: Bits = 8
    """Most bits of 64 in which the perceptual hashes of two copies of a photo may differ."""
    drop_leaks: bool = False
    """Leave questions about such photos out."""
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
class PredictConfig:
    """Options of train/predict.py."""

    photos: list[PathText] = field(default_factory=list)
    """The photos; they may stand before the options, without --photos."""
    model: ModelConfig = field(default_factory=ModelConfig)
    rollout: EngineConfig = field(default_factory=EngineConfig)
    options: list[Word] = field(default_factory=list)
    """Names to choose from; none: the model says what it sees."""
    question: Word = "What is the name of the object in this photo?"
    """What is asked about each photo; name the super-category where it is known."""
    samples: Few = 1
    """Answers to each photo; one is greedy."""
    temperature: Temperature = 1.0
    """Of several samples."""
    seed: Seed = 0
    """Of sampling."""
    max_tokens: PositiveInt = 2048
    """Longest answer."""
    json: bool = False
    """Print a JSON object a line instead of text."""
    device: Device = "auto"
    """auto: cuda where there is a GPU, else cpu."""


@dataclass
class AnalyseConfig:
    """Options of train/analyse.py."""

    photos: PathText
    """Folder of photos by sub-category, or JSON Lines, as for training."""
    out: PathText = "analysis"
    """Folder for figures and tables."""
    model: ModelConfig = field(default_factory=ModelConfig)
    other: PathText | None = None
    """Folder or hub id of a second model, which the first is compared with."""
    names: PathText | None = None
    """JSON or YAML of names by folder; None: the folders'."""
    genera: PathText | None = None
    """CSV with the columns name and genus; None: the first word of names of several words."""
    most_photos: PositiveInt = 200
    """Photos of the plane of right and wrong names, drawn."""
    seed: Seed = 0
    """Of every draw."""
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
    anchors: PositiveInt | None = None
    """Anchors of the data, from which `rollout.groups_per_step auto` follows; None: many."""
    prompt_tokens: PositiveInt = 316
    """Mean, the photo included."""
    photo_tokens: PositiveInt = 256
    """Mean."""
    response_tokens: PositiveInt = 350
    """Mean."""


@dataclass
class DoctorConfig:
    """Options of train/doctor.py, beside those of train/tapo.py."""

    start_server: bool = False
    """Start an SGLang server on the model, ask it whether it is well, and stop it."""
    json: bool = False
    """Print a JSON object a line instead of text."""


@dataclass
class ExportConfig:
    """Options of train/export.py."""

    source: PathText
    """Folder of a checkpoint, or a stage1.json; it may also be given first, without --source."""
    out: PathText
    """Folder to write, new or empty."""
    adapter: bool = False
    """Export the LoRA adapter alone."""
    merged: bool = False
    """Export the whole model, LoRA merged; so it is without --adapter too."""
    base: Word | None = None
    """Hub id of the model that training began with; None: as the run's options tell."""
    evaluation: PathText | None = None
    """Folder of an evaluation (train/eval_fgvr.py) whose tables go into the card."""
    licence: Word | None = None
    """Licence as the hub names it, apache-2.0 for instance; None: the card names the base's."""
    photos: bool = False
    """Copy the photos of stage-1 records too."""
    push: Word | None = None
    """Repository on the Hugging Face hub, USER/NAME, that the folder is uploaded to."""
    private: bool = True
    """Whether a repository that is made is private."""


@dataclass
class SeedsConfig:
    """Options of the demo, beside those of train/tapo.py."""

    seeds: list[Seed] = field(default_factory=list)
    """Seeds that are run beside their controls."""
    arms: list[Word] = field(default_factory=lambda: ["controls"])
    """What is run of each seed: controls, forms (of the loss), or the names of some forms."""
    workers: PositiveInt | None = None
    """Arms at a time, each in a process with one thread; None: one, in this process."""
    minutes: PositiveFloat | None = None
    """End after so long; what is not done is done by the same command later. Needs workers."""
    names: Literal["spelled", "opaque"] = "spelled"
    """Whether a sub-category's name spells its attributes."""
    architecture: Word | None = None
    """Family of the policy, a file of core/families; None: the first of them."""
    out: PathText = "runs/demo_seeds"
    """Folder that gets a folder for each seed."""
