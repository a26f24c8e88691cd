"""Adapters that find no pages are served by the CPU workers at once, and go over when there are some."""

from __future__ import annotations

import os
import signal

import pytest

from segue.engine.config import HandoffConfig
from segue.engine.messages import Finished
from segue.engine.request import RequestState
from segue.types import FinishReason, LoraSource
from tests.checkpoints import ALL_TARGETS, TinyModel, write_random_adapter, write_random_model
from tests.engine.harness import EngineHarness
from tests.engine.worlds import World, prompts

NAMES = ("a", "b", "c", "d")
LAYERS = 3
NEW_TOKENS = 24
PAGE_TOKENS = 8
# Of the prompts' and the answers' KV.
KV_PAGES = 4 * (-(-(45 + NEW_TOKENS) // PAGE_TOKENS) + 1)
ROOM_FOR = 2


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("cpu-decode")
    model_dir = write_random_model(root / "model", TinyModel(layers=LAYERS), seed=31)
    for seed, name in enumerate(NAMES):
        write_random_adapter(root / "adapters" / name, model_dir, rank=64, targets=ALL_TARGETS, seed=seed)
    return World(model_dir, root / "adapters", LAYERS)


def small_pool(world: World, **config: object) -> EngineHarness:
    """Room for two of the four adapters, and for the KV of four requests.

    Without a planner, which would have some wait where that is sooner on this machine.
    """
    handoff = HandoffConfig(mode="fixed")
    settings: dict[str, object] = {"page_tokens": PAGE_TOKENS, "handoff": handoff, **config}
    with EngineHarness(world.model_dir, world.adapters_dir, cpu_workers=0, page_tokens=PAGE_TOKENS) as harness:
        adapter_pages = harness.instance.store.device_pages(harness.open("a"))
    assert adapter_pages > KV_PAGES, "the KV's pages would hold a third adapter"
    return EngineHarness(world.model_dir, world.adapters_dir, pages=ROOM_FOR * adapter_pages + KV_PAGES, **settings)


def in_host(harness: EngineHarness) -> None:
    """Bring all adapters to host memory."""
    for name in NAMES:
        harness.instance.store.start_load(harness.open(name))
    harness.run_until(lambda: all(harness.instance.store.is_verified(harness.open(name)) for name in NAMES))


def submit_all(harness: EngineHarness, max_tokens: int = NEW_TOKENS) -> dict[int, tuple[str, list[int]]]:
    asked = dict(zip(NAMES, prompts(len(NAMES), seed=5), strict=True))
    return {
        harness.submit(prompt, name, max_tokens=max_tokens, logprobs=0): (name, prompt)
        for name, prompt in asked.items()
    }


def without_pages(harness: EngineHarness) -> set[str]:
    """Adapters of admitted requests that have no pages."""
    store = harness.instance.store
    versions = {harness.open(name): name for name in NAMES}
    return {
        versions[request.version_id]
        for request in harness.engine.requests.admitted
        if request.version_id is not None
        and request.state is RequestState.ADMITTED
        and not store.has_pages(request.version_id)
    }


def finished(harness: EngineHarness, number: int) -> Finished:
    item = harness.answers[number].finished
    assert item is not None
    return item


def assert_nothing_held(harness: EngineHarness) -> None:
    harness.run_until(lambda: not harness.engine.passes and harness.instance.bridge.orphans == 0)
    state = harness.instance.state(0)
    assert (state.kv_pages, state.waiting, state.running, state.prefills) == (0, 0, 0, 0)
    assert state.free_pages + state.adapter_pages + state.cached_pages == harness.config.pages
    harness.engine.check()


def test_four_adapters_run_at_once_where_two_fit(world: World, device: str) -> None:
    with small_pool(world, device=device) as harness:
        in_host(harness)
        asked = submit_all(harness)
        harness.step()
        assert not harness.engine.requests.queue
        assert without_pages(harness) == {"c", "d"}
        served = set()
        while not all(answer.ended for answer in harness.answers.values()):
            served |= {
                number for number in asked if harness.answers[number].tokens and len(without_pages(harness)) == 2
            }
            harness.step()
        assert len(served) == 4, "some had to wait for pages"
        for number, (name, prompt) in asked.items():
            world.compare(name, prompt, harness.answers[number], NEW_TOKENS)
        for number, (name, _) in asked.items():
            timing = finished(harness, number).timing
            if name in ("c", "d"):
                assert [layer.source for layer in timing.layers] == [LoraSource.CPU] * LAYERS
                assert timing.cpu_tokens > 0
        assert_nothing_held(harness)


def test_an_adapter_goes_over_when_pages_come_free(world: World, device: str) -> None:
    """The two on the device answer shortly; a long answer begins on the CPU and ends on the device."""
    with small_pool(world, device=device) as harness:
        in_host(harness)
        (first, second, third, _) = prompts(4, seed=6)
        short = [harness.submit(first, "a", max_tokens=6), harness.submit(second, "b", max_tokens=6)]
        number = harness.submit(third, "c", max_tokens=NEW_TOKENS, logprobs=0)
        harness.run_until(lambda: bool(harness.answers[number].tokens))
        assert without_pages(harness) <= {"c"}
        harness.run()
        assert all(harness.answers[item].finished for item in short)
        world.compare("c", third, harness.answers[number], NEW_TOKENS)
        timing = finished(harness, number).timing
        assert timing.layers[0].source is LoraSource.CPU
        assert timing.cpu_tokens < NEW_TOKENS - 1
        assert harness.instance.store.is_landed(harness.open("c"))
        assert_nothing_held(harness)


@pytest.mark.parametrize(
    "config",
    [{"cpu_decode": False}, {"cpu_workers": 0}, {"handoff": HandoffConfig(mode="stream")}, {"max_passes": 1}],
    ids=str,
)
def test_where_the_workers_may_not_serve_them_they_wait(world: World, device: str, config: dict[str, object]) -> None:
    with small_pool(world, device=device, **config) as harness:
        in_host(harness)
        asked = submit_all(harness)
        while not all(answer.ended for answer in harness.answers.values()):
            harness.step()
            assert not without_pages(harness)
        for number, (name, prompt) in asked.items():
            world.compare(name, prompt, harness.answers[number], NEW_TOKENS)


@pytest.mark.parametrize("victims", [1, 2])
def test_workers_die_in_the_middle(world: World, device: str, victims: int) -> None:
    with small_pool(world, device=device) as harness:
        in_host(harness)
        asked = submit_all(harness)
        harness.run_until(lambda: all(len(harness.answers[number].tokens) >= 2 for number in asked))
        for pid in harness.instance.workers.worker_pids[:victims]:
            os.kill(pid, signal.SIGKILL)
        harness.run()
        for number, (name, prompt) in asked.items():
            world.compare(name, prompt, harness.answers[number], NEW_TOKENS)
        assert_nothing_held(harness)


def test_cancelled_in_the_middle(world: World, device: str) -> None:
    with small_pool(world, device=device) as harness:
        in_host(harness)
        asked = submit_all(harness)
        harness.run_until(lambda: all(harness.answers[number].tokens for number in asked))
        cancelled = [number for number, (name, _) in asked.items() if name in without_pages(harness)]
        assert cancelled
        for number in cancelled:
            harness.engine.cancel(number)
        harness.run()
        for number, (name, prompt) in asked.items():
            if number in cancelled:
                assert finished(harness, number).reason is FinishReason.CANCELLED
            else:
                world.compare(name, prompt, harness.answers[number], NEW_TOKENS)
        assert_nothing_held(harness)


def test_one_that_lost_its_host_bytes_is_read_again(world: World, device: str) -> None:
    """Its host bytes go between two layers. They are read again, and a pass that finds none is repeated."""
    with small_pool(world, device=device) as harness:
        in_host(harness)
        asked = submit_all(harness)
        harness.run_until(lambda: all(harness.answers[number].tokens for number in asked))
        (name,) = without_pages(harness) - {"d"}
        harness.instance.store.evict_host(harness.open(name))
        harness.run()
        for number, (asked_name, prompt) in asked.items():
            world.compare(asked_name, prompt, harness.answers[number], NEW_TOKENS)
        assert_nothing_held(harness)
