"""Where the memory of a GPU goes in a training step, counted from a model's sizes.

What autograd keeps is counted tensor by tensor, as transformers' layers and our kernels keep it on
a GPU; tests hold it to what PyTorch's profiler sees. With b bytes a number and f = max(4, b), since
RMSNorm works in float32, a decoder layer of hidden size D, MLP size I, H heads and K key heads of
size d keeps for a token

    b (4 I + 2 H d + 2 K d) + 4 H + 2 (f D + 2 b D + 4)

bytes: gate, its SiLU, up and their product; queries, output, keys and values; the log-sum-exp; two
norms. In an update memory is highest at one of three places:

    head        all layers are kept; a chunk of logits and the gradients of rows and head exist
    backward    the last layer is gone through, the others are still kept
    step        no activations: gradients and optimiser states

Where both branches exist at once, the update's is gone through backwards first, then the
negative's, each in a pass of its own (in one pass the first one's gradients of all parameters would
wait for the second's, unsharded).

FSDP2 (fully_shard of each layer and block, the rest as the root) leaves the root whole from the
first forward pass to the end of the backward pass, and two blocks beside it, the one at work and
the one that is fetched; their gradients are whole until they are dealt out.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from tercet.core.costs import Shape

GIB = 2**30
STEP_ELEMENTS = 1 << 24
"""Numbers that KahanAdamW updates at a time."""
STEP_BYTES = 32
"""Its temporaries a number: eight in float32."""
STEP_BYTES_WIDE = 20
"""The same with float32 states, which are worked on in place: five."""


class Parameters(NamedTuple):
    """Numbers in the parameters of a model, as they are sharded."""

    total: int
    root: int
    """All but decoder layers and vision blocks."""
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
    """Ranks of a decoder layer's low-rank additions (LoRA), summed up; 0: none."""


@dataclass(frozen=True)
class Numbers:
    """Bytes of a number."""

    weight: int
    """Of a parameter where it is kept."""
    gradient: int
    states: int
    """All optimiser states of a trained parameter together."""
    compute: int
    """Of activations, and of parameters while they are used."""
    temporary: int = 0
    """Of the optimiser's step, for each number that it works on at once."""


class Load(NamedTuple):
    """What a branch of a micro-batch holds."""

    tokens: int
    """Prompts and responses."""
    patches: int
    rows: int
    """Response tokens whose log-probs are computed."""


class Moment(NamedTuple):
    """Bytes on a GPU at one place of a step."""

    parameters: float = 0
    gradients: float = 0
    optimiser: float = 0
    activations: float = 0
    head: float = 0
    """Logits of a chunk, gradients of rows and head."""
    server: float = 0
    """Weights of the engine that samples."""

    @property
    def total(self) -> float:
        return sum(self)


def decoder_layer_bytes(shape: Shape, b: int, ranks: int = 0) -> int:
    """What autograd keeps of a decoder layer for a token.

    With LoRA of so many ranks their inputs are kept as well, but not what only the gradients of the
    frozen norms need.
    """
    attention = 2 * (shape.heads + shape.key_heads) * shape.head_dim
    norm = max(4, b) * shape.hidden + (1 if ranks else 2) * b * shape.hidden + 4
    return b * (4 * shape.intermediate + attention + ranks) + 4 * shape.heads + 2 * norm


def vision_block_bytes(shape: Shape, b: int) -> int:
    """What autograd keeps of a vision block for a patch: RMSNorm and a gated MLP, or LayerNorm."""
    width, gated = shape.vision_hidden, shape.vision_matrices == 3
    mlp = (4 if gated else 3) * shape.vision_intermediate
    norm = max(4, b) * width + 2 * b * width + 4 if gated else 2 * b * width + 8
    # Queries, keys and output; values as a view of all three before rotation.
    return b * (mlp + 6 * width) + 4 * shape.vision_heads + 2 * norm


def _front_bytes(shape: Shape, load: Load, b: int) -> int:
    """What is kept before the layers: photos, patch embedding, merger, rotations."""
    width = shape.vision_hidden
    photo = 4 * shape.patch + (b * shape.patch if b < 4 else 0)
    merger = (max(4, b) if shape.vision_matrices == 3 else b) * width + 3 * b * width
    rotation = 8 * width // shape.vision_heads
    return load.patches * (photo + merger + rotation) + load.tokens * 2 * b * shape.head_dim


