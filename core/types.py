"""The data that flows through a step, in the order in which it is made.

    Photo -> Anchor -> Triplet -> Request -> Completion -> Response in a Group -> MicroBatch

Legend for shapes: T packed tokens, R response tokens (loss rows), S segments (prompts and
responses), N prompts in a pack, P image patches, I images, D hidden size, V vocabulary.
Images are carried by *key* (a path, or a cell of a Parquet file) and loaded where they are used.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch
from torch import Tensor

from tercet.core.exports import add_older_names

if TYPE_CHECKING:
    from transformers import BaseImageProcessor, PreTrainedModel, PreTrainedTokenizerFast

Role = Literal["anchor", "positive"]
Partition = Literal["seen", "unseen"]
FinishReason = Literal["stop", "length"]
ANSWER = "AnAnswer"  # a text that no chat template holds


@dataclass(frozen=True)
class Photo:
    """One labelled photo, e.g. `Photo("bird/least_auklet/7.jpg", "bird", "least auklet")`."""

    image: str
    """Image key: a path, or `file.parquet#row/column/index` (see core.data.vision.load_image)."""
    super_category: str
    sub_category: str
    question: str = ""
    """Empty: one is drawn from the templates of the super-category."""


@dataclass(frozen=True)
class Anchor:
    """One row of a manifest: a training photo, and the photos that its triplets are drawn from."""

    id: str
    image: str
    positives: tuple[str, ...]
    """Keys of the other training photos of the same sub-category, the fixed one first."""
    negatives: tuple[str, ...]
    """Keys of training photos of the most similar other sub-category, the fixed one first."""
    question: str
    super_category: str
    sub_category: str


@dataclass(frozen=True)
class Triplet:
    """Anchor x, positive x_pos and negative x_neg with one question and one true name."""

    id: str
    anchor: str
    positive: str
    negative: str
    question: str
    super_category: str
    sub_category: str


@dataclass(frozen=True)
class Request:
    """`n` samples of one prompt are wanted; `prompt_ids` holds ONE image pad per image."""

    id: str
    group_id: str
    prompt_ids: tuple[int, ...]
    images: tuple[str, ...]
    n: int
    seed: int
    """Seed of the run; with step, id and sample index it gives the seed of each sample."""
    step: int


@dataclass(frozen=True)
class Completion:
    """Sample `index` of a request, as an engine returns it once it is finished."""

    request_id: str
    index: int
    token_ids: tuple[int, ...]
    """EOS included when the model stopped by itself."""
    rollout_logprobs: tuple[float, ...]
    """Full-vocabulary log-probs at the sampling temperature, one a token."""
    finish_reason: FinishReason
    weight_version: int


@dataclass
class Response:
    """A completion in its group, with its reward, advantage and log-probs."""

    role: Role
    token_ids: tuple[int, ...]
    rollout_logprobs: tuple[float, ...]
    finish_reason: FinishReason
    weight_version: int
    text: str = ""
    reward: float = 0.0
    advantage: float = 0.0
    metrics: dict[str, float] = field(default_factory=dict)
    old_logprobs: Tensor | None = None
    """[len(token_ids)] float32; None until computed."""
    neg_logprobs: Tensor | None = None
    """[len(token_ids)] float32; None until computed."""
    ref_logprobs: Tensor | None = None
    """[len(token_ids)] float32; None until computed, where there is a reference policy."""
    row_weight: float = 0.0
    """Loss weight of each of its tokens in the mini-batch that it belongs to."""


@dataclass
class Group:
    """All n1 + n2 responses of one triplet: n1 sampled on the anchor, then n2 on the positive."""

    id: str
    triplet: Triplet
    prompt_ids: tuple[int, ...]
    responses: list[Response]


@dataclass(frozen=True)
class EncodedImage:
    """One photo as the vision tower takes it; its pixels are decoded when they are asked for."""

    decode: Callable[[], Tensor]
    grid_thw: Tensor
    """[1, 3] int64: patches in time, height and width."""

    @property
    def pixel_values(self) -> Tensor:
        """[P, channels * temporal_patch * patch * patch] float32."""
        return self.decode()

    @cached_property
    def patches(self) -> int:
        """P."""
        return int(self.grid_thw.prod())


@dataclass(frozen=True)
class EncodedPrompt:
    """A prompt with its image pads expanded and its positions computed."""

    input_ids: Tensor
    """[length] int64."""
    position_ids: Tensor
    """[3, length] int64."""
    next_position: int
    """M-RoPE position, the same on all three axes, of the token that follows the prompt."""
    images: tuple[EncodedImage, ...]

    def __len__(self) -> int:
        return self.input_ids.numel()


@dataclass(frozen=True)
class Segments:
    """Where prompts and responses are in a pack, for shared-prefix attention.

    A pack is `[prompt_1 | r_11 ... r_1n | prompt_2 | ...]`. A token attends causally to its own
    segment, and a response's token also to its whole prompt. Empty segments are left out.

    Example: prompts of 3 and 2 tokens, responses of 2 and 1 on the first, 4 on the second:
    `cu_seqlens = [0, 3, 5, 6, 8, 12]`, `response_index = [3, 4, 5, 8, 9, 10, 11]`,
    `prompt_index = [0, 1, 2, 6, 7]`, `cu_seqlens_q = [0, 3, 7]`, `cu_seqlens_k = [0, 3, 5]`.
    """

    cu_seqlens: Tensor
    """[S + 1] int32: bounds of every segment, for the causal pass."""
    max_seqlen: int
    response_index: Tensor
    """[T - prompt tokens] int64: response tokens, the queries of the pass over the prompts."""
    cu_seqlens_q: Tensor
    """[N + 1] int32: bounds in `response_index` of each prompt's responses."""
    max_seqlen_q: int
    prompt_index: Tensor
    """[prompt tokens] int64: prompt tokens, the keys of that pass."""
    cu_seqlens_k: Tensor
    """[N + 1] int32: bounds in `prompt_index` of each prompt."""
    max_seqlen_k: int


