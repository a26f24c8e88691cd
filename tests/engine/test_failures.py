"""Workers that die or freeze, cancelled and preempted requests, broken weights: answers stay right, nothing is lost."""

from __future__ import annotations

import os
import random
import signal
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cache
from pathlib import Path

import numpy as np
import numpy.typing as npt
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from segue.cpu_lora import WorkerEventKind
from segue.engine import instance
from segue.engine.config import HandoffConfig
from segue.engine.lora.apply import Blocked
from segue.engine.lora.file_runs import Target
from segue.engine.messages import Submit
from segue.engine.request import Request, RequestState
from segue.engine.sampling_params import SamplingParams
from segue.errors import AdapterRejectedError, EngineUnavailableError
from segue.types import FinishReason, LoraSource, Tier, Timing
from tests.checkpoints import ALL_TARGETS, load_reference, reference_greedy, write_random_adapter, write_random_model
from tests.engine.harness import Answer, EngineHarness

NEW_TOKENS = 24
PROMPT_TOKENS = 8
LAYERS = 3
# Slow enough that the first prefill passes all layers before any of the adapter's has landed.
SLOW_LINK = 2e5
WEIGHTS_FILE = "adapter_model.safetensors"
ADAPTERS: dict[str, dict[str, object]] = {
    "cold": {"rank": 16, "targets": ALL_TARGETS},
    "other": {"rank": 8},
    "third": {"rank": 4, "targets": ALL_TARGETS},
    "late": {"rank": 128, "targets": ("q_proj", "o_proj")},
}


@dataclass(frozen=True)
class World:
    """A checkpoint and its adapters on disk, and the device that they are served on."""

    model_dir: Path
    adapters_dir: Path
    device: str = field(default="cpu", compare=False)

    def harness(self, **config: object) -> EngineHarness:
        settings: dict[str, object] = {
            "device": self.device,
            "copy_bytes_per_second": SLOW_LINK,
            "cpu_stall_seconds": 0.5,
            # For every layer of a loading adapter: what the planner takes depends on the machine's speed.
            "handoff": HandoffConfig(mode="fixed", cpu_layers=LAYERS),
        }
        return EngineHarness(self.model_dir, self.adapters_dir, **{**settings, **config})

    @cache  # noqa: B019
    def expected(self, adapter: str | None, prompt: tuple[int, ...], new_tokens: int) -> list[int]:
        reference = load_reference(self.model_dir, None if adapter is None else self.adapters_dir / adapter)
        return list(reference_greedy(reference, prompt, new_tokens))

    def compare(self, adapter: str | None, prompt: list[int], answer: Answer) -> None:
        assert answer.failed is None
        assert answer.tokens == self.expected(adapter, tuple(prompt), len(answer.tokens)), f"adapter {adapter}"
        assert answer.finished is not None
        assert answer.finished.reason is FinishReason.LENGTH

    def assert_serves(self, harness: EngineHarness, adapter: str | None) -> None:
        """A fresh request gets the right answer."""
        prompt = make_prompt(99)
        number = harness.submit(prompt, adapter, max_tokens=NEW_TOKENS)
        harness.run()
        assert len(harness.answers[number].tokens) == NEW_TOKENS
        self.compare(adapter, prompt, harness.answers[number])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("failures")
    model_dir = write_random_model(root / "model", seed=11)
    for seed, (name, options) in enumerate(ADAPTERS.items()):
        write_random_adapter(root / "adapters" / name, model_dir, seed=seed, **options)  # type: ignore[arg-type]
    return World(model_dir, root / "adapters")


@pytest.fixture
def world(files: World, device: str) -> World:
    return replace(files, device=device)


def make_prompt(seed: int, tokens: int = PROMPT_TOKENS) -> list[int]:
    generator = random.Random(seed)
    return [generator.randrange(3, 256) for _ in range(tokens)]


def wait_until(condition: Callable[[], bool], what: str, timeout_seconds: float = 20.0) -> None:
    deadline = time.monotonic() + timeout_seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited {timeout_seconds:g} s in vain: {what}"
        time.sleep(0.005)


def known(harness: EngineHarness, number: int) -> Request:
    request = harness.engine.requests.get(number)
    assert request is not None
    return request


def timing_of(harness: EngineHarness, number: int) -> Timing:
    finished = harness.answers[number].finished
    assert finished is not None
    return finished.timing


def is_mid_prefill(harness: EngineHarness) -> bool:
    """Whether a pass under way has left at least one layer whose deltas came from the CPU."""
    records = [
        record for item in harness.engine.passes for layers in item.applier.records.values() for record in layers
    ]
    return any(record.source is LoraSource.CPU for record in records)


