"""Image embedders: they decide which sub-categories look alike.

An embedding is made once: it is kept in the user's cache, by what the photo's file holds and by
what the embedder is made of.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from hashlib import blake2b

import numpy as np
import torch
from torch import Tensor, nn
from transformers import AutoModel, BaseImageProcessor, PreTrainedModel

# Not from the top level, where transformers 5.17 asks for torchvision to import it.
from transformers.models.auto.image_processing_auto import AutoImageProcessor

from tercet.core.data.copies import content_digest
from tercet.core.data.kept_rows import cache_folder, kept_rows
from tercet.core.data.vision import load_image
from tercet.core.types import PolicyParts

TOWER_IMAGES_AT_ONCE = 4
FOLDER_IMAGES_AT_ONCE = 32
KEPT_AT_ONCE = 256
"""Embeddings that are written at once, so that a start that was stopped loses few."""
Run = Callable[[list[str]], tuple[Sequence[Tensor], list[int] | None]]


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


class Encoder:
    """A vision tower or an image encoder; called with image keys it gives embeddings.

    Args:
        model: what `identity` covers; the first list of modules in it is that of its blocks.
        processor: of its photos.
        run: image keys to each photo's [tokens, D], and how many tokens it has in a block's output,
            [all tokens, D]; None where that is [photos, tokens, D].
        at_once: photos that are embedded at once.
        pool: [tokens, D] to one embedding.
        layer: of the blocks, from 0, or from -1 at the end, whose output is pooled; None: what
            `run` gives.

    Raises:
        ValueError: there is no such layer.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: BaseImageProcessor,
        run: Run,
        at_once: int,
        pool: Callable[[Tensor], Tensor] = mean,
        layer: int | None = None,
    ):
        self._model, self._processor, self._run = model, processor, run
        self._at_once, self._pool, self._layer = at_once, pool, layer
        lists = (module for module in model.modules() if isinstance(module, nn.ModuleList))
        self._blocks = next(lists, nn.ModuleList())
        if layer is not None and not -self.layers <= layer < self.layers:
            raise ValueError(
                f"data.embedder_layer must be under {self.layers}, the embedder's layers, or from "
                f"-{self.layers} to -1, got {layer}"
            )

    @property
    def layers(self) -> int:
        """How many blocks there are."""
        return len(self._blocks)

    def identity(self) -> bytes:
        """A digest of everything but the photo that an embedding depends on."""
        found = blake2b(digest_size=16)
        said = (self._processor.to_dict(), self._pool.__name__, self._layer)
        found.update(repr(said).encode())
        for name, weight in self._model.state_dict().items():
            found.update(f"\0{name}\0{weight.dtype}\0{tuple(weight.shape)}\0".encode())
            flat = weight.cpu().contiguous().reshape(-1)
            found.update(flat.view(torch.uint8).numpy().data)
        return found.digest()

    def __call__(self, keys: list[str]) -> Tensor:
        """Embeddings [N, D] float32 on the CPU."""
        return self.of_layers(keys, [self._layer])[0]

    @torch.no_grad()
    def of_layers(self, keys: list[str], layers: Sequence[int | None]) -> list[Tensor]:
        """The same for several layers, in one pass over the photos."""
        rows: list[list[Tensor]] = [[] for _ in layers]
        for start in range(0, len(keys), self._at_once):
            seen: dict[int | None, Tensor] = {}
            hooks = [
                self._blocks[n].register_forward_hook(partial(_keep, seen, n))
                for n in layers
                if n is not None
            ]
            try:
                output, sizes = self._run(keys[start : start + self._at_once])
            finally:
                for hook in hooks:
                    hook.remove()
            for of_layer, layer in zip(rows, layers, strict=True):
                if layer is None:
                    photos = output
                else:
                    photos = seen[layer].split(sizes) if sizes else seen[layer].unbind()
                of_layer.extend(self._pool(tokens.float()).cpu() for tokens in photos)
        return [torch.stack(of_layer) for of_layer in rows]


def _keep(seen: dict, layer: int, module: nn.Module, inputs: tuple, output) -> None:
    seen[layer] = output if isinstance(output, Tensor) else output[0]


