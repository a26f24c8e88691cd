"""Many requests at once in a pool that is too small: chunks of prompts, preemption and shared prefixes are forced."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import pytest

from segue.engine.config import HandoffConfig
from segue.engine.messages import Finished
from segue.types import LoraSource, Tier
from tests.engine.harness import EngineHarness
from tests.engine.worlds import ADAPTERS, FEATURES, HALF_DTYPES, SHAPES, World, build_world

NEW_TOKENS = 32
REQUESTS = 32
PAGE_TOKENS = 4
# What KV may take: about a third of what all requests together would.
KV_PAGES = 200
NAMES = [*ADAPTERS, *FEATURES, *HALF_DTYPES, None, None]
# Which adapters are on the device when the requests come.
HOT: dict[str, tuple[str, ...]] = {
    "all cold": (),
    "some hot": ("r8", "mixed", "regex", "rslora"),
    "all hot": (*ADAPTERS, *FEATURES, *HALF_DTYPES),
}


@pytest.fixture(scope="module", params=SHAPES, ids=str)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return build_world(tmp_path_factory.mktemp("pressure"), SHAPES[request.param], with_features=True)


@dataclass(frozen=True)
class Asked:
    adapter: str | None
    prompt: list[int]


def requests() -> list[Asked]:
    """Every adapter twice, the second time with a prompt that begins as the first one's."""
    generator = random.Random(8)
    asked = []
    for name in NAMES:
        first = [generator.randrange(3, 256) for _ in range(generator.randint(20, 50))]
        second = first[: generator.randint(12, 19)] + [generator.randrange(3, 256) for _ in range(9)]
        asked += [Asked(name, first), Asked(name, second)]
    generator.shuffle(asked)
    return asked


@pytest.mark.parametrize(
    ("mode", "hot", "runs_ahead"),
    [
        ("auto", "some hot", False),
        ("auto", "all cold", True),
        ("auto", "all hot", True),
        ("fixed", "all cold", True),
    ],
)
def test_answers_do_not_depend_on_the_crowd(world: World, mode: str, hot: str, runs_ahead: bool, device: str) -> None:
    """``fixed``: every pass of a loading adapter runs on the CPU workers to its last layer."""
    asked = requests()
    handoff = HandoffConfig(mode=mode, cpu_layers=world.layers if mode == "fixed" else 0)
    settings = {
        "device": device,
        "page_tokens": PAGE_TOKENS,
        "budget_tokens": 24,
        "chunk_tokens": 5,
        "max_running": REQUESTS,
        "copy_bytes_per_second": 20e6,
        "handoff": handoff,
        "runs_ahead": runs_ahead,
    }
    with EngineHarness(world.model_dir, world.adapters_dir, pages=4000, **settings) as harness:
        versions = {name: harness.open(name) for name in NAMES if name is not None}
        adapter_pages = sum(harness.instance.store.device_pages(version_id) for version_id in versions.values())
    with EngineHarness(world.model_dir, world.adapters_dir, pages=adapter_pages + KV_PAGES, **settings) as harness:
        for name in HOT[hot]:
            harness.warm(name)
        numbers = [harness.submit(item.prompt, item.adapter, max_tokens=NEW_TOKENS, logprobs=0) for item in asked]
        assert len(harness.engine.requests) == len(asked) >= REQUESTS
        decodes_beside_chunks = 0
        while not all(harness.answers[number].ended for number in numbers):
            decodes_beside_chunks += _has_both(harness)
            harness.step()
        for number, item in zip(numbers, asked, strict=True):
            world.compare(item.adapter, item.prompt, harness.answers[number], NEW_TOKENS)
        ended = [_finished(harness, number) for number in numbers]
        assert any(item.timing.prefill_attempts > 1 for item in ended), "nobody was preempted"
        assert sum(item.cached_prompt_tokens > 0 for item in ended) >= 8, "few prefixes were shared"
        assert decodes_beside_chunks > 10, "no prompt was computed in chunks beside decodes"
        sources = {layer.source for item in ended for layer in item.timing.layers}
        assert sources >= ({LoraSource.DEVICE} if hot == "all hot" else {LoraSource.CPU, LoraSource.DEVICE})
        landed = {item.adapter for item, end in zip(asked, ended, strict=True) if end.timing.tier is Tier.DEVICE}
        loading = {
            item.adapter for item, end in zip(asked, ended, strict=True) if end.timing.tier in (Tier.DISK, Tier.HOST)
        }
        assert landed >= set(HOT[hot]), "an adapter was not hot"
        assert loading >= versions.keys() - set(HOT[hot]), "an adapter was not cold"
        state = harness.instance.state(0)
        assert state.free_pages + state.cached_pages + state.adapter_pages == harness.config.pages


SAMPLING: tuple[dict[str, Any], ...] = (
    {"temperature": 1.0},
    {"temperature": 0.7, "top_p": 0.9, "top_k": 40},
    {"temperature": 1.3, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.3, "logit_bias": {7: 2.0, 9: -4.0}},
)


@pytest.mark.parametrize("runs_ahead", [False, True])
def test_a_seed_gives_the_same_tokens_alone_and_in_a_crowd(world: World, runs_ahead: bool, device: str) -> None:
    asked = requests()
    sampling = [{"seed": 1000 + place, **SAMPLING[place % len(SAMPLING)]} for place in range(len(asked))]
    settings = {
        "device": device,
        "page_tokens": PAGE_TOKENS,
        "budget_tokens": 24,
        "chunk_tokens": 5,
        "copy_bytes_per_second": 20e6,
        "runs_ahead": runs_ahead,
    }
    with EngineHarness(world.model_dir, world.adapters_dir, pages=4000, prefix_cache=False, **settings) as harness:
        alone = []
        for item, options in zip(asked, sampling, strict=True):
            number = harness.submit(item.prompt, item.adapter, max_tokens=NEW_TOKENS, **options)
            harness.run()
            alone.append(harness.answers[number].tokens)
        adapter_pages = harness.instance.store.device_pages_held
    with EngineHarness(world.model_dir, world.adapters_dir, pages=adapter_pages + KV_PAGES, **settings) as harness:
        numbers = [
            harness.submit(item.prompt, item.adapter, max_tokens=NEW_TOKENS, **options)
            for item, options in zip(asked, sampling, strict=True)
        ]
        harness.run()
        assert [harness.answers[number].tokens for number in numbers] == alone
        ended = [_finished(harness, number) for number in numbers]
        assert any(item.timing.prefill_attempts > 1 for item in ended), "nobody was preempted"
        assert any(item.cached_prompt_tokens > 0 for item in ended), "no prefix was shared"


def _has_both(harness: EngineHarness) -> bool:
    """Whether some requests decode while another is in the middle of its prompt, outside of any pass."""
    admitted = [item for item in harness.engine.requests.admitted if not item.is_busy]
    decode = [item.planned_computed_tokens == item.planned_tokens - 1 for item in admitted]
    middle = [0 < item.planned_computed_tokens < len(item.submit.prompt_token_ids) - 1 for item in admitted]
    return any(decode) and any(middle)


def _finished(harness: EngineHarness, number: int) -> Finished:
    finished = harness.answers[number].finished
    assert finished is not None
    return finished