def waits_for(harness: EngineHarness, workers: int) -> bool:
    """Whether a pass, or its stream, waits for a job with unanswered shares of the first ``workers`` workers."""
    return harness.instance.workers.slot_table.waiting_workers() >= set(range(workers))


def reach_mid_prefill(harness: EngineHarness, prompt: list[int], adapter: str = "cold") -> int:
    number = harness.submit(prompt, adapter, max_tokens=NEW_TOKENS)
    harness.run_until(lambda: is_mid_prefill(harness))
    assert not harness.answers[number].tokens
    return number


def free_or_cached(harness: EngineHarness) -> int:
    state = harness.instance.state(0)
    return state.free_pages + state.cached_pages


def assert_nothing_held(harness: EngineHarness, host_free_bytes: int) -> None:
    """Pages are the pool's or an adapter's; after evicting the adapters they and the host bytes are all free."""
    harness.run_until(lambda: not harness.engine.passes and harness.instance.bridge.orphans == 0)
    state = harness.instance.state(0)
    assert (state.kv_pages, state.waiting, state.running, state.prefills) == (0, 0, 0, 0)
    assert state.free_pages + state.adapter_pages + state.cached_pages == harness.config.pages
    for version in state.versions:
        assert version.users == 0
        harness.engine.versions.evict(version.version_id)
    harness.run_until(lambda: free_or_cached(harness) == harness.config.pages)
    harness.run_until(lambda: harness.instance.state(0).host_free_bytes == host_free_bytes)
    harness.engine.check()


def deltas_of(harness: EngineHarness) -> bytes:
    """What the job ring's delta buffers hold."""
    layout = harness.instance.workers.memory.layout
    span = slice(layout.deltas_offset, layout.deltas_offset + layout.slots * layout.delta_bytes)
    return harness.instance.workers.memory.octets[span].tobytes()


def freeze(pids: tuple[int, ...]) -> None:
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
        process = psutil.Process(pid)
        wait_until(lambda process=process: process.status() == psutil.STATUS_STOPPED, "it has stopped")  # type: ignore[misc]


def is_gone(pid: int) -> bool:
    try:
        os.kill(pid, signal.SIGCONT)
    except ProcessLookupError:
        return True
    return False


def test_a_pass_undisturbed_is_computed_with_the_cpu_alone(world: World) -> None:
    """What the tests below rely on: with this link the whole prefill stays on the CPU, in one attempt."""
    prompt = make_prompt(1)
    with world.harness() as harness:
        # What a device loads at its first pass is behind.
        world.assert_serves(harness, None)
        number = harness.submit(prompt, "cold", max_tokens=NEW_TOKENS)
        harness.run()
        world.compare("cold", prompt, harness.answers[number])
        timing = timing_of(harness, number)
        assert (timing.tier, timing.cpu_layers, timing.prefill_attempts) == (Tier.DISK, 3, 1)
        assert harness.instance.state(0).worker_restarts == 0


@pytest.mark.parametrize("how", ["killed", "killed with a job in hand", "frozen"])
@pytest.mark.parametrize("victims", [1, 2])
def test_lost_workers_in_the_middle_of_a_prefill(world: World, how: str, victims: int) -> None:
    prompt = make_prompt(1)
    with world.harness() as harness:
        number = reach_mid_prefill(harness, prompt)
        request = known(harness, number)
        before = harness.instance.workers.worker_pids
        lost = before[:victims]
        if how != "killed":
            freeze(lost)
            harness.run_until(lambda: waits_for(harness, victims))
        if how != "frozen":
            for pid in lost:
                os.kill(pid, signal.SIGKILL)
        harness.run_until(lambda: bool(harness.answers[number].tokens))
        lost_prefills = request.lost_passes
        harness.run()
        world.compare("cold", prompt, harness.answers[number])
        assert len(harness.answers[number].tokens) == NEW_TOKENS
        assert timing_of(harness, number).prefill_attempts == 1 + lost_prefills
        if how != "killed":
            assert lost_prefills > 0
        for pid in lost:
            wait_until(lambda pid=pid: is_gone(pid), "the lost worker is dead")  # type: ignore[misc]
        assert harness.instance.workers.wait_ready(harness.config.cpu_workers, timeout_seconds=20)
        assert not set(harness.instance.workers.worker_pids) & set(lost)
        # On a busy machine a healthy worker may stand still long enough to be replaced as well.
        died = [event.pid for event in harness.instance.workers.events if event.kind is WorkerEventKind.DIED]
        assert set(lost) <= set(died)
        assert harness.instance.state(0).worker_restarts == len(died)
        deltas = deltas_of(harness)
        time.sleep(0.1)
        assert deltas_of(harness) == deltas
        world.assert_serves(harness, "third")


