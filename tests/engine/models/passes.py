"""Driving a model's forward pass in tests: a poisoned pool, interleaved pages, greedy decoding."""

from __future__ import annotations

import random
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from segue.engine.attention import TorchAttention
from segue.engine.batch import SequenceInput, build_batch
from segue.engine.lora.points import LoraHook, NullLora
from segue.engine.memory.pool import PagePool
from segue.engine.models.config import ModelConfig
from segue.engine.models.decoder import DecoderModel
from segue.engine.models.rope import RotaryEmbedding


@dataclass
class Sequenced:
    """One sequence under test: all its tokens, and how many of them have KV."""

    tokens: list[int]
    pages: tuple[int, ...]
    cached: int = 0


@dataclass
class Runner:
    """A model over a pool whose pages are NaN until written; pages are dealt out in random order."""

    model: DecoderModel
    pool: PagePool
    deal: random.Random = field(default_factory=lambda: random.Random(0))
    yields: int = 0

    def add(self, tokens: Sequence[int], max_tokens: int) -> Sequenced:
        """A sequence with room for ``max_tokens`` tokens, its pages scattered among all that are free."""
        free = list(self.pool.allocate(self.pool.free_pages, "shuffle"))
        self.deal.shuffle(free)
        count = self.pool.token_pages(max_tokens)
        self.pool.free(free[count:])
        return Sequenced(list(tokens), tuple(free[:count]))

    def run(self, parts: Sequence[tuple[Sequenced, int, int]], lora: LoraHook | None = None) -> Tensor:
        """One pass over the next ``rows`` tokens of each (sequence, rows, logit_tokens): logits [L, vocab]."""
        inputs = [
            SequenceInput(
                token_ids=sequence.tokens[sequence.cached : sequence.cached + rows],
                context_tokens=sequence.cached,
                pages=sequence.pages,
                logit_tokens=logit_tokens,
            )
            for sequence, rows, logit_tokens in parts
        ]
        logits = self.drive(self.forward(inputs, lora))
        for sequence, rows, _ in parts:
            sequence.cached += rows
        return logits

    def forward(self, inputs: Sequence[SequenceInput], lora: LoraHook | None = None) -> Generator[None, None, Tensor]:
        """A pass over these rows that has not begun."""
        batch = build_batch(inputs, self.pool.page_tokens)
        attention = TorchAttention(
            self.pool,
            self.model.config.sliding_windows,
            RotaryEmbedding(self.model.config.rope, self.model.config.head_dim),
        ).begin(batch)
        return self.model.forward(batch, attention, lora or NullLora())

    def drive(self, forward: Generator[None, None, Tensor]) -> Tensor:
        """Advance a pass to its end, each step in its own inference mode, and count its yields."""
        self.yields = 0
        while True:
            with torch.inference_mode():
                try:
                    next(forward)
                except StopIteration as stop:
                    logits: Tensor = stop.value
                    return logits
            self.yields += 1

    def greedy(
        self, prompts: Sequence[Sequence[int]], new_tokens: int, lora: LoraHook | None = None
    ) -> list[tuple[int, ...]]:
        """Prefill all prompts in one pass, then decode them together greedily."""
        sequences = [self.add(prompt, len(prompt) + new_tokens) for prompt in prompts]
        rows = [len(prompt) for prompt in prompts]
        for _ in range(new_tokens):
            logits = self.run([(sequence, count, 1) for sequence, count in zip(sequences, rows, strict=True)], lora)
            for sequence, token in zip(sequences, logits.argmax(-1).tolist(), strict=True):
                sequence.tokens.append(token)
            rows = [1] * len(prompts)
        return [tuple(sequence.tokens[-new_tokens:]) for sequence in sequences]


def make_runner(
    model_dir: Path, *, pages: int = 96, page_tokens: int = 16, dtype: torch.dtype = torch.float32
) -> Runner:
    """The checkpoint's model over a fresh poisoned pool."""
    config = ModelConfig.load(model_dir)
    pool = PagePool(
        layers=config.layers,
        pages=pages,
        page_tokens=page_tokens,
        kv_heads=config.kv_heads,
        head_dim=config.head_dim,
        dtype=dtype,
        poison_freed=True,
    )
    return Runner(DecoderModel.load(model_dir, config, dtype), pool)


def random_tokens(count: int, seed: int, vocab_size: int = 256) -> tuple[int, ...]:
    draw = random.Random(seed)
    return tuple(draw.randrange(3, vocab_size) for _ in range(count))


def logprob_error(logits: Tensor, reference: Tensor) -> float:
    """The largest difference of log probabilities."""
    return float((logits.log_softmax(-1) - reference.log_softmax(-1)).abs().max())
