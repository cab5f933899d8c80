"""Load, save and build policies: plain transformers models, never a subclass of our own."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Protocol

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoTokenizer,
    BaseImageProcessor,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tercet.core.config import ModelConfig
from tercet.core.costs import Shape
from tercet.core.prompts import IMAGE_PAD
from tercet.core.types import PackedBatch, PolicyParts

FAMILIES = sorted(file.stem for file in Path(__file__).with_name("families").glob("*.py"))
"""Supported model types: each is the name of a file in core/families."""

CELL_SIZES = {
    "patch_size": "patch_size",
    "merge_size": "spatial_merge_size",
    "temporal_patch_size": "temporal_patch_size",
}
"""What an image processor and a vision configuration call the sides of patches and tokens."""

IMAGE_TOKENS = ("image", "video", "vision_start", "vision_end")
"""Special tokens that a model's configuration names, as `image_token_id` and so on."""


class Family(Protocol):
    """What every file in core/families offers. Only a family's own file names its models."""

    MODEL: type[PreTrainedModel]
    """Class of its models in transformers."""
    IMAGE_PROCESSOR: type[BaseImageProcessor]
    """Class of its image processor, one that works without torchvision."""
    CHECKPOINT_PREFIXES: tuple[tuple[str, str], ...]
    """Beginnings of parameter names: (in memory, in published checkpoints)."""
    MERGERS: tuple[str, ...]
    """Beginnings of the names that a merger's parameters have in the vision tower."""
    SPECIAL_TOKENS: dict[str, str]
    """Of a tiny model's tokenizer, in the order of their ids: `end_of_text`, `turn_end`,
    `vision_start`, `vision_end`, `image`, `video`, and those that only CHAT_TEMPLATE needs."""
    CHAT_TEMPLATE: str
    """Of a tiny model's tokenizer; renders image items."""
    SERVER_HASHES: bool
    """Whether SGLang takes hashes of photos; else it knows photos by their bytes."""
    TINY_PROCESSOR: dict
    """Options of a tiny model's image processor, where its class has other defaults."""

    def published(self) -> dict[str, PretrainedConfig]:
        """Configurations of the published models, by hub id; only the sizes in them are right."""
        ...

    def shape(self, config: PretrainedConfig) -> Shape:
        """Sizes of a model, for counting operations and bytes."""
        ...

    def resized(self, processor: BaseImageProcessor, height: int, width: int) -> tuple[int, int]:
        """Height and width, in pixels, that the image processor gives a photo."""
        ...

    def text_inputs(self, model: PreTrainedModel, packed: PackedBatch) -> dict:
        """Inputs of the language model for a pack.

        Args:
            model: of this family.
            packed: T tokens on the model's device.

        Returns:
            inputs_embeds [1, T, D], the photos' features in place; position_ids [3, 1, T];
            attention_mask, which holds no mask: shared-prefix attention needs none; what else the
            family's language model takes of the photos.
        """
        ...

    def attention_mask(self, mask: Tensor | None) -> dict[str, Tensor | None] | Tensor | None:
        """What the language model takes as attention_mask, so that it builds none of its own.

        Args:
            mask: [B, 1, queries, keys] bool, True where a query sees a key; None: no mask.
        """
        ...

    def tiny_vision(self, size: int, layers: int, hidden_size: int) -> dict:
        """Vision configuration of a tiny model.

        Args:
            size: width of the vision tower; heads are 32 wide.
            layers: number of blocks.
            hidden_size: D of the language model.
        """
        ...

    def tiny_text(self, hidden_size: int) -> dict:
        """Heads (32 wide) and rotary positions of a tiny model's text configuration.

        Args:
            hidden_size: D of the language model.
        """
        ...


def family_of(config: PretrainedConfig, path: str = "") -> Family:
    """The family of a configuration's model.

    Raises:
        ValueError: another architecture, naming `path` and those that are supported.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model.path {path!r} is a {config.model_type!r} model; "
            f"supported: {', '.join(FAMILIES)}; docs/models.md tells how to add a family"
        )
    return _family(config.model_type)


def _family(name: str) -> Family:
    if name not in FAMILIES:
        raise ValueError(f"architecture must be one of {FAMILIES}, got {name!r}")
    return import_module(f"tercet.core.families.{name}")


def published() -> dict[str, PretrainedConfig]:
    """Configurations of all families' published models, by hub id; only sizes in them are right."""
    families = [_family(name) for name in FAMILIES]
    return {name: config for family in families for name, config in family.published().items()}


def checkpoint_names(
    config: PretrainedConfig, named_weights: Iterable[tuple[str, Tensor]]
) -> Iterator[tuple[str, Tensor]]:
    """Weights, detached, under the names that published checkpoints give them.

    Args:
        config: of the model.
        named_weights: (name in the transformers model, tensor).
    """
    prefixes = family_of(config).CHECKPOINT_PREFIXES
    for name, tensor in named_weights:
        for in_memory, in_checkpoint in prefixes:
            if name.startswith(in_memory):
                name = in_checkpoint + name.removeprefix(in_memory)
                break
        yield name, tensor.detach()


