"""Ways to compute one update step, beside ours: what other trainers do, and ours with a part less.

Every method gets the same micro-batches (groups of responses, both branches) and adds the same
gradient of the TAPO loss to the model's parameters. Attention is ours (kernels/varlen.py) or
PyTorch's SDPA, depending on the method's layout of tokens, so that methods differ in their layout
and not in their library. Inputs are prepared before anything is timed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import pad_sequence
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from tercet.bench.step_case import Micro
from tercet.core.costs import PromptLoad
from tercet.core.models import family_of
from tercet.core.packing import Prompts, pack, prompt_loads
from tercet.core.types import EncodedPrompt, MicroBatch, PackedBatch, PolicyParts, to_device
from tercet.kernels.prefix_attention import ATTENTION_NAME
from tercet.kernels.reference import tapo_loss_reference
from tercet.train.learner.policy import Policy
from tercet.train.run.assemble import compile_parts, use_liger

Forward = Callable[[torch.nn.Module], Tensor]
"""A forward pass of one branch: takes the model, returns log-probs [R]."""
RunStep = Callable[[], Tensor]
"""Adds the gradient of the mini-batch to the parameters; returns its loss, 0-d."""
GROUPER_NAME = "bench_prefix_grouper"


def no_mask(model: torch.nn.Module):
    """What keeps transformers from building a mask."""
    return family_of(model.config).attention_mask(None)


def sequence(prompt: EncodedPrompt, tokens: tuple[int, ...]) -> EncodedPrompt:
    """Prompt and response as one sequence, without the last token, which predicts nothing."""
    fed = torch.tensor(tokens[:-1], dtype=torch.int64)
    positions = (prompt.next_position + torch.arange(len(fed))).expand(3, -1)
    return EncodedPrompt(
        torch.cat([prompt.input_ids, fed]),
        torch.cat([prompt.position_ids, positions], dim=1),
        prompt.next_position + len(fed),
        prompt.images,
    )


def flat(prompts: Prompts) -> list[tuple[EncodedPrompt, tuple[int, ...]]]:
    """Every response with its own prompt."""
    return [(prompt, tokens) for prompt, responses in prompts for tokens in responses]


def logprobs(logits: Tensor, labels: Tensor) -> Tensor:
    """Log-probs [...] of labels [...] from logits [..., V], in at least float32."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return -cross_entropy(wide.flatten(0, -2), labels.flatten(), reduction="none").view_as(labels)


def photos(prompts: Sequence[EncodedPrompt]) -> dict[str, Tensor]:
    """The model's arguments for the photos of all prompts."""
    images = [image for prompt in prompts for image in prompt.images]
    return {
        "pixel_values": torch.cat([image.pixel_values for image in images]),
        "image_grid_thw": torch.cat([image.grid_thw for image in images]),
    }


def on_device(inputs: dict, device: torch.device) -> dict:
    return {name: to_device(value, device) for name, value in inputs.items()}


def accumulate(model: torch.nn.Module, batch: MicroBatch, forwards: Sequence[Forward]) -> Tensor:
    """Add a micro-batch's gradient of the loss as `reference` defines it; returns the loss."""
    update, negative = (forward(model) for forward in forwards)
    loss, _ = tapo_loss_reference(
        update,
        batch.old_logprobs,
        negative,
        batch.advantages,
        num_loss_tokens=batch.num_loss_tokens,
        loss_mask=batch.loss_mask,
    )
    loss.backward()
    return loss.detach()


def plain(forward_of: Callable[[Prompts, torch.device], Forward]):
    """A method from its forward pass of one branch; the loss is plain PyTorch's."""

    def make(policy: Policy, micros: Sequence[Micro]) -> RunStep:
        device = policy.device
        parts = [
            (
                to_device(m.batch, device),
                [forward_of(m.update, device), forward_of(m.negative, device)],
            )
            for m in micros
        ]

        def run() -> Tensor:
            return sum(accumulate(policy.model, batch, forwards) for batch, forwards in parts)

        return run

    return make


