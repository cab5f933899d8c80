"""Under torchrun: one rank has a pack of texts, the others have photos; writes what they learn.

torchrun --nproc-per-node 2 text_rank.py POLICY_FOLDER PHOTO PHOTO OUT
"""

from __future__ import annotations

import sys

import torch
from torch.distributed.tensor import DTensor

from tercet.core.config import ModelConfig, ParallelConfig, SftConfig
from tercet.core.data.vision import PromptEncoder
from tercet.core.packing import plain_batch
from tercet.core.prompts import chat_ids
from tercet.core.types import MicroBatch, PolicyParts
from tercet.train.cli.command_line import command
from tercet.train.learner.ranks import Ranks
from tercet.train.run.assemble import build_policy, open_parts

ROWS = 12.0


def micro_batches(parts: PolicyParts, photos: list[str]) -> list[MicroBatch]:
    """One of a question without a photo, one of a question with two."""
    encoder = PromptEncoder(parts)

    def prompt(*keys: str):
        text = "<image>" * len(keys) + "What bird is this?"
        ids = chat_ids(parts.tokenizer, [{"role": "user", "content": text}], len(keys))
        return encoder(tuple(ids), keys)

    answers = [tuple(range(20, 24)), (30, 31)]
    return [plain_batch([(p, answers)], ROWS) for p in (prompt(), prompt(*photos))]


def main(folder: str, *words: str) -> None:
    *photos, out = words
    torch.set_num_threads(1)
    ranks = Ranks(torch.device("cpu"), ParallelConfig(timeout_s=60))
    config = SftConfig(model=ModelConfig(path=folder, freeze_vision=False, freeze_merger=False))
    parts = open_parts(config.model, ranks, None)
    policy = build_policy(parts, config, ranks)
    loss, _ = policy(micro_batches(parts, photos)[ranks.rank], "cross_entropy")
    loss.backward()
    whole = {
        name: p.grad.full_tensor() if isinstance(p.grad, DTensor) else p.grad
        for name, p in parts.model.named_parameters()
    }
    if ranks.is_first:
        torch.save(whole, out)
    ranks.exchange(None)  # none ends before the others are done


if __name__ == "__main__":
    command(lambda: main(*sys.argv[1:]))
