"""Where the memory of a GPU goes in a training step, counted from a model's sizes.

Saved activations are counted tensor by tensor, as autograd keeps them of transformers' layers and
our kernels on a GPU; tests compare the sums with PyTorch's profiler. With b bytes per element and
f = max(4, b), since RMSNorm works in float32, a decoder layer of hidden size D, MLP size I, H heads
and K key heads of size d keeps for each token

    b (4 I + 2 H d + 2 K d) + 4 H + 2 (f D + 2 b D + 4)

bytes: gate, its SiLU, up and their product; queries, output, keys and values; the log-sum-exp; two
norms. Norms of queries and keys keep (H + K) (f d + b d + 4) more. In an update memory is highest
at one of three points:

    head        activations of all layers, a chunk of logits, and the gradients of rows and head
    backward    in the last layer's backward pass, when the other layers' activations still exist
    step        no activations: gradients and optimiser states

When both branches exist at once, the update branch has its backward pass first, then the negative
branch (in a single pass the unsharded gradients of all parameters from the first branch would wait
for those of the second).

FSDP2 (fully_shard of each layer and block, the rest as the root) keeps the root unsharded from the
first forward pass to the end of the backward pass, and beside it two blocks: the one that computes
and the one that is prefetched. Their gradients are unsharded until they are reduce-scattered.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tercet.core.costs import CHUNK_ELEMENTS, Shape

GIB = 2**30


class Parameters(NamedTuple):
    """Counts of a model's parameters, by the units in which FSDP2 shards them."""

    total: int
    root: int
    """Outside decoder layers and vision blocks."""
    block: int
    """The largest of decoder layers and vision blocks."""
    tensor: int
    """The largest single parameter."""
    trained: int
    trained_root: int
    trained_block: int
    trained_head: int
    """V D, or 0 where the head is not trained."""
    trains_vision: bool = True
    """Whether any vision block is trained."""
    ranks: int = 0
    """Sum of the ranks of a decoder layer's LoRA matrices; 0: no LoRA."""


@dataclass(frozen=True)
class ElementBytes:
    """Bytes per element of each kind of tensor in training."""

    weight: int
    """Of a stored parameter."""
    gradient: int
    states: int
    """All optimiser states of a trained parameter together."""
    compute: int
    """Of activations, and of parameters while they are used."""
    temporary: int = 0
    """Temporaries of the optimiser's step, per element that it updates at a time."""


class Load(NamedTuple):
    """Sizes of one branch of a micro-batch."""

    tokens: int
    """Prompts and responses."""
    patches: int
    rows: int
    """Response tokens whose log-probs are computed."""


class Breakdown(NamedTuple):
    """Bytes on a GPU at one point of a step, by what they hold."""

    parameters: float = 0
    gradients: float = 0
    optimiser: float = 0
    activations: float = 0
    head: float = 0
    """A chunk of logits, and the gradients of rows and head."""
    server: float = 0
    """Weights of the sampling engine."""

    @property
    def total(self) -> float:
        return sum(self)


def decoder_layer_bytes(shape: Shape, b: int, ranks: int = 0) -> int:
    """Bytes that autograd keeps of a decoder layer per token.

    With LoRA (`ranks` > 0) the inputs of its second matrices are kept too, but not what only the
    gradients of the frozen norms need.
    """
    attention = 2 * (shape.heads + shape.key_heads) * shape.head_dim
    of_element = max(4, b) + (0 if ranks else b)
    norms = 2 * ((of_element + b) * shape.hidden + 4)
    if shape.head_norms:  # their outputs are rotated, which keeps no input
        norms += (shape.heads + shape.key_heads) * (of_element * shape.head_dim + 4)
    return b * (4 * shape.intermediate + attention + ranks) + 4 * shape.heads + norms


def vision_block_bytes(shape: Shape, b: int) -> int:
    """Bytes that autograd keeps of a vision block per patch: RMSNorm, gated MLP; or LayerNorm."""
    width, gated = shape.vision_hidden, shape.vision_matrices == 3
    mlp = shape.vision_kept * shape.vision_intermediate
    norm = max(4, b) * width + 2 * b * width + 4 if gated else 2 * b * width + 8
    # Queries, keys and output; values as a view of all three before rotation.
    return b * (mlp + 6 * width) + 4 * shape.vision_heads + 2 * norm


def _front_bytes(shape: Shape, load: Load, b: int) -> int:
    """Bytes kept outside the layers: photos, patch embedding, mergers, rotary embeddings."""
    width = shape.vision_hidden
    photo = 4 * shape.patch + (b * shape.patch if b < 4 else 0)
    merger = (max(4, b) if shape.vision_matrices == 3 else b) * width + 3 * b * width
    merger += shape.deepstack * 4 * b * width
    rotation = 8 * width // shape.vision_heads
    return load.patches * (photo + merger + rotation) + load.tokens * 2 * b * shape.head_dim


