"""Image embedders: they decide which sub-categories look alike."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import AutoModel, BaseImageProcessor, PreTrainedModel

# Not from the top level, where transformers 5.17 asks for torchvision to import it.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tercet.core.data.vision import load_image
from tercet.core.types import PolicyParts

TOWER_IMAGES_AT_ONCE = 4
FOLDER_IMAGES_AT_ONCE = 32


def mean(tokens: Tensor) -> Tensor:
    """[tokens, D] to their mean, [D]."""
    return tokens.mean(dim=0)


def extremes(tokens: Tensor) -> Tensor:
    """[tokens, D] to the largest and the smallest value of each feature, [2 D].

    A small part of the photo shows in them, which a mean would lose.
    """
    return torch.cat([tokens.amax(dim=0), tokens.amin(dim=0)])


POOLS = {"policy": mean, "policy_extremes": extremes}
"""How the vision tower's tokens of a photo become its embedding, by name of the embedder."""


def embedder(
    name: str, policy: Callable[[], PolicyParts], device: str | torch.device = "cpu"
) -> Callable[[list[str]], Tensor]:
    """The embedder that `data.embedder` names; its model is loaded when it is first called.

    Args:
        name: "policy" or "policy_extremes" for the policy's own vision tower (see POOLS); else
            folder or hub id of an image encoder.
        policy: loads the policy's parts; called for its own tower only.
        device: where an image encoder runs.

    Returns:
        A function from image keys to embeddings [N, D] float32 on the CPU.
    """

    def embed(keys: list[str]) -> Tensor:
        if name not in POOLS:
            return folder_embedder(name, device)(keys)
        parts = policy()
        return vision_tower_embedder(parts.model, parts.image_processor, POOLS[name])(keys)

    return embed


def vision_tower_embedder(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    pool: Callable[[Tensor], Tensor] = mean,
) -> Callable[[list[str]], Tensor]:
    """Embed by the policy's own vision tower, pooled over a photo's merged tokens.

    Args:
        model: of a supported family, on any device.
        image_processor: resizes and cuts the photos.
        pool: [tokens, D] to one embedding.

    Returns:
        A function from image keys to embeddings [N, D] float32 on the CPU.
    """

    @torch.no_grad()
    def embed(keys: list[str]) -> Tensor:
        rows = []
        for start in range(0, len(keys), TOWER_IMAGES_AT_ONCE):
            inputs = _inputs(image_processor, keys[start : start + TOWER_IMAGES_AT_ONCE])
            tokens = model.get_image_features(**inputs.to(model.model.visual.device)).pooler_output
            rows.extend(pool(of_photo.float()).cpu() for of_photo in tokens)
        return torch.stack(rows)

    return embed


def folder_embedder(path: str, device: str | torch.device = "cpu") -> Callable[[list[str]], Tensor]:
    """Embed by an image encoder that transformers loads, such as SigLIP or CLIP.

    Args:
        path: folder or hub id of the model with its image processor.
        device: where it runs.

    Returns:
        A function from image keys to embeddings [N, D] float32 on the CPU.

    Raises:
        ValueError: naming the path, when it cannot be loaded or gives no pooled embedding.
    """
    try:
        model = AutoModel.from_pretrained(path, trust_remote_code=False).to(device).eval()
        image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.embedder {path!r} cannot be loaded: {error}") from error
    encode = getattr(model, "get_image_features", model)

    @torch.no_grad()
    def embed(keys: list[str]) -> Tensor:
        rows = []
        for start in range(0, len(keys), FOLDER_IMAGES_AT_ONCE):
            inputs = _inputs(image_processor, keys[start : start + FOLDER_IMAGES_AT_ONCE])
            pooled = encode(**inputs.to(device)).pooler_output
            if pooled is None:
                raise ValueError(f"data.embedder {path!r} gives no pooled image embedding")
            rows.append(pooled.float().cpu())
        return torch.cat(rows)

    return embed


def _inputs(image_processor, keys: list[str]):
    # The layout is named, since a photo 1 or 3 pixels high would be taken for channels-first.
    photos = [np.asarray(load_image(key)) for key in keys]
    return image_processor(images=photos, return_tensors="pt", input_data_format="channels_last")