def load_policy(config: ModelConfig, device: str | torch.device = "cpu") -> PolicyParts:
    """Load a model of a supported family from a folder or the hub.

    Args:
        config: path, dtype, pixel limits and frozen parts.
        device: where the parameters go; `meta`: shapes without data.

    Warns where tokenizer and generation_config do not name the end of turn of the chat template.

    Raises:
        ValueError: naming the path, when it cannot be loaded, weights or the image pad are missing,
            the architecture is not supported, or it needs code of its own, which is never run.
    """
    if not config.path:
        raise ValueError("model.path is empty: give the folder or hub id of a model")
    folder, name = Path(config.path), "adapter_config.json"
    has_adapter = (folder / "adapter" / name).exists() and not (folder / "config.json").exists()
    if has_adapter or (folder / name).exists():
        raise ValueError(
            f"model.path {config.path!r} is a LoRA adapter: give the folder of a whole model, such "
            "as a checkpoint of this trainer that has the adapter merged (run.save_lora both)"
        )
    model = _load_model(config.path, config.dtype, torch.device(device))
    tokenizer = _read(config.path, AutoTokenizer)
    pad_id = tokenizer.get_vocab().get(IMAGE_PAD)
    if pad_id != model.config.image_token_id:
        raise ValueError(
            f"model.path {config.path!r}: {IMAGE_PAD} must be token {model.config.image_token_id} "
            f"of the tokenizer, got {pad_id}"
        )
    processor = _read(config.path, family_of(model.config).IMAGE_PROCESSOR)
    _check_cells(model.config, processor, config.path)
    processor.size = _pixel_limits(config, processor)
    freeze(model, vision=config.freeze_vision, merger=config.freeze_merger)
    parts = PolicyParts(model, tokenizer, processor)
    said = _settle_ends(parts, config.path)
    if said and model.device.type != "meta":
        warnings.warn(said, stacklevel=2)
    return parts


def _settle_ends(parts: PolicyParts, path: str) -> str:
    """Make generation_config name every token that ends a response.

    Returns:
        A line that says what was named before, where this is not one end of turn; else empty.
    """
    generation, tokenizer = parts.model.generation_config, parts.tokenizer
    ends, vocabulary = parts.stop_ids, parts.model.config.text_config.vocab_size
    wrong = [i for i in ends if type(i) is not int or not 0 <= i < vocabulary]
    if wrong:
        raise ValueError(
            f"model.path {path!r}: eos_token_id must hold token ids below {vocabulary}, got {wrong}"
        )
    named = generation.eos_token_id
    named = named if isinstance(named, list) else [named]
    if set(named) != set(ends):
        generation.eos_token_id = list(ends)
    if named[:1] == [parts.turn_end] and tokenizer.eos_token_id == parts.turn_end:
        return ""
    first, *of_others = tokenizer.convert_ids_to_tokens(ends)
    in_config = tokenizer.convert_ids_to_tokens([i for i in named if i is not None])
    return (
        f"model.path {path!r}: the chat template ends a turn with {first}, the tokenizer's end is "
        f"{tokenizer.eos_token}, generation_config names {', '.join(in_config) or 'none'}: answers "
        f"to train on end with {first}, sampling stops at {', '.join([first, *of_others])}"
    )


def _load_model(path: str, dtype: str, device: torch.device) -> PreTrainedModel:
    config = _read(path, AutoConfig)
    family = family_of(config, path)
    if "sliding_attention" in getattr(config.text_config, "layer_types", ()):
        raise ValueError(f"model.path {path!r} uses sliding-window attention")
    options = {"dtype": dtype, "attn_implementation": "sdpa", "output_loading_info": True}
    if device.type == "meta":
        options["device_map"] = "meta"
    model, report = _read(path, family.MODEL, **options)
    if report["missing_keys"]:
        missing = ", ".join(sorted(report["missing_keys"]))
        raise ValueError(f"model.path {path!r} lacks the weights {missing}")
    return model.to(device)


