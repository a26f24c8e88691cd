"""Hundreds of adapters of mixed ranks on a pool that holds twenty, asked for by Zipf's law, 32 requests at a time."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from segue.engine.lora.checkpoint import WEIGHTS_FILE
from segue.types import Tier
from tests.checkpoints import (
    ALL_TARGETS,
    ATTENTION_TARGETS,
    TinyModel,
    load_reference,
    reference_greedy,
    write_random_adapter,
    write_random_model,
)
from tests.engine.harness import EngineHarness

ADAPTERS = 300
RESIDENT = 20
REQUESTS = 600
AT_A_TIME = 32
NEW_TOKENS = 10
PROMPT_TOKENS = (2, 40)
PAGE_TOKENS = 8
SHAPES = [
    (rank, targets)
    for rank in (1, 4, 8, 16, 32, 64)
    for targets in (("q_proj", "v_proj"), ATTENTION_TARGETS, ALL_TARGETS)
]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """One adapter of each shape is PEFT's; the others have its configuration and weights of their own."""
    root = tmp_path_factory.mktemp("many")
    model_dir = write_random_model(root / "model", TinyModel(layers=2), seed=21)
    for index in range(ADAPTERS):
        rank, targets = SHAPES[index % len(SHAPES)]
        folder = root / "adapters" / name_of(index)
        if index < len(SHAPES):
            write_random_adapter(folder, model_dir, rank=rank, targets=targets, seed=index)
            continue
        shutil.copytree(root / "adapters" / name_of(index % len(SHAPES)), folder)
        weights = load_file(folder / WEIGHTS_FILE)
        generator = torch.Generator().manual_seed(index)
        save_file(
            {name: tensor[torch.randperm(len(tensor), generator=generator)] for name, tensor in weights.items()},
            folder / WEIGHTS_FILE,
        )
    return model_dir, root / "adapters"


def name_of(index: int) -> str:
    return f"a{index:03d}"


def test_six_hundred_requests_by_zipfs_law(folders: tuple[Path, Path], device: str) -> None:
    """No error, every page accounted for after every step, right answers, and nobody is overtaken.

    The harness checks the engine's invariants after every step, the sum of pages among them. With 32 at a time and no
    overtaking, a request waits behind at most the 31 that were there when it came.
    """
    model_dir, adapters_dir = folders
    generator = random.Random(4)
    weights = [1 / (place + 1) for place in range(ADAPTERS)]
    order = generator.sample(range(ADAPTERS), ADAPTERS)
    asked = [
        (
            name_of(order[generator.choices(range(ADAPTERS), weights)[0]]),
            [generator.randrange(3, 256) for _ in range(generator.randint(*PROMPT_TOKENS))],
        )
        for _ in range(REQUESTS)
    ]
    names = {name for name, _ in asked}
    with EngineHarness(model_dir, adapters_dir, page_tokens=PAGE_TOKENS, pages=4000, cpu_workers=0) as harness:
        sizes = [harness.instance.store.device_pages(harness.open(name_of(index))) for index in range(len(SHAPES))]
    kv_pages = AT_A_TIME * -(-(PROMPT_TOKENS[1] + NEW_TOKENS) // PAGE_TOKENS)
    pages = RESIDENT * sum(sizes) // len(sizes) + kv_pages
    settings = {"device": device, "page_tokens": PAGE_TOKENS, "max_running": AT_A_TIME, "host_store_bytes": 2 << 20}
    with EngineHarness(model_dir, adapters_dir, pages=pages, **settings) as harness:
        numbers: list[int] = []
        began: list[int] = []
        while len(numbers) < REQUESTS or not all(answer.ended for answer in harness.answers.values()):
            while len(numbers) < REQUESTS and len(harness.engine.requests) < AT_A_TIME:
                name, prompt = asked[len(numbers)]
                numbers.append(harness.submit(prompt, name, max_tokens=NEW_TOKENS))
            waiting = {request.number for request in harness.engine.requests.queue}
            harness.step()
            began += sorted(waiting - {request.number for request in harness.engine.requests.queue} - set(began))
        assert [harness.answers[number].failed for number in numbers] == [None] * REQUESTS
        assert began == numbers, "somebody was overtaken"
        check_answers(harness, model_dir, adapters_dir, asked)
        tiers = [finished.timing.tier for answer in harness.answers.values() if (finished := answer.finished)]
        assert len(names) > 5 * RESIDENT
        assert tiers.count(Tier.DEVICE) > 0 < tiers.count(Tier.DISK)


def check_answers(
    harness: EngineHarness, model_dir: Path, adapters_dir: Path, asked: list[tuple[str, list[int]]]
) -> None:
    """Every tenth answer is PEFT's."""
    for number in range(1, REQUESTS + 1, 10):
        name, prompt = asked[number - 1]
        expected = reference_greedy(load_reference(model_dir, adapters_dir / name), prompt, NEW_TOKENS)
        assert tuple(harness.answers[number].tokens) == expected, f"request {number}, adapter {name}"
