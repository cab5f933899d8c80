"""The prompt of each triplet: its wording, the options that it shows, and its length."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from transformers import PreTrainedTokenizerBase

from tercet.core.data.vision import PromptEncoder
from tercet.core.draws import digest_int
from tercet.core.prompts import LETTERS, WITH_LETTERS, chat_ids, read_prompt, training_text
from tercet.core.rollout_config import RolloutConfig
from tercet.core.types import Anchor, Triplet

Nearest = Mapping[str, Mapping[str, Sequence[str]]]
"""By super-category and sub-category: the most similar others, nearest first."""


class TrainingPrompts:
    """Makes the prompts of a run (`rollout.prompt`).

    Args:
        tokenizer: with the chat template.
        encoder: counts a prompt's tokens, those of its photo included.
        config: prompt, choices and max_prompt_tokens are used.
        nearest: where options come from.
        system_prompt: system message of every prompt.
        seed: of the run; with the triplet's id it gives the order of its options.

    Raises:
        ValueError: an unknown prompt, a template without {question}, or too few choices.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        encoder: PromptEncoder,
        config: RolloutConfig,
        nearest: Nearest,
        system_prompt: str | None,
        seed: int,
    ):
        self._tokenizer, self._encoder, self._config = tokenizer, encoder, config
        self._nearest, self._system_prompt, self._seed = nearest, system_prompt, seed
        self._prompt = read_prompt(config.prompt)
        has_options = self._prompt in WITH_LETTERS or "{options}" in self._prompt
        self._shown = config.choices if has_options else 0
        if has_options and config.choices < (0 if self._prompt == "attribute" else 2):
            raise ValueError(
                f"rollout.choices must be at least 2 with rollout.prompt {config.prompt}, got "
                f"{config.choices}"
            )
        if self._shown == 1:
            raise ValueError("rollout.choices must be 0 or at least 2, got 1")
        self._ids: dict[str, tuple[int, ...]] = {}
        """By text."""

    def options(self, of: Triplet | Anchor) -> tuple[str, ...]:
        """The options that its prompt shows, in their order; empty where it shows none.

        Raises:
            ValueError: no similar sub-categories of its own are known.
        """
        if not self._shown:
            return ()
        others = self._nearest.get(of.super_category, {}).get(of.sub_category, ())
        if not others:
            raise ValueError(
                f"rollout.prompt {self._config.prompt} shows options, but the data names no "
                f"sub-categories similar to {of.sub_category!r}"
            )
        options = [of.sub_category, *others[: self._shown - 1]]
        return tuple(
            sorted(options, key=lambda name: digest_int(f"{self._seed}/{of.id}/{name}".encode()))
        )

    def letter(self, of: Triplet) -> str | None:
        """The letter of the true option; None where no letters are shown."""
        options = self.options(of)
        return LETTERS[options.index(of.sub_category)] if options else None

    def ids(self, of: Triplet | Anchor, photos: Iterable[str]) -> tuple[int, ...]:
        """Prompt ids of its question, which fits the limit with each of the photos.

        Raises:
            ValueError: naming the photo with which the prompt is too long.
        """
        text = training_text(self._prompt, of.question, self.options(of))
        if text not in self._ids:
            messages = [{"role": "user", "content": "<image>" + text}]
            ids = chat_ids(self._tokenizer, messages, 1, system_prompt=self._system_prompt)
            self._ids[text] = tuple(ids)
        for image in photos:
            length = self._encoder.length(self._ids[text], (image,))
            if length > self._config.max_prompt_tokens:
                raise ValueError(
                    f"triplet {of.id!r}, image {image!r}: the prompt has {length} tokens; "
                    f"rollout.max_prompt_tokens is {self._config.max_prompt_tokens} (prompts are "
                    "never cut: lower model.max_pixels or raise the limit)"
                )
        return self._ids[text]
