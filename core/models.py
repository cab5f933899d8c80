"""Load, save and build policies: plain transformers models, never a subclass of our own."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from tercet.core.config import ModelConfig
from tercet.core.prompts import IMAGE_PAD
from tercet.core.types import PolicyParts

FAMILIES = sorted(file.stem for file in Path(__file__).with_name("families").glob("*.py"))
"""Model types that are supported: a family's file has its name."""
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    "{% if messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\\n' }}"
    "{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for item in message['content'] %}"
    "{% if item['type'] == 'image' %}{{ '<|vision_start|><|image_pad|><|vision_end|>' }}"
    "{% else %}{{ item['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{{ '<|im_end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def family_of(config: PretrainedConfig, path: str = "") -> ModuleType:
    """The file in core/families that knows a configuration's model.

    Raises:
        ValueError: another architecture, naming `path` and those that are supported.
    """
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"model.path {path!r} is a {config.model_type!r} model; "
            f"supported: {', '.join(FAMILIES)}"
        )
    return import_module(f"tercet.core.families.{config.model_type}")


def published() -> dict[str, PretrainedConfig]:
    """Configurations of every family's published models, by hub id, as far as sizes go."""
    files = [import_module(f"tercet.core.families.{name}") for name in FAMILIES]
    return {name: config for family in files for name, config in family.published().items()}


def checkpoint_names(
    config: PretrainedConfig, named_weights: Iterable[tuple[str, torch.Tensor]]
) -> Iterator[tuple[str, torch.Tensor]]:
    """The same weights, detached, under the names that published checkpoints have for them.

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
    """Load the folder or hub id of a model of a supported family.

    Args:
        config: path, dtype, pixel limits and frozen parts.
        device: where the parameters go; `meta`: shapes without data.

    Raises:
        ValueError: naming the path, when it cannot be loaded or lacks weights or an
            image pad, or its architecture, when it is another one.
    """
    if not config.path:
        raise ValueError("model.path is empty: give the folder or hub id of a model")
    model = _load_model(config.path, config.dtype, torch.device(device))
    tokenizer = _read(config.path, AutoTokenizer)
    pad_id = tokenizer.get_vocab().get(IMAGE_PAD)
    if pad_id != model.config.image_token_id:
        raise ValueError(
            f"model.path {config.path!r}: {IMAGE_PAD} must be token {model.config.image_token_id} "
            f"of the tokenizer, got {pad_id}"
        )
    processor = _read(config.path, family_of(model.config).IMAGE_PROCESSOR)
    processor.size = _pixel_limits(config, processor.size)
    freeze(model, vision=config.freeze_vision, merger=config.freeze_merger)
    return PolicyParts(model, tokenizer, processor)


def _load_model(path: str, dtype: str, device: torch.device) -> PreTrainedModel:
    config = _read(path, AutoConfig)
    family = family_of(config, path)
    if "sliding_attention" in config.text_config.layer_types:
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
        return kind.from_pretrained(path, **options)
    except Exception as error:  # transformers raises many kinds on a damaged folder
        absent = "" if Path(path).exists() else "no such folder; as a hub id: "
        raise ValueError(f"model.path {path!r} cannot be loaded: {absent}{error}") from error


def _pixel_limits(config: ModelConfig, size) -> dict[str, int]:
    fewest = size["shortest_edge"] if config.min_pixels is None else config.min_pixels
    most = size["longest_edge"] if config.max_pixels is None else config.max_pixels
    if not (fewest and most and 0 < fewest <= most):
        raise ValueError(
            f"model.min_pixels and model.max_pixels must be 0 < min <= max, got {fewest}, {most}"
        )
    return {"shortest_edge": fewest, "longest_edge": most}


def freeze(model: PreTrainedModel, *, vision: bool, merger: bool) -> None:
    """Set which of vision tower and merger are trained; the language model always is."""
    for name, parameter in model.model.visual.named_parameters():
        parameter.requires_grad_(not (merger if name.startswith("merger.") else vision))


def build_tiny(
    texts: Iterable[str],
    *,
    architecture: str = FAMILIES[0],
    hidden_size: int = 128,
    layers: int = 3,
    vision_size: int = 96,
    vision_layers: int = 3,
    vocabulary_size: int = 1024,
    image_size: int = 112,
    initializer_range: float = 0.08,
    tie_word_embeddings: bool = True,
    seed: int = 0,
) -> PolicyParts:
    """Build a small random policy with a byte-level BPE tokenizer of its own.

    Args:
        texts: what the tokenizer is trained on.
        architecture: one of FAMILIES.
        hidden_size: D of the language model; heads are 32 wide, two query heads a key head.
        vision_size: width of the vision tower; heads are 32 wide.
        vocabulary_size: most tokens of the tokenizer, special tokens included.
        image_size: pixels a side that the image processor resizes to, about.

    Returns:
        A float32 policy on the CPU.

    Raises:
        ValueError: another architecture.
    """
    if architecture not in FAMILIES:
        raise ValueError(f"architecture must be one of {FAMILIES}, got {architecture!r}")
    family = import_module(f"tercet.core.families.{architecture}")
    tokenizer = _train_tokenizer(texts, vocabulary_size)
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in SPECIAL_TOKENS}
    text_config = {
        "vocab_size": len(tokenizer),
        "hidden_size": hidden_size,
        "intermediate_size": 3 * hidden_size,
        "num_hidden_layers": layers,
        "max_position_embeddings": 32768,
        "initializer_range": initializer_range,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "pad_token_id": None,
    }
    vision = family.tiny_vision(vision_size, vision_layers, hidden_size)
    config = family.MODEL.config_class(
        text_config=text_config | family.tiny_text(hidden_size),
        vision_config=vision | {"initializer_range": initializer_range},
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=tie_word_embeddings,
        initializer_range=initializer_range,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = family.MODEL._from_config(config, attn_implementation="sdpa")
    model.generation_config = GenerationConfig(
        eos_token_id=[ids["<|im_end|>"], ids["<|endoftext|>"]], pad_token_id=ids["<|endoftext|>"]
    )
    limits = {"shortest_edge": image_size**2 // 2, "longest_edge": image_size**2}
    return PolicyParts(model.eval(), tokenizer, family.IMAGE_PROCESSOR(size=limits))


def _train_tokenizer(texts: Iterable[str], vocabulary_size: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=list(SPECIAL_TOKENS),
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