def test_without_workers_every_adapter_is_streamed(world: World) -> None:
    with world.harness(cpu_workers=0, copy_bytes_per_second=1e6) as harness:
        numbers = {}
        for seed, name in enumerate([*ADAPTERS, None, "cold"]):
            prompt = make_prompt(seed)
            numbers[harness.submit(prompt, name, max_tokens=NEW_TOKENS)] = (name, prompt)
        harness.run()
        for number, (name, prompt) in numbers.items():
            world.compare(name, prompt, harness.answers[number])
            timing = timing_of(harness, number)
            assert timing.cpu_layers == 0
            sources = {layer.source for layer in timing.layers}
            assert sources == (set() if name is None else {LoraSource.DEVICE})


def test_a_long_prompt_takes_several_cold_passes(world: World) -> None:
    prompt = make_prompt(5, tokens=50)
    computed_while_cold = set()
    with world.harness(budget_tokens=16) as harness:
        number = harness.submit(prompt, "late", max_tokens=NEW_TOKENS)
        request = known(harness, number)
        while not harness.answers[number].ended:
            if not harness.instance.store.is_landed(harness.open("late")):
                computed_while_cold.add(request.computed_tokens)
            harness.step()
        world.compare("late", prompt, harness.answers[number])
        assert {0, 16, 32, 48, 50} <= computed_while_cold
        assert timing_of(harness, number).cpu_layers > 0


def queued(harness: EngineHarness) -> int:
    number = harness.submit(make_prompt(2), "cold", max_tokens=NEW_TOKENS)
    assert known(harness, number).state is RequestState.QUEUED
    return number


def waiting_for_weights(harness: EngineHarness) -> int:
    number = harness.submit(make_prompt(2), "cold", max_tokens=NEW_TOKENS)
    harness.run_until(lambda: any(item.applier.blocked is Blocked.WEIGHTS for item in harness.engine.passes))
    return number


def on_the_cpu_with_a_job(harness: EngineHarness) -> int:
    number = reach_mid_prefill(harness, make_prompt(2))
    freeze(harness.instance.workers.worker_pids)
    harness.run_until(lambda: waits_for(harness, harness.config.cpu_workers))
    return number


def decoding_cold(harness: EngineHarness) -> int:
    number = harness.submit(make_prompt(2), "cold", max_tokens=NEW_TOKENS)
    harness.run_until(lambda: len(harness.answers[number].tokens) >= 2)
    assert not harness.instance.store.is_landed(harness.open("cold"))
    return number


def decoding_warm(harness: EngineHarness) -> int:
    harness.warm("cold")
    number = harness.submit(make_prompt(2), "cold", max_tokens=NEW_TOKENS)
    harness.run_until(lambda: len(harness.answers[number].tokens) >= 2)
    return number


@pytest.mark.parametrize(
    ("reach", "mode"),
    [
        (queued, "fixed"),
        (waiting_for_weights, "load_first"),
        (on_the_cpu_with_a_job, "fixed"),
        (decoding_cold, "fixed"),
        (decoding_warm, "auto"),
    ],
)
def test_cancel_gives_everything_back(world: World, reach: Callable[[EngineHarness], int], mode: str) -> None:
    with world.harness(handoff=HandoffConfig(mode=mode, cpu_layers=LAYERS)) as harness:
        host_free_bytes = harness.instance.state(0).host_free_bytes
        number = reach(harness)
        assert not harness.answers[number].ended
        harness.engine.cancel(number)
        pids = harness.instance.workers.worker_pids
        harness.step()
        finished = harness.answers[number].finished
        assert finished is not None
        assert finished.reason is FinishReason.CANCELLED
        if reach is on_the_cpu_with_a_job:
            # On CUDA all that is enqueued behind the one that the stream waits for.
            assert harness.instance.bridge.orphans >= 1
            for pid in pids:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGCONT)
        assert_nothing_held(harness, host_free_bytes)
        world.assert_serves(harness, "third")
        assert_nothing_held(harness, host_free_bytes)