def embedder(
    name: str,
    policy: Callable[[], PolicyParts],
    device: str | torch.device = "cpu",
    layer: int | None = None,
) -> Callable[[list[str]], Tensor]:
    """The embedder that `data.embedder` names; its model is loaded when it is first called.

    Args:
        name: "policy" or "policy_extremes" for the policy's own vision tower (see POOLS); else
            folder or hub id of an image encoder.
        policy: loads the policy's parts; called for its own tower only.
        device: where an image encoder runs.
        layer: see `Encoder`.

    Returns:
        A function from image keys to embeddings [N, D] float32 on the CPU. What it has embedded
        before, also in other processes, is found in the user's cache.
    """
    load = cache(partial(load_encoder, name, policy, device, layer))

    def embed(keys: list[str]) -> Tensor:
        return _kept(load(), keys)

    return embed


def load_encoder(
    name: str,
    policy: Callable[[], PolicyParts],
    device: str | torch.device = "cpu",
    layer: int | None = None,
) -> Encoder:
    """The encoder of `embedder`, which keeps nothing."""
    if name not in POOLS:
        return folder_embedder(name, device, layer)
    parts = policy()
    return vision_tower_embedder(parts.model, parts.image_processor, POOLS[name], layer)


def _kept(encoder: Encoder, keys: list[str]) -> Tensor:
    """Embeddings from the user's cache, made where they are missing."""
    folder = cache_folder()
    if folder is None:
        return encoder(keys)
    identity = encoder.identity()
    try:
        ids = [blake2b(identity + content_digest(key), digest_size=16).digest() for key in keys]
    except OSError as error:
        raise ValueError(f"a photo cannot be read: {error}") from error

    def make(places: list[int]) -> np.ndarray:
        return encoder([keys[place] for place in places]).numpy()

    rows = list(kept_rows(folder / "embeddings.sqlite", ids, make, KEPT_AT_ONCE))
    return torch.from_numpy(np.concatenate(rows))


def vision_tower_embedder(
    model: PreTrainedModel,
    image_processor: BaseImageProcessor,
    pool: Callable[[Tensor], Tensor] = mean,
    layer: int | None = None,
) -> Encoder:
    """Embed by the policy's own vision tower, pooled over a photo's merged tokens.

    Args:
        model: of a supported family, on any device.
        image_processor: resizes and cuts the photos.
        pool: [tokens, D] to one embedding.
        layer: of the tower's blocks, whose tokens are patches; None: merged tokens.
    """
    visual = model.model.visual

    def run(keys: list[str]) -> tuple[Sequence[Tensor], list[int]]:
        inputs = image_inputs(image_processor, keys).to(visual.device)
        tokens = model.get_image_features(**inputs).pooler_output
        return tokens, inputs["image_grid_thw"].prod(dim=-1).tolist()

    return Encoder(visual, image_processor, run, TOWER_IMAGES_AT_ONCE, pool, layer)


def folder_embedder(
    path: str, device: str | torch.device = "cpu", layer: int | None = None
) -> Encoder:
    """Embed by an image encoder that transformers loads, such as SigLIP or CLIP.

    Args:
        path: folder or hub id of the model with its image processor.
        device: where it runs.
        layer: of the encoder's blocks, by the mean over its tokens; None: its pooled output.

    Raises:
        ValueError: naming the path, when it cannot be loaded or gives no pooled embedding.
    """
    try:
        model = AutoModel.from_pretrained(path, trust_remote_code=False).to(device).eval()
        image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"data.embedder {path!r} cannot be loaded: {error}") from error
    encode = getattr(model, "get_image_features", model)

    def run(keys: list[str]) -> tuple[Sequence[Tensor], None]:
        pooled = encode(**image_inputs(image_processor, keys).to(device)).pooler_output
        if pooled is None:
            raise ValueError(f"data.embedder {path!r} gives no pooled image embedding")
        return pooled[:, None].unbind(), None

    parts = [getattr(model, "vision_model", model), getattr(model, "visual_projection", None)]
    covered = nn.Sequential(*filter(None, parts))  # without a text tower, which changes nothing
    return Encoder(covered, image_processor, run, FOLDER_IMAGES_AT_ONCE, layer=layer)


def image_inputs(image_processor, keys: list[str]):
    """What a model takes for these photos, from its image processor."""
    # The layout is named, since a photo 1 or 3 pixels high would be taken for channels-first.
    photos = [np.asarray(load_image(key)) for key in keys]
    return image_processor(images=photos, return_tensors="pt", input_data_format="channels_last")
