"""Pinned adapters: brought to the device when they are opened, and never evicted for others."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest

from segue.engine.lora.checkpoint import WEIGHTS_FILE
from segue.errors import InvalidRequestError
from segue.types import Tier
from tests.checkpoints import TinyModel, load_reference, reference_greedy, write_random_adapter, write_random_model
from tests.engine.harness import EngineHarness

NEW_TOKENS = 8
NAMES = ("a", "b", "c", "d")


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("pinned")
    model_dir = write_random_model(root / "model", TinyModel(layers=2), seed=4)
    for seed, name in enumerate(NAMES):
        write_random_adapter(root / "adapters" / name, model_dir, rank=16, seed=seed)
    return model_dir, root / "adapters"


def adapter_pages(folders: tuple[Path, Path]) -> int:
    with EngineHarness(*folders, cpu_workers=0) as harness:
        return harness.instance.store.device_pages(harness.open("a"))


def tier(harness: EngineHarness, version_id: int) -> Tier:
    (state,) = [item for item in harness.instance.state(0).versions if item.version_id == version_id]
    return state.tier


def test_it_lands_without_a_request_and_stays_while_others_come_and_go(folders: tuple[Path, Path]) -> None:
    """The pool holds two adapters; the three that are not pinned take turns on one place."""
    generator = random.Random(2)
    with EngineHarness(*folders, pages=2 * adapter_pages(folders) + 8) as harness:
        pinned = harness.open("a", pinned=True)
        harness.run_until(lambda: harness.instance.store.is_landed(pinned))
        for turn in range(9):
            name = "bcd"[turn % 3]
            prompt = [generator.randrange(3, 256) for _ in range(20)]
            number = harness.submit(prompt, name, max_tokens=NEW_TOKENS)
            harness.run()
            expected = reference_greedy(load_reference(folders[0], folders[1] / name), prompt, NEW_TOKENS)
            assert tuple(harness.answers[number].tokens) == expected
            assert tier(harness, pinned) is Tier.DEVICE
        number = harness.submit([5, 6, 7], "a", max_tokens=NEW_TOKENS)
        harness.run()
        finished = harness.answers[number].finished
        assert finished is not None
        assert finished.timing.tier is Tier.DEVICE


def test_what_cannot_fit_beside_the_pinned_is_refused(folders: tuple[Path, Path]) -> None:
    pages = adapter_pages(folders)
    with EngineHarness(*folders, pages=2 * pages + 8, cpu_workers=0) as harness:
        for name in ("a", "b"):
            harness.open(name, pinned=True)
        harness.step()
        assert harness.version_failures == {}
        third = harness.open("c")
        harness.step()
        assert "pinned" in harness.version_failures[third]
        too_long = harness.submit(list(range(3, 103)), "a", max_tokens=100)
        good = harness.submit([5, 6, 7], "b", max_tokens=NEW_TOKENS)
        harness.run()
        failed = harness.answers[too_long].failed
        assert failed is not None
        assert failed.reason == InvalidRequestError.reason
        assert len(harness.answers[good].tokens) == NEW_TOKENS


def test_pinning_does_not_take_the_room_of_a_request_that_waits(folders: tuple[Path, Path]) -> None:
    pages = adapter_pages(folders)
    with EngineHarness(*folders, pages=2 * pages + 8, cpu_workers=0) as harness:
        number = harness.submit(list(range(3, 103)), "a", max_tokens=100)
        second = harness.open("b", pinned=True)
        harness.run()
        assert "must be left" in harness.version_failures[second]
        assert len(harness.answers[number].tokens) == 100


def test_new_content_takes_over_the_pin(folders: tuple[Path, Path], tmp_path: Path) -> None:
    model_dir, adapters_dir = folders
    for name in ("a", "b", "c"):
        shutil.copytree(adapters_dir / name, tmp_path / name)
    with EngineHarness(model_dir, tmp_path, pages=3 * adapter_pages(folders) + 8, cpu_workers=0) as harness:
        old = harness.open("a", pinned=True)
        harness.run_until(lambda: harness.instance.store.is_landed(old))
        shutil.copy(adapters_dir / "d" / WEIGHTS_FILE, tmp_path / "new")
        (tmp_path / "new").rename(tmp_path / "a" / WEIGHTS_FILE)
        new = harness.open("a", pinned=True)
        assert new != old
        harness.run_until(lambda: harness.instance.store.is_landed(new))
        for name in ("b", "c", "b"):
            harness.submit([random.Random(name).randrange(3, 256) for _ in range(30)], name, max_tokens=NEW_TOKENS)
            harness.run()
        assert tier(harness, new) is Tier.DEVICE
        harness.engine.versions.close(old)
        harness.step()
        assert harness.engine.versions.pinned_pages == harness.instance.store.device_pages(new)