@dataclass(frozen=True)
class Activations:
    """Bytes of one branch's activations.

    Args:
        shape: sizes of the model.
        load: tokens, patches and rows of the branch.
        b: bytes per element.
        checkpointing: whether layers keep only their input and are recomputed.
        trains_vision: whether gradients go through the vision tower.
        ranks: sum of the ranks of a decoder layer's LoRA matrices.
    """

    shape: Shape
    load: Load
    b: int
    checkpointing: bool
    trains_vision: bool = True
    ranks: int = 0

    @property
    def front(self) -> int:
        return _front_bytes(self.shape, self.load, self.b)

    @property
    def decoder(self) -> int:
        shape, b = self.shape, self.b
        kept = b * shape.hidden
        if not self.checkpointing:
            kept = decoder_layer_bytes(shape, b, self.ranks)
        return shape.layers * self.load.tokens * kept

    @property
    def vision(self) -> int:
        shape, b = self.shape, self.b
        kept = b * shape.vision_hidden if self.checkpointing else vision_block_bytes(shape, b)
        return self.trains_vision * shape.vision_layers * self.load.patches * kept

    @property
    def kept(self) -> int:
        """At the end of the forward pass, the last norm included."""
        norm = (max(4, self.b) + self.b) * self.shape.hidden
        return self.front + self.vision + self.decoder + self.load.tokens * norm

    @property
    def in_backward(self) -> int:
        """Peak of the backward pass: at its first decoder layer, or at its first vision block.

        Beside what is kept there are the gradients of the layer's output and, in the MLP, of SiLU,
        up and their product; the product itself is freed by then.
        """
        shape, b, load = self.shape, self.b, self.load
        layer = b * (shape.hidden + 2 * shape.intermediate)
        block = b * (shape.vision_hidden + 2 * shape.vision_intermediate)
        if self.checkpointing:
            layer += decoder_layer_bytes(shape, b, self.ranks)
            block += vision_block_bytes(shape, b)
        in_decoder = self.decoder + load.tokens * layer
        in_vision = self.trains_vision * load.patches * block
        return self.front + self.vision + max(in_decoder, in_vision)


@dataclass(frozen=True)
class Memory:
    """Memory of one GPU of a training run.

    Args:
        shape: sizes of the model.
        parameters: counts of the model's parameters.
        element_bytes: bytes per element of each kind of tensor.
        fsdp: whether FSDP2 gathers parameters only while they are used.
        shards: GPUs over which one copy of parameters, gradients and states is spread.
        offload: whether the shards are kept on the CPU.
    """

    shape: Shape
    parameters: Parameters
    element_bytes: ElementBytes
    fsdp: bool = False
    shards: int = 1
    offload: bool = False

    @property
    def resident(self) -> Breakdown:
        """What exists all the time; gradients exist from a mini-batch's first backward pass on."""
        if self.offload:
            return Breakdown()
        total, trained = self.parameters.total, self.parameters.trained
        return Breakdown(
            parameters=total * self.element_bytes.weight / self.shards,
            gradients=trained * self.element_bytes.gradient / self.shards,
            optimiser=trained * self.element_bytes.states / self.shards,
        )

    def at_head(
        self, update: Activations, negative: Activations | None, chunk_rows: int
    ) -> Breakdown:
        """Head and loss, after the forward passes.

        Args:
            update: the branch with the first backward pass.
            negative: the other one when both exist at once, else None.
            chunk_rows: response rows, over all branches, whose logits exist at once.
        """
        shape, here, b = self.shape, self.resident, self.element_bytes.compute
        rows, kept = self._rows(update, negative), update.kept
        chunk = min(chunk_rows, rows) * (shape.vocabulary * max(4, b) + 2 * shape.hidden * b)
        rows *= shape.hidden * b
        head = self.parameters.trained_head
        # Hidden states, their gradients and a chunk; the gradients concatenated; scaled.
        most = max(2 * rows + chunk, 3 * rows, 2 * rows + head * b)
        return here._replace(
            parameters=here.parameters + self.fsdp * self.parameters.root * b,
            activations=kept + (negative.kept if negative else 0),
            head=most + head * max(4, b),
        )

    def in_backward(self, update: Activations, negative: Activations | None) -> Breakdown:
        """The backward pass through the layers; arguments as in `at_head`."""
        here, counted, b = self.resident, self.parameters, self.element_bytes.compute
        matrix = self.shape.hidden * self.shape.intermediate
        whole, in_flight = 0, min(matrix, counted.trained_block) * b
        if self.fsdp:
            whole = (counted.root + 2 * counted.block) * b
            # One block's gradients as they are computed, one's as they are reduce-scattered.
            in_flight = counted.trained_block * (b + self.element_bytes.gradient)
            in_flight += counted.trained_root * b
        activations, rows = update.in_backward, 0
        if negative:
            rows = self._rows(update, negative) * self.shape.hidden * b
            activations = max(activations + negative.kept, negative.in_backward)
        return here._replace(
            parameters=here.parameters + whole,
            gradients=here.gradients + in_flight,
            activations=activations,
            head=rows,
        )

    @staticmethod
    def _rows(update: Activations, negative: Activations | None) -> int:
        return update.load.rows + (negative.load.rows if negative else 0)

    def in_step(self) -> Breakdown:
        """The optimiser's step."""
        here = self.resident
        at_once = min(CHUNK_ELEMENTS, self.parameters.tensor / self.shards)
        temporary = 0 if self.offload else at_once * self.element_bytes.temporary
        return here._replace(optimiser=here.optimiser + temporary)

    def in_generate(self, server_bytes: float) -> Breakdown:
        """Sampling and the weight sync, which gathers one parameter at a time.

        Args:
            server_bytes: the engine's weights on this GPU.
        """
        here = self.resident
        gathered = self.fsdp and not self.offload
        tensor = gathered * self.parameters.tensor * self.element_bytes.weight
        return here._replace(parameters=here.parameters + tensor, gradients=0, server=server_bytes)


def kv_bytes_per_token(shape: Shape, b: int) -> int:
    """Bytes of a token's keys and values in all layers, b bytes per element."""
    return 2 * shape.layers * shape.key_heads * shape.head_dim * b