def one_by_one(prompts: Prompts, device: torch.device) -> Forward:
    """Padding-free sequences, one per response, logits of all tokens: EasyR1, the released code.

    The sequences are concatenated and use the same variable-length attention as ours. Each repeats
    its prompt and runs its photo through the vision tower.
    """
    pairs = flat(prompts)
    packed = pack([(sequence(prompt, tokens), []) for prompt, tokens in pairs])
    labels, rows = packed.input_ids.roll(-1), []
    for start, (prompt, tokens) in zip(packed.segments.cu_seqlens.tolist(), pairs, strict=False):
        rows.append(start + len(prompt) - 1 + torch.arange(len(tokens)))
        labels[rows[-1]] = torch.tensor(tokens)
    packed, labels, rows = (to_device(x, device) for x in (packed, labels, torch.cat(rows)))

    def forward(model) -> Tensor:
        logits = model(
            input_ids=packed.input_ids[None],
            position_ids=packed.position_ids[:, None],
            attention_mask=no_mask(model),
            pixel_values=packed.pixel_values,
            image_grid_thw=packed.image_grid_thw,
            segments=packed.segments,
            use_cache=False,
        ).logits[0]
        return logprobs(logits, labels)[rows]

    return forward


def padded(prompts: Prompts, device: torch.device) -> Forward:
    """Right-padded [B, L] with an attention mask and all logits of the completions.

    This is TRL's layout, without the chunked head of its newer releases (see bench/kernels.py).
    """
    pairs = flat(prompts)
    assert len({len(prompt) for prompt, _ in pairs}) == 1, "prompts differ in length"
    lines = [sequence(prompt, tokens) for prompt, tokens in pairs]
    positions = pad_sequence([line.position_ids.T for line in lines], batch_first=True)
    inputs = {
        "input_ids": pad_sequence([line.input_ids for line in lines], batch_first=True),
        "attention_mask": pad_sequence(
            [torch.ones(len(line), dtype=torch.int64) for line in lines], batch_first=True
        ),
        "position_ids": positions.permute(2, 0, 1).contiguous(),  # [3, B, L]
    } | photos(lines)
    inputs = on_device(inputs, device)
    answers = [torch.tensor(tokens) for _, tokens in pairs]
    labels = pad_sequence(answers, batch_first=True).to(device)
    valid = pad_sequence([torch.ones_like(a, dtype=torch.bool) for a in answers], batch_first=True)
    valid = valid.to(device)

    def forward(model) -> Tensor:
        logits = model(**inputs, use_cache=False, logits_to_keep=labels.shape[1]).logits
        return logprobs(logits, labels)[valid]

    return forward


def ours(policy: Policy, micros: Sequence[Micro]) -> RunStep:
    """Shared prefix, fused head and loss: train/learner/policy.py."""
    batches = [to_device(m.batch, policy.device) for m in micros]

    def run() -> Tensor:
        return sum(policy.accumulate(batch)[0] for batch in batches)

    return run


def no_sharing(policy: Policy, micros: Sequence[Micro]) -> RunStep:
    """Ours with a prompt for every response."""

    def alone(prompts: Prompts) -> PackedBatch:
        return pack([(prompt, [tokens]) for prompt, tokens in flat(prompts)])

    micros = [
        replace(m, batch=replace(m.batch, update=alone(m.update), negative=alone(m.negative)))
        for m in micros
    ]
    return ours(policy, micros)


class PlainHead(Policy):
    """The policy with the head and loss of plain PyTorch."""

    def _tapo(self, batch, *hidden, return_logprobs=False, apart=False):
        found = [
            None if rows is None else logprobs(self.model.lm_head(rows), batch.labels)
            for rows in hidden
        ]
        rows = self._loss(batch) | {"neg_logprobs": found[1]}
        loss, metrics = tapo_loss_reference(found[0], **rows)
        return loss, metrics | {"hidden": []}  # one backward pass through all of it


def plain_head(policy: Policy, micros: Sequence[Micro]) -> RunStep:
    """Ours, but keeping all logits of the response tokens."""
    return ours(PlainHead(PolicyParts(policy.model, None, None), policy.loss), micros)


Switch = Callable[[bool], None]
"""Puts a change of a model in force, or out of it."""


def liger(model: torch.nn.Module) -> Switch:
    """Liger's norms and gated MLPs: `model.liger` of a run."""
    use_liger(model)
    forwards = {m: vars(m)["forward"] for m in model.modules() if "forward" in vars(m)}

    def switch(on: bool) -> None:
        for module, forward in forwards.items():
            if on:
                module.forward = forward
            else:
                vars(module).pop("forward", None)

    return switch


def compiled(model: torch.nn.Module) -> Switch:
    """The layers' parts compiled: `model.compile` of a run."""
    calls = {part: part._compiled_call_impl for part in compile_parts(model)}

    def switch(on: bool) -> None:
        for part, call in calls.items():
            part._compiled_call_impl = call if on else None

    return switch


