"""Hidden states of the policy's last layer, for photos, questions about them, and names."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from tercet.core.data.vision import PromptEncoder
from tercet.core.prompts import chat_ids
from tercet.core.types import PolicyParts

DESCRIBE = "Describe this photo."


class HiddenStates:
    """The language model's last layer, after its final norm, one prompt at a time.

    Args:
        parts: the policy, on any device.
    """

    def __init__(self, parts: PolicyParts):
        self._parts, self._encoder = parts, PromptEncoder(parts)
        parts.model.eval()

    def photo(self, key: str) -> Tensor:
        """[D] float32: mean over the image tokens of a photo."""
        states, is_image = self._states(*self._asked(DESCRIBE, key))
        return states[is_image].mean(dim=0)

    def question(self, text: str, key: str) -> Tensor:
        """[D] float32: last token of a prompt about a photo, from which the answer begins."""
        return self._states(*self._asked(text, key))[0][-1]

    def name(self, text: str) -> Tensor:
        """[D] float32: mean over the tokens of a name that stands alone."""
        ids = self._parts.tokenizer.encode(text, add_special_tokens=False)
        return self._states(ids, ())[0].mean(dim=0)

    def _asked(self, text: str, key: str) -> tuple[list[int], tuple[str, ...]]:
        turns = [{"role": "user", "content": f"<image>{text}"}]
        return chat_ids(self._parts.tokenizer, turns, 1), (key,)

    @torch.no_grad()
    def _states(self, ids: Sequence[int], keys: tuple[str, ...]) -> tuple[Tensor, Tensor]:
        """[T, D] float32 on the CPU, and [T] bool: which tokens are of the photo."""
        prompt, model = self._encoder(tuple(ids), keys), self._parts.model
        pixels = {}
        if keys:
            image = prompt.images[0]
            pixels = {"pixel_values": image.pixel_values, "image_grid_thw": image.grid_thw}
        output = model.model(
            input_ids=prompt.input_ids[None].to(model.device),
            position_ids=prompt.position_ids[:, None].to(model.device),
            attention_mask=torch.ones(1, len(prompt.input_ids), device=model.device),
            **{name: tensor.to(model.device) for name, tensor in pixels.items()},
        )
        is_image = prompt.input_ids == model.config.image_token_id
        return output.last_hidden_state[0].float().cpu(), is_image
