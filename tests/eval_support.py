"""Text encoders with random weights, and the released script's rules written out one by one."""

from __future__ import annotations

import re
from pathlib import Path

import sentencepiece
import torch
from transformers import (
    AutoModel,
    AutoTokenizer,
    SiglipConfig,
    SiglipModel,
    SiglipTextConfig,
    SiglipTokenizer,
    SiglipVisionConfig,
)

CORPUS = [
    "a photo of a bird, a car, an aircraft, a flower, an object",
    "Black Footed Albatross Laysan Albatross Boeing 737-200 hard-leaved pocket orchid",
    "Acura RL Sedan 2012 Ferrari 458 Italia Convertible 2012 the quick brown fox jumps over it",
    "I think this is the answer because of its wings, bill and colour",
]


def siglip(folder: Path, seed: int = 0, hidden: int = 32, mask: bool = False) -> Path:
    """Save a SigLIP with random weights; `mask`: its tokenizer returns an attention mask."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "corpus.txt").write_text("\n".join(CORPUS * 20))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "corpus.txt"),
        model_prefix=str(folder / "spiece"),
        vocab_size=80,
        pad_id=3,
        minloglevel=2,
    )
    names = ["input_ids", "attention_mask"] if mask else ["input_ids"]
    tokenizer = SiglipTokenizer(str(folder / "spiece.model"), model_input_names=names)
    tokenizer.save_pretrained(folder)
    sizes = dict(hidden_size=hidden, intermediate_size=48, num_hidden_layers=2)
    text = SiglipTextConfig(
        **sizes, num_attention_heads=2, vocab_size=80, max_position_embeddings=64
    )
    vision = SiglipVisionConfig(**sizes, num_attention_heads=2, image_size=16, patch_size=8)
    torch.manual_seed(seed)
    model = SiglipModel(SiglipConfig(text_config=text.to_dict(), vision_config=vision.to_dict()))
    with torch.no_grad():  # else all texts are nearly alike
        for name, parameter in model.text_model.named_parameters():
            if "norm" not in name:
                parameter.normal_(0, 0.4)
    model.save_pretrained(folder)
    return folder


class Released:
    """The published evaluation's rules, one answer at a time; `facts` are its own words."""

    def __init__(self, encoder: str | Path):
        self.tokenizer = AutoTokenizer.from_pretrained(str(encoder))
        self.model = AutoModel.from_pretrained(str(encoder), dtype=torch.float32).eval()
        self.known: dict[str, torch.Tensor] = {}

    def embedding(self, text: str) -> torch.Tensor:
        if text not in self.known:
            inputs = self.tokenizer(
                [text], padding="max_length", truncation=True, max_length=64, return_tensors="pt"
            )
            with torch.no_grad():
                found = self.model.get_text_features(**inputs)
            found = getattr(found, "pooler_output", found)
            self.known[text] = (found / found.norm(dim=-1, keepdim=True))[0]
        return self.known[text]

    def cosine(self, one: str, other: str) -> float:
        pair = self.embedding(one), self.embedding(other)
        return torch.nn.functional.cosine_similarity(*pair, dim=0).item()

    @staticmethod
    def answer(output: str) -> str | None:
        found = re.search("<answer>(.*)</answer>", output, re.DOTALL)
        return found.group(1).strip() if found else None

    def closed(self, output: str, truth: str) -> float:
        answer = self.answer(output)
        if not answer:
            return 0.0
        return float(truth.lower().replace("_", " ") in answer.lower().replace("_", " "))

    @staticmethod
    def word(path: str) -> str:
        if "aircraft" in path:
            return "aircraft"
        if "birds" in path:
            return "bird"
        if "cars" in path:
            return "car"
        return "flower" if "flower" in path else "object"

    def inclusion(self, output: str, truth: str, path: str) -> float:
        said = (self.answer(output) or output).lower()
        if self.word(path) == "car":
            return float(" ".join(truth.lower().split()[:-2]) in said)
        return float(truth.lower().replace("_", " ") in said)

    def similarity(self, output: str, truth: str, path: str) -> float:
        base = self.cosine(self.word(path), truth)
        if base >= 1 - 1e-6:
            return 0.0
        said = self.answer(output) or output
        return max(0.0, (self.cosine(said, truth) - base) / (1 - base))