def test_preempted_requests_and_an_evicted_adapter(world: World) -> None:
    """Six requests share a pool that holds the KV of three; "other" loses its pages while its requests wait again."""
    adapters = [None, None, None, "other", "other", None]
    new_tokens = 60
    with world.harness(pages=16, copy_bytes_per_second=None) as harness:
        version = harness.open("other")
        asked = {}
        for seed, name in enumerate(adapters):
            prompt = make_prompt(seed, tokens=20)
            asked[harness.submit(prompt, name, max_tokens=new_tokens)] = (name, prompt)
        requests = {number: known(harness, number) for number in asked}
        was_landed = False
        evicted_while_wanted = 0
        while not all(answer.ended for answer in harness.answers.values()):
            assert harness.engine.steps < 20_000
            harness.step()
            landed = harness.instance.store.is_landed(version)
            wanted = any(
                request.version_id == version and request.state is RequestState.QUEUED and request.generated_tokens
                for request in requests.values()
            )
            evicted_while_wanted += was_landed and not landed and wanted
            was_landed = landed
        for number, (name, prompt) in asked.items():
            assert len(harness.answers[number].tokens) == new_tokens
            world.compare(name, prompt, harness.answers[number])
        preempted = [number for number in asked if timing_of(harness, number).prefill_attempts > 1]
        assert len(preempted) >= 2
        assert evicted_while_wanted > 0
        assert_nothing_held(harness, harness.config.host_store_bytes)


def truncate(weights: Path) -> None:
    os.truncate(weights, weights.stat().st_size * 2 // 3)


def put_nan(weights: Path) -> None:
    tensors = load_file(weights)
    tensors[max(name for name in tensors if "layers.2" in name)][0, 0] = torch.nan
    # In place: the descriptor that the engine holds must see it.
    changed = weights.with_suffix(".changed")
    save_file(tensors, changed)
    weights.write_bytes(changed.read_bytes())


@pytest.mark.parametrize("spoil", [truncate, put_nan])
def test_broken_weights_are_rejected(world: World, tmp_path: Path, spoil: Callable[[Path], None]) -> None:
    """Content that goes bad after its header was read: the request fails, not the engine."""
    write_random_adapter(tmp_path / "broken", world.model_dir, rank=16, targets=ALL_TARGETS, seed=5)
    with EngineHarness(world.model_dir, tmp_path, device=world.device, copy_bytes_per_second=SLOW_LINK) as harness:
        host_free_bytes = harness.instance.state(0).host_free_bytes
        version = harness.open("broken")
        spoil(tmp_path / "broken" / WEIGHTS_FILE)
        for number in (1, 2):
            harness.answers[number] = Answer()
            harness.engine.submit(
                Submit(
                    number=number,
                    prompt_token_ids=make_prompt(number),
                    max_tokens=NEW_TOKENS,
                    arrival_seconds=time.monotonic(),
                    sampling=SamplingParams(seed=0),
                    adapter_version_id=version,
                )
            )
            harness.run()
            failed = harness.answers[number].failed
            assert failed is not None
            assert failed.reason == AdapterRejectedError.reason
            assert harness.answers[number].tokens == []
        assert version in harness.version_failures
        write_random_adapter(tmp_path / "third", world.model_dir, seed=2, **ADAPTERS["third"])  # type: ignore[arg-type]
        world.assert_serves(harness, "third")
        world.assert_serves(harness, None)
        harness.engine.versions.close(version)
        assert_nothing_held(harness, host_free_bytes)


class FakeStalledDisk:
    """Reads of files in one folder hang until they are let go."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self.let_go = threading.Event()

    def read(self, target: Target, descriptor: int, runs: npt.NDArray[np.int64], offset: int) -> int:
        if Path(os.readlink(f"/proc/self/fd/{descriptor}")).parent.name == self.folder:
            assert self.let_go.wait(60)
        return target.read(descriptor, runs, offset)


def test_a_disk_that_stalls_costs_those_who_need_it_an_error_and_others_nothing(
    world: World, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk = FakeStalledDisk("cold")
    real_ops = instance._transfer_ops
    monkeypatch.setattr(instance, "_transfer_ops", lambda *of: replace(real_ops(*of), read_runs=disk.read))
    with world.harness(read_threads=2, read_stall_seconds=0.5, copy_bytes_per_second=None) as harness:
        host_free_bytes = harness.instance.state(0).host_free_bytes
        stalled = [harness.submit(make_prompt(seed), "cold", max_tokens=NEW_TOKENS) for seed in range(2)]
        prompts = {name: make_prompt(7) for name in ("other", "third")}
        others = {name: harness.submit(prompts[name], name, max_tokens=NEW_TOKENS) for name in prompts}
        harness.run()
        for number in stalled:
            failed = harness.answers[number].failed
            assert failed is not None
            assert failed.reason == EngineUnavailableError.reason
            assert "the disk did not answer" in failed.message
        for name, number in others.items():
            world.compare(name, prompts[name], harness.answers[number])
        harness.release_unused()
        disk.let_go.set()
        world.assert_serves(harness, "cold")
        assert_nothing_held(harness, host_free_bytes)