def changed(*changes: Callable[[torch.nn.Module], Switch]):
    """Ours with changes of the model that are in force during its own steps only."""

    def make(policy: Policy, micros: Sequence[Micro]) -> RunStep:
        switches, run_ours = [change(policy.model) for change in changes], ours(policy, micros)

        def run() -> Tensor:
            for switch in switches:
                switch(True)
            try:
                return run_ours()
            finally:
                for switch in switches:
                    switch(False)

        for switch in switches:
            switch(False)
        return run

    return make


def prefix_grouper(prompts: Prompts, device: torch.device) -> Forward:
    """The package of that name, used as in its tutorial, on transformers' SDPA.

    Each group is a row of the batch. Prefixes attend to themselves, responses to their repeated
    prefix and themselves. Logits of all tokens.
    """
    from prefix_grouper import PrefixGrouper

    AttentionInterface.register(GROUPER_NAME, _grouper_attention)
    firsts = [prompt for prompt, _ in prompts]
    prefix = torch.stack([prompt.input_ids for prompt in firsts])
    prefix_places = torch.stack([prompt.position_ids.T for prompt in firsts])
    answers = [torch.tensor(tokens) for _, tokens in flat(prompts)]
    suffix = pad_sequence([a[:-1] for a in answers], batch_first=True)
    ones = [torch.ones(len(a) - 1, dtype=torch.bool) for a in answers]
    masks = torch.ones_like(prefix, dtype=torch.bool), pad_sequence(ones, batch_first=True)
    suffix_places = pad_sequence(
        [
            (prompt.next_position + torch.arange(len(tokens) - 1))[:, None].expand(-1, 3)
            for prompt, tokens in flat(prompts)
        ],
        batch_first=True,
    )
    grouper = PrefixGrouper.from_ungrouped_masks(
        *masks, [len(responses) for _, responses in prompts], device=device
    )
    places = grouper.concat_input(prefix_places, masks[0], suffix_places, masks[1])
    inputs = {
        "input_ids": grouper.concat_input(prefix, masks[0], suffix, masks[1]),
        "position_ids": places.permute(2, 0, 1).contiguous(),
    } | photos(firsts)
    inputs = on_device(inputs, device)
    labels = pad_sequence(answers, batch_first=True).to(device)

    def forward(model) -> Tensor:
        model.set_attn_implementation({"text_config": GROUPER_NAME})
        logits = model(
            **inputs, attention_mask=no_mask(model), use_cache=False, prefix_grouper=grouper
        ).logits
        _, _, logits, valid = grouper.split_output(logits, include_prefix_last=1)
        return logprobs(logits, labels)[valid]

    return forward


def _grouper_attention(module, query, key, value, mask, scaling=None, prefix_grouper=None, **_):
    def attend(q: Tensor, k: Tensor, v: Tensor, valid: Tensor) -> Tensor:
        causal = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        seen = causal.tril(k.shape[2] - q.shape[2]) & valid[:, None, None]
        return sdpa_attention_forward(module, q, k, v, seen, scaling=scaling, is_causal=False)[0]

    return prefix_grouper.forward(attend, query, key, value), None


def grouper_step(policy: Policy, micros: Sequence[Micro]) -> RunStep:
    run_plain = plain(prefix_grouper)(policy, micros)

    def run() -> Tensor:
        try:
            return run_plain()
        finally:
            policy.model.set_attn_implementation({"text_config": ATTENTION_NAME})

    return run


def unshared(prompts: Prompts) -> list[PromptLoad]:
    """Loads of a branch with a prompt for every response."""
    return prompt_loads([(prompt, [tokens]) for prompt, tokens in flat(prompts)])


def to_longest(prompts: Prompts) -> list[PromptLoad]:
    """Loads of a branch padded to its longest response."""
    longest = max(len(tokens) for _, tokens in flat(prompts))
    return [one._replace(responses=[longest]) for one in unshared(prompts)]


@dataclass(frozen=True)
class Method:
    """A way to compute the step, and the loads from which its FLOPs are counted."""

    make: Callable[[Policy, Sequence[Micro]], RunStep]
    loads: Callable[[Prompts], list[PromptLoad]]
    prompt_logits: bool = False
    """Whether the head also computes logits of prompt tokens."""


METHODS = {
    "ours": Method(ours, prompt_loads),
    "one_by_one": Method(plain(one_by_one), unshared, prompt_logits=True),
    "padded": Method(plain(padded), to_longest),
    "no_sharing": Method(no_sharing, unshared),
    "plain_head": Method(plain_head, prompt_loads),
    "prefix_grouper": Method(grouper_step, prompt_loads, prompt_logits=True),
}
GPU_METHODS = {
    "ours_liger": Method(changed(liger), prompt_loads),
    "ours_compiled": Method(changed(compiled), prompt_loads),
}
