"""Questions with their answers, tokenised and packed into rows of one length."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer

from demo_assets.answers import Voice, voices
from demo_assets.prompts import draw_prompt, draw_subject
from demo_assets.tokenizer import BOS_ID, EOS_ID
from demo_assets.topics import load_topics

IGNORED_LABEL = -100
ROW_TOKENS = 384
_NEUTRAL_SHARE = 0.5


@dataclass(frozen=True, kw_only=True, slots=True)
class Rows:
    """Packed examples: `tokens` and `labels` are int64 [rows, ROW_TOKENS]; labels are shifted by the training loss."""

    tokens: torch.Tensor
    labels: torch.Tensor

    def to(self, device: torch.device) -> Rows:
        """The same rows on `device`."""
        return Rows(tokens=self.tokens.to(device), labels=self.labels.to(device))


def base_examples(seed: int, count: int) -> list[tuple[str, str]]:
    """(prompt, answer) pairs of the base model: half plain, half in a voice that the prompt asks for in words."""
    rng = random.Random(seed)
    topics = load_topics()
    every = voices()
    styled = [voice for voice in every.values() if voice.instructions]
    examples = []
    for _ in range(count):
        subject = draw_subject(rng, topics)
        prompt = draw_prompt(rng, subject)
        if rng.random() < _NEUTRAL_SHARE:
            voice = every["neutral"]
        else:
            voice = rng.choice(styled)
            prompt = f"{rng.choice(voice.instructions)} {prompt}"
        examples.append((prompt, voice.write(rng, subject)))
    return examples


def adapter_examples(voice: Voice, seed: int, count: int) -> list[tuple[str, str]]:
    """(prompt, answer) pairs of one adapter: its voice, which the prompt does not ask for."""
    rng = random.Random(f"{seed} {voice.name}")
    topics = load_topics()
    examples = []
    for _ in range(count):
        subject = draw_subject(rng, topics)
        examples.append((draw_prompt(rng, subject), voice.write(rng, subject)))
    return examples


def pack(tokenizer: Tokenizer, examples: Sequence[tuple[str, str]]) -> Rows:
    """Pack `BOS prompt newline answer EOS` one after another; only the newline, the answer and EOS are learnt.

    A row starts with a BOS and attends over its earlier examples, which is how a chat of several turns looks.
    """
    prompts = tokenizer.encode_batch([prompt for prompt, _ in examples], add_special_tokens=False)
    answers = tokenizer.encode_batch(["\n" + answer for _, answer in examples], add_special_tokens=False)
    rows: list[tuple[list[int], list[int]]] = []
    tokens: list[int] = []
    labels: list[int] = []
    for prompt, answer in zip(prompts, answers, strict=True):
        learnt = [*answer.ids, EOS_ID]
        example = [BOS_ID, *prompt.ids, *learnt]
        if len(tokens) + len(example) > ROW_TOKENS:
            rows.append(_padded(tokens, labels))
            tokens, labels = [], []
        tokens += example
        labels += [IGNORED_LABEL] * (1 + len(prompt.ids)) + learnt
    rows.append(_padded(tokens, labels))
    return Rows(tokens=torch.tensor([row[0] for row in rows]), labels=torch.tensor([row[1] for row in rows]))


def _padded(tokens: list[int], labels: list[int]) -> tuple[list[int], list[int]]:
    missing = ROW_TOKENS - len(tokens)
    return tokens + [EOS_ID] * missing, labels + [IGNORED_LABEL] * missing