def _read(path: str, kind, **options):
    try:
        return kind.from_pretrained(path, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises many kinds on a damaged folder
        said = " ".join(str(error).split())
        if "trust_remote_code" in said:
            said = "it needs code of its own (auto_map), which is never run"
        absent = "" if Path(path).exists() else "no such folder; as a hub id: "
        raise ValueError(f"model.path {path!r} cannot be loaded: {absent}{said}") from error


def _check_cells(config: PretrainedConfig, processor: BaseImageProcessor, path: str) -> None:
    """The image processor cuts photos as the vision tower takes them."""
    vision = config.vision_config
    for ours, theirs in CELL_SIZES.items():
        found, wanted = getattr(processor, ours), getattr(vision, theirs)
        if found != wanted:
            raise ValueError(
                f"model.path {path!r}: the image processor's {ours} is {found}, vision_config's "
                f"{theirs} is {wanted}"
            )


def _pixel_limits(config: ModelConfig, processor: BaseImageProcessor) -> dict[str, int]:
    """Fewest and most pixels of a photo, from the options or else from preprocessor_config.json."""
    # transformers 4.4x wrote the second name of each.
    size, side = processor.size, processor.patch_size * processor.merge_size
    names = ("shortest_edge", "min_pixels"), ("longest_edge", "max_pixels")
    stored = (next(filter(None, (getattr(size, n, None) for n in pair)), None) for pair in names)
    given = (config.min_pixels, config.max_pixels)
    fewest, most = (s if g is None else g for g, s in zip(given, stored, strict=True))
    if not (isinstance(fewest, int) and isinstance(most, int) and 0 < fewest <= most):
        where = "model.min_pixels and model.max_pixels"
        if given == (None, None):
            where = f"model.path {config.path!r}: min_pixels and max_pixels in its image processor"
        raise ValueError(f"{where} must be 0 < min <= max, got {fewest}, {most}")
    if most < side**2:
        raise ValueError(
            f"model.max_pixels must be at least {side**2}, one token of {side} x {side} pixels, "
            f"got {most}"
        )
    return {"shortest_edge": fewest, "longest_edge": most}


def freeze(model: PreTrainedModel, *, vision: bool, merger: bool) -> None:
    """Set whether vision tower and mergers are trained; the language model always is."""
    mergers = family_of(model.config).MERGERS
    for name, parameter in model.model.visual.named_parameters():
        parameter.requires_grad_(not (merger if name.startswith(mergers) else vision))


def build_tiny(
    texts: Iterable[str],
    *,
    architecture: str = FAMILIES[0],
    hidden_size: int = 128,
    layers: int = 3,
    vision_size: int = 96,
    vision_layers: int = 3,
    vocabulary_size: int = 1024,
    image_size: int | None = None,
    initializer_range: float = 0.08,
    tie_word_embeddings: bool = True,
    seed: int = 0,
) -> PolicyParts:
    """Build a small random policy with a byte-level BPE tokenizer of its own.

    Args:
        texts: the tokenizer is trained on them.
        architecture: one of FAMILIES.
        hidden_size: D of the language model; heads are 32 wide, two query heads a key head.
        vision_size: width of the vision tower; heads are 32 wide.
        vocabulary_size: most tokens that the tokenizer may have, special tokens included.
        image_size: pixels a side, about, that the image processor resizes to: the nearest number
            of whole tokens; None: four tokens.

    Returns:
        A float32 policy on the CPU.

    Raises:
        ValueError: the architecture is not one of FAMILIES.
    """
    family = _family(architecture)
    tokenizer = _train_tokenizer(texts, vocabulary_size, family)
    ids = {name: tokenizer.convert_tokens_to_ids(t) for name, t in family.SPECIAL_TOKENS.items()}
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "max_position_embeddings": 32768,
        "initializer_range": initializer_range,
        "bos_token_id": ids["end_of_text"],
        "eos_token_id": ids["turn_end"],
        "pad_token_id": None,
    }
    vision_config = family.tiny_vision(vision_size, vision_layers, hidden_size)
    config = family.MODEL.config_class(
        text_config=text_config | family.tiny_text(hidden_size),
        vision_config=vision_config | {"initializer_range": initializer_range},
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
        **{f"{name}_token_id": ids[name] for name in IMAGE_TOKENS},
    )
    processor = family.IMAGE_PROCESSOR(**family.TINY_PROCESSOR)
    processor.size = _tiny_size(processor, image_size)
    return PolicyParts(_random_model(family, config, seed), tokenizer, processor)


def _tiny_size(processor: BaseImageProcessor, image_size: int | None) -> dict[str, int]:
    side = processor.patch_size * processor.merge_size
    side *= max(1, round(image_size / side)) if image_size else 4
    return {"shortest_edge": side**2 // 2, "longest_edge": side**2}


def _random_model(family: Family, config: PretrainedConfig, seed: int) -> PreTrainedModel:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = family.MODEL._from_config(config, attn_implementation="sdpa")
    end_of_turn, end_of_text = config.text_config.eos_token_id, config.text_config.bos_token_id
    model.generation_config = GenerationConfig(
        eos_token_id=[end_of_turn, end_of_text], pad_token_id=end_of_text
    )
    return model.eval()


def _train_tokenizer(
    texts: Iterable[str], vocabulary_size: int, family: Family
) -> PreTrainedTokenizerFast:
    special_tokens = list(family.SPECIAL_TOKENS.values())
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=special_tokens,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=family.SPECIAL_TOKENS["turn_end"],
        pad_token=family.SPECIAL_TOKENS["end_of_text"],
        additional_special_tokens=special_tokens,
        chat_template=family.CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