@dataclass(frozen=True)
class Activations:
    """Bytes of one branch's activations.

    Args:
        shape: of the model.
        load: tokens, patches and rows of the branch.
        b: bytes a number.
        checkpointing: layers keep their input alone and are recomputed.
        trains_vision: whether gradients go through the vision tower.
        ranks: of LoRA in a decoder layer.
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
        """At the end of the forward pass, with what the last norm keeps."""
        norm = (max(4, self.b) + self.b) * self.shape.hidden
        return self.front + self.vision + self.decoder + self.load.tokens * norm

    @property
    def in_backward(self) -> int:
        """Most in the backward pass: at its first decoder layer, or at its first vision block.

        In flight are the gradient of a layer's output and, in the MLP, those of SiLU, up and their
        product, which itself is gone by then.
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
        shape: of the model.
        parameters: counted.
        numbers: bytes of each kind of number.
        fsdp: whether parameters are put together only while they are used.
        shards: GPUs over which one copy of parameters, gradients and states is spread.
        offload: those shards wait on the CPU.
    """

    shape: Shape
    parameters: Parameters
    numbers: Numbers
    fsdp: bool = False
    shards: int = 1
    offload: bool = False

    @property
    def resident(self) -> Moment:
        """What is there all the time, gradients from the first backward pass of a mini-batch on."""
        if self.offload:
            return Moment()
        total, trained = self.parameters.total, self.parameters.trained
        return Moment(
            parameters=total * self.numbers.weight / self.shards,
            gradients=trained * self.numbers.gradient / self.shards,
            optimiser=trained * self.numbers.states / self.shards,
        )

    def at_head(self, update: Activations, negative: Activations | None, chunk_rows: int) -> Moment:
        """Head and loss, when the forward passes are done.

        Args:
            update: the branch that is gone through backwards first.
            negative: the other one, where both exist at once.
            chunk_rows: response rows, of all branches, whose logits exist at once.
        """
        shape, here, b = self.shape, self.resident, self.numbers.compute
        rows, kept = self._rows(update, negative), update.kept
        chunk = min(chunk_rows, rows) * (shape.vocabulary * max(4, b) + 2 * shape.hidden * b)
        rows *= shape.hidden * b
        head = self.parameters.trained_head
        # Hidden states, their gradients and a chunk; those gradients put together; scaled.
        most = max(2 * rows + chunk, 3 * rows, 2 * rows + head * b)
        return here._replace(
            parameters=here.parameters + self.fsdp * self.parameters.root * b,
            activations=kept + (negative.kept if negative else 0),
            head=most + head * max(4, b),
        )

    def in_backward(self, update: Activations, negative: Activations | None) -> Moment:
        """The backward pass through the layers; arguments as of `at_head`."""
        here, counted, b = self.resident, self.parameters, self.numbers.compute
        matrix = self.shape.hidden * self.shape.intermediate
        whole, in_flight = 0, min(matrix, counted.trained_block) * b
        if self.fsdp:
            whole = (counted.root + 2 * counted.block) * b
            # One block's gradients as they arise, one's as they are dealt out.
            in_flight = counted.trained_block * (b + self.numbers.gradient)
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

    def in_step(self) -> Moment:
        """The optimiser's step."""
        here = self.resident
        at_once = min(STEP_ELEMENTS, self.parameters.tensor / self.shards)
        temporary = 0 if self.offload else at_once * self.numbers.temporary
        return here._replace(optimiser=here.optimiser + temporary)

    def in_generate(self, server_bytes: float) -> Moment:
        """Sampling and the weight sync, which puts one parameter together at a time.

        Args:
            server_bytes: weights of the engine on this GPU.
        """
        here = self.resident
        put_together = self.fsdp and not self.offload
        tensor = put_together * self.parameters.tensor * self.numbers.weight
        return here._replace(parameters=here.parameters + tensor, gradients=0, server=server_bytes)


def kv_bytes(shape: Shape, b: int) -> int:
    """Keys and values of a token in all layers."""
    return 2 * shape.layers * shape.key_heads * shape.head_dim * b