@dataclass(frozen=True)
class PackedBatch:
    """One branch of an update: prompts with their images, and the responses to each of them.

    A response of L tokens contributes L - 1 tokens to the pack (its last one predicts nothing) and
    L rows: the first row reads the hidden state of its prompt's last token.
    """

    input_ids: Tensor
    """[T] int64, image pads expanded."""
    position_ids: Tensor
    """[3, T] int64: temporal, height and width positions of M-RoPE."""
    pixel_values: Tensor | None
    """[P, channels * temporal_patch * patch * patch] float32; None without images."""
    image_grid_thw: Tensor | None
    """[I, 3] int64: patches per image in time, height, width."""
    segments: Segments
    hidden_index: Tensor
    """[R] int64: the packed token whose hidden state predicts each row."""

    @property
    def num_tokens(self) -> int:
        return self.input_ids.numel()


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward and backward pass; the rows of both branches are in the same order."""

    update: PackedBatch
    negative: PackedBatch | None
    labels: Tensor
    """[R] int64."""
    advantages: Tensor
    """[R] float32."""
    loss_mask: Tensor
    """[R] float32 row weight; 0 leaves the row out."""
    num_loss_tokens: float
    """Sum of loss_mask over the whole mini-batch and all ranks."""
    old_logprobs: Tensor | None = None
    """[R] float32; None: the current ones, detached."""
    neg_logprobs: Tensor | None = None
    """[R] float32, only with `neg_at: step_start`."""
    neg_entropy: Tensor | None = None
    """[R] float32 exact entropies, only with neg_logprobs that one branch hands to the other."""
    ref_logprobs: Tensor | None = None
    """[R] float32, only where there is a reference policy."""
    response_index: Tensor | None = None
    """[R] int64: the response that each row belongs to, only with `ratio_of: sequence`."""
    is_weights: Tensor | None = None
    """[R] float32 weights of the policy term, where any is not 1."""


@dataclass(frozen=True)
class EvalQuestion:
    """A question about a held-out photo, with the closed-world options."""

    image: str
    question: str
    options: tuple[str, ...]
    truth: str
    super_category: str
    partition: Partition | Literal[""]
    """Empty where neither the record nor the file name tells it."""
    dataset: str = ""
    """Column of the papers' tables that it belongs to."""
    path: str = ""
    """Path of the photo as its file gives it; `image` is where it lies here."""
    file: str = ""
    """Name of its file without the ending; with `line` it says which question this is."""
    line: int = 0
    """From 1."""


@dataclass(frozen=True)
class PolicyParts:
    """The contents of a policy folder."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerFast
    image_processor: BaseImageProcessor

    @cached_property
    def turn_end(self) -> int:
        """Token id that ends an answer: what the chat template puts behind it.

        The tokenizer's end-of-text token where there is no template, or none of its tokens follows.

        Raises:
            ValueError: the template does not render an answer, or nothing tells how one ends.
        """
        tokenizer, after = self.tokenizer, ""
        if tokenizer.chat_template is not None:
            turns = [{"role": "user", "content": "?"}, {"role": "assistant", "content": ANSWER}]
            try:
                after = tokenizer.apply_chat_template(turns, tokenize=False).rpartition(ANSWER)[2]
            except Exception as error:
                raise ValueError(
                    f"the tokenizer's chat template does not render {turns}: {error}"
                ) from error
        special = {*tokenizer.added_tokens_decoder, *tokenizer.all_special_ids}
        ids = tokenizer.encode(after, add_special_tokens=False)
        end = next((i for i in ids if i in special), tokenizer.eos_token_id)
        if end is None:
            raise ValueError("neither the chat template nor the tokenizer has a token that ends")
        return end

    @property
    def stop_ids(self) -> tuple[int, ...]:
        """Token ids that end a response: `turn_end`, then those that anything else names."""
        named = self.model.generation_config.eos_token_id
        named = named if isinstance(named, list | tuple) else [named]
        ids = [self.turn_end, *named, self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(i for i in ids if i is not None))

    @property
    def banned_ids(self) -> tuple[int, ...]:
        """Token ids that must never be sampled: each stands for image features."""
        return (self.model.config.image_token_id, self.model.config.video_token_id)

    def save(self, folder: str | Path, weights: dict[str, Tensor] | None = None) -> None:
        """Write a folder that transformers loads: safetensors, configs, tokenizer, processor.

        Args:
            folder: made if it does not exist.
            weights: full weights by parameter name, for a sharded model; None: the model's own.
        """
        self.model.save_pretrained(folder, state_dict=weights)
        self.tokenizer.save_pretrained(folder)
        self.image_processor.save_pretrained(folder)
        add_older_names(folder)


def to_device(batch, device: torch.device | str):
    """Copy of a (nested) dataclass with every tensor on `device`."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if not hasattr(batch, "__dataclass_fields__"):
        return batch
    return type(batch)(
        **{name: to_device(getattr(batch, name), device) for name in batch.__dataclass_fields__}
    )
