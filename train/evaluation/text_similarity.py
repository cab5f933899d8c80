"""Similarity of texts by a text encoder; each distinct text is embedded once and kept on disk."""

from __future__ import annotations

from collections.abc import Iterable
from hashlib import blake2b
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModel, AutoTokenizer

from tercet.core.data.kept_rows import kept_rows
from tercet.train.evaluation.progress import Steps

MAX_TOKENS = 64
"""Every text is padded or cut to as many, as the released script does."""
AT_ONCE = 256
SMALL = 10**7
"""Parameters up to which several threads cost more time in waiting than they save."""
PROBES = ("object", "a photo of a bird", "Boeing 737-200")
"""Texts whose embeddings tell one encoder from another."""


class TextEncoder:
    """A text encoder that transformers loads, in float32 (SigLIP, CLIP, or a text model alone).

    Args:
        path: folder or hub id of the model with its tokenizer.
        device: where it runs.
        option: that named it, for errors.

    Raises:
        ValueError: naming the path, when it cannot be loaded.
    """

    def __init__(
        self, path: str, device: str | torch.device = "cpu", option: str = "--text_encoder"
    ):
        self.path, self.device, self._option = path, device, option
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
            model = AutoModel.from_pretrained(path, trust_remote_code=False, dtype=torch.float32)
        except (OSError, ValueError, KeyError, ImportError) as error:
            reason = " ".join(str(error).split())[:300]
            without = " (--text_encoder null leaves the similarity out)"
            hint = without if option == "--text_encoder" else ""
            raise ValueError(f"{option} {path!r} cannot be loaded: {reason}{hint}") from error
        self.model = model.to(device).eval()
        self._encode = getattr(model, "get_text_features", model)
        self._small = sum(parameter.numel() for parameter in model.parameters()) <= SMALL

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> np.ndarray:
        """Embeddings [N, D] float32 of unit length, from everything that the tokenizer returns.

        Raises:
            ValueError: the encoder gives no pooled embedding, or one that is not finite.
        """
        inputs = self._tokenizer(
            texts,
            padding="max_length",
            truncation=True,
            max_length=MAX_TOKENS,
            return_tensors="pt",
        ).to(self.device)
        threads = torch.get_num_threads()
        torch.set_num_threads(1 if self._small else threads)
        try:
            found = self._encode(**inputs)
        finally:
            torch.set_num_threads(threads)
        features = found if isinstance(found, torch.Tensor) else found.pooler_output
        if features is None:
            raise ValueError(f"{self._option} {self.path!r} gives no pooled text embedding")
        features = features / features.norm(dim=-1, keepdim=True)
        bad = (~features.isfinite().all(dim=-1)).nonzero().flatten().tolist()
        if bad:
            raise ValueError(
                f"{self._option} {self.path!r} gives no finite embedding of {texts[bad[0]][:80]!r}"
            )
        return features.float().cpu().numpy()


class Embeddings:
    """The embeddings of texts, computed once and kept in an SQLite file.

    Args:
        encoder: the text encoder.
        file: SQLite file of earlier embeddings; made where there is none.
    """

    def __init__(self, encoder: TextEncoder, file: Path):
        self._encoder, self._file = encoder, file
        self._rows: dict[str, int] = {}
        self._matrix = np.zeros((0, 0), np.float32)
        self._identity = blake2b(encoder(list(PROBES)).tobytes(), digest_size=16).digest()

    def add(self, texts: Iterable[str]) -> None:
        """Embed the texts that were not embedded yet.

        Raises:
            ValueError: the file is no database, or another process writes to it for too long.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._rows]
        if not new:
            return
        ids = [blake2b(self._identity + text.encode(), digest_size=16).digest() for text in new]
        found = []
        with Steps("texts", len(new)) as steps:
            for rows in kept_rows(
                self._file, ids, lambda places: self._encoder([new[n] for n in places]), AT_ONCE
            ):
                found.append(rows)
                steps.advance(len(rows))
        self._rows |= {text: len(self._rows) + n for n, text in enumerate(new)}
        self._matrix = np.concatenate([self._matrix, *found] if self._matrix.size else found)

    def similarities(self, texts: list[str], others: list[str]) -> np.ndarray:
        """[N] float64: cosine of each text and the other one of its place; all were added."""
        cosines = np.empty(len(texts))
        for start in range(0, len(texts), 4096):  # the vectors of all pairs may not fit
            part = slice(start, start + 4096)
            pair = [self._matrix[[self._rows[t] for t in x[part]]] for x in (texts, others)]
            one, other = (rows.astype(np.float64) for rows in pair)
            norms = np.linalg.norm(one, axis=1) * np.linalg.norm(other, axis=1)
            cosines[part] = (one * other).sum(axis=1) / norms
        return cosines
