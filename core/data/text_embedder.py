"""Text embeddings by a transformers encoder: the mean over a text's tokens, of unit length."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from transformers import AutoModel, AutoTokenizer

TEXTS_AT_ONCE = 32
MOST_TOKENS = 512


def text_embedder(
    path: str, device: str | torch.device = "cpu"
) -> Callable[[Sequence[str]], Tensor]:
    """Embed by an encoder such as E5 or BERT.

    Args:
        path: folder or hub id of the model with its tokenizer.
        device: where it runs.

    Returns:
        A function from texts to embeddings [N, D] float32 of unit length on the CPU.

    Raises:
        ValueError: naming the path, when it cannot be loaded.
    """
    try:
        model = AutoModel.from_pretrained(path, trust_remote_code=False).to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        raise ValueError(f"the text embedder {path!r} cannot be loaded: {text}") from error
    most = min(MOST_TOKENS, getattr(model.config, "max_position_embeddings", MOST_TOKENS))

    @torch.no_grad()
    def embed(texts: Sequence[str]) -> Tensor:
        rows = [torch.zeros(0, model.config.hidden_size)]
        for start in range(0, len(texts), TEXTS_AT_ONCE):
            inputs = tokenizer(
                list(texts[start : start + TEXTS_AT_ONCE]),
                padding=True,
                truncation=True,
                max_length=most,
                return_tensors="pt",
            ).to(device)
            hidden = model(**inputs).last_hidden_state.float()  # [texts, tokens, D]
            mask = inputs["attention_mask"].unsqueeze(-1).float()
            means = (hidden * mask).sum(dim=1) / mask.sum(dim=1)
            rows.append(torch.nn.functional.normalize(means, dim=1).cpu())
        return torch.cat(rows)

    return embed
