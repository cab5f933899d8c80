"""CLIP-style models on closed-world questions: the option whose text is closest to the photo."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch

# Not from the top level, where transformers 5.17 asks for torchvision to import it.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tercet.core.data.embedders import image_inputs
from tercet.train.evaluation.answer_file import Answer
from tercet.train.evaluation.asking import Asked
from tercet.train.evaluation.text_similarity import TextEncoder

Templates = Literal["one", "imagenet"]
ONE = "a photo of a {}"
IMAGENET = Path(__file__).with_name("clip_templates.txt")
"""The 80 templates of CLIP's repository (notebooks/Prompt_Engineering_for_ImageNet.ipynb, MIT)."""
PHOTOS_AT_ONCE, TEXTS_AT_ONCE = 32, 256


def templates_of(kind: Templates) -> list[str]:
    """Templates with `{}` for a name: one, as in the paper, or CLIP's 80 for ImageNet."""
    return [ONE] if kind == "one" else IMAGENET.read_text(encoding="utf-8").splitlines()


class Clip:
    """A model with a text and an image encoder that transformers loads (CLIP, SigLIP), in float32.

    Args:
        path: folder or hub id of the model with its tokenizer and image processor.
        device: where it runs.
        templates: a name's embedding is the mean over them of unit vectors, at unit length again.

    Raises:
        ValueError: naming the path, when it cannot be loaded or has no image encoder.
    """

    def __init__(self, path: str, device: str | torch.device, templates: Sequence[str] = (ONE,)):
        self._path, self._device, self._templates = path, device, templates
        self._texts = TextEncoder(path, device, option="--clip")
        if not hasattr(self._texts.model, "get_image_features"):
            raise ValueError(f"--clip {path!r} has no image encoder")
        try:
            self._processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
        except (OSError, ValueError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            raise ValueError(f"--clip {path!r} cannot be loaded: {reason}") from error
        self._known: dict[str, np.ndarray] = {}

    def answers(self, wanted: Sequence[Asked]) -> Iterator[Answer]:
        """The option with the highest cosine for each question; of equal ones the first."""
        self._add(dict.fromkeys(name for asked in wanted for name in asked.question.options))
        for start in range(0, len(wanted), PHOTOS_AT_ONCE):
            part = wanted[start : start + PHOTOS_AT_ONCE]
            photos = self._photos([asked.question.image for asked in part])
            for asked, photo in zip(part, photos, strict=True):
                q = asked.question
                best = int(np.argmax(np.stack([self._known[name] for name in q.options]) @ photo))
                output = f"<answer>{q.options[best]}</answer>"
                yield Answer(*asked.key[:-1], output, q.path, "stop", asked.order)

    def _add(self, names: Sequence[str]) -> None:
        """Embed the names, several at once in all templates."""
        names, width = list(names), len(self._templates)
        at_once = max(1, TEXTS_AT_ONCE // width)
        for start in range(0, len(names), at_once):
            part = names[start : start + at_once]
            texts = [t.format(name.replace("_", " ")) for name in part for t in self._templates]
            rows = self._texts(texts).reshape(len(part), width, -1).mean(axis=1)
            rows /= np.linalg.norm(rows, axis=1, keepdims=True)
            self._known |= dict(zip(part, rows, strict=True))

    @torch.no_grad()
    def _photos(self, keys: Sequence[str]) -> np.ndarray:
        """[N, D] float32; their length does not matter, as each is compared with names alone."""
        inputs = image_inputs(self._processor, list(keys)).to(self._device)
        found = self._texts.model.get_image_features(**inputs)
        features = found if isinstance(found, torch.Tensor) else found.pooler_output
        if not features.isfinite().all():
            raise ValueError(f"--clip {self._path!r} gives no finite embedding of a photo")
        return features.float().cpu().numpy()
