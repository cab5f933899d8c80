"""What transformers 4.5x reads in a policy folder under other names than transformers 5 writes.

With them 4.52 to 4.57 and 5 read a folder alike. 4.5x takes the rotary positions from `rope_theta`
and `rope_scaling`, whether the head is tied from the text configuration, special tokens from
`additional_special_tokens` and pixel limits from `min_pixels` and `max_pixels`; it has no tokenizer
class of the name that transformers 5 writes.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

TOKENIZER_CLASSES = {"TokenizersBackend": "PreTrainedTokenizerFast"}
"""Class names of transformers 5, and the name under which both versions know the class."""


def add_older_names(folder: str | Path) -> None:
    """Add to the JSON files of a saved policy what transformers 4.5x reads.

    Args:
        folder: as transformers 5 has saved it.
    """
    _rewrite(Path(folder) / "config.json", _config)
    _rewrite(Path(folder) / "tokenizer_config.json", _tokenizer)
    _rewrite(Path(folder) / "preprocessor_config.json", _processor)


def _config(config: dict) -> dict:
    text = config["text_config"]
    rope = dict(text["rope_parameters"])
    older = {"rope_theta": rope.pop("rope_theta"), "rope_scaling": rope}
    tied = {"tie_word_embeddings": config["tie_word_embeddings"]}
    return config | {"text_config": text | older | tied}


def _tokenizer(config: dict) -> dict:
    kind = config["tokenizer_class"]
    special = config.pop("extra_special_tokens", [])
    names = "additional_special_tokens" if isinstance(special, list) else "extra_special_tokens"
    return config | {"tokenizer_class": TOKENIZER_CLASSES.get(kind, kind), names: special}


def _processor(config: dict) -> dict:
    size = config["size"]
    return config | {"min_pixels": size["shortest_edge"], "max_pixels": size["longest_edge"]}


def _rewrite(file: Path, change: Callable[[dict], dict]) -> None:
    content = json.loads(file.read_text(encoding="utf-8"))
    text = json.dumps(change(content), indent=2, sort_keys=True, ensure_ascii=False)
    file.write_text(text + "\n", encoding="utf-8")
