"""Time of the device: computing batches, and waiting between them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pytest
import torch

from segue.engine.device_time import BatchSpan, CpuMeter, CudaMeter, DeviceMeter
from segue.engine.messages import DeviceTime
from tests.checkpoints import TinyModel, write_random_model
from tests.engine.harness import EngineHarness


@dataclass
class FakeDevice:
    """One stream: a call enqueues work, which begins when the work before has ended, but no earlier than the call."""

    host_seconds: float = 0.0
    free_seconds: float = 0.0

    def clock(self) -> float:
        return self.host_seconds

    def host(self, seconds: float) -> None:
        self.host_seconds += seconds

    def enqueue(self, seconds: float) -> None:
        self.free_seconds = max(self.free_seconds, self.host_seconds) + seconds


@dataclass
class FakeEvent:
    """An event on the FakeDevice of the test."""

    device: ClassVar[FakeDevice]
    enable_timing: bool
    passed_seconds: float = field(default=-1.0)

    def record(self) -> None:
        self.device.enqueue(0.0)
        self.passed_seconds = self.device.free_seconds

    def query(self) -> bool:
        return self.device.host_seconds >= self.passed_seconds

    def synchronize(self) -> None:
        self.device.host_seconds = max(self.device.host_seconds, self.passed_seconds)

    def elapsed_time(self, later: FakeEvent) -> float:
        assert self.query()
        assert later.query()
        return 1e3 * (later.passed_seconds - self.passed_seconds)


@pytest.fixture
def fake_device(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeDevice]:
    FakeEvent.device = FakeDevice()
    monkeypatch.setattr(torch.cuda, "Event", FakeEvent)
    yield FakeEvent.device
    del FakeEvent.device


def test_a_batch_has_its_own_time_however_late_the_host_looks(fake_device: FakeDevice) -> None:
    spans = []
    for seconds in (3.0, 5.0):
        spans.append(BatchSpan())
        fake_device.host(0.5)
        fake_device.enqueue(seconds)
        spans[-1].close()
    fake_device.host(100.0)
    # While the device has nothing else to do, what the host takes to enqueue counts.
    assert [span.seconds() for span in spans] == [3.5, 5.0]


def test_the_time_of_a_batch_is_waited_for(fake_device: FakeDevice) -> None:
    span = BatchSpan()
    with pytest.raises(ValueError, match="not been enqueued"):
        span.seconds()
    fake_device.enqueue(2.0)
    span.close()
    assert span.seconds() == 2.0
    assert fake_device.host_seconds == 2.0


def run_batch(meter: DeviceMeter, device: FakeDevice, *, prepare: float, compute: float) -> None:
    """The host prepares for a while, and then one call enqueues all of it."""
    with meter.batch():
        device.host(prepare)
        device.enqueue(compute)


def rounded(spent: DeviceTime) -> DeviceTime:
    return DeviceTime(spent.batches, round(spent.busy_seconds, 9), round(spent.idle_seconds, 9))


def test_a_host_that_is_ahead_leaves_no_gap(fake_device: FakeDevice) -> None:
    meter = CudaMeter(fake_device.clock)
    for _ in range(5):
        run_batch(meter, fake_device, prepare=1.0, compute=4.0)
    assert meter.read().batches < 5
    fake_device.host(100.0)
    # The first waits for its own preparation, which is not between batches.
    assert rounded(meter.read()) == DeviceTime(5, 21.0, 0.0)


def test_a_late_host_is_seen_though_its_event_was_early(fake_device: FakeDevice) -> None:
    """The batch before ends while the host prepares the next: the device waits, behind an event that has passed."""
    meter = CudaMeter(fake_device.clock)
    run_batch(meter, fake_device, prepare=0.0, compute=1.0)
    run_batch(meter, fake_device, prepare=3.0, compute=2.0)
    fake_device.host(100.0)
    # It waited for two seconds: a bound says the three that the host took to enqueue.
    assert rounded(meter.read()) == DeviceTime(2, 2.0, 3.0)


def test_a_host_that_does_something_else_leaves_a_gap(fake_device: FakeDevice) -> None:
    meter = CudaMeter(fake_device.clock)
    run_batch(meter, fake_device, prepare=0.0, compute=1.0)
    fake_device.host(8.0)
    run_batch(meter, fake_device, prepare=0.5, compute=2.0)
    fake_device.host(100.0)
    assert rounded(meter.read()) == DeviceTime(2, 3.0, 7.5)


def test_by_the_clock_on_the_cpu() -> None:
    times = iter([10.0, 12.0, 15.0, 19.0, 19.5, 20.0])
    meter = CpuMeter(lambda: next(times))
    assert meter.read() == DeviceTime(0, 0.0, 0.0)
    for _ in range(3):
        with meter.batch():
            pass
    assert meter.read() == DeviceTime(3, 6.5, 3.5)


@pytest.mark.gpu
def test_events_of_a_device() -> None:
    meter = CudaMeter()
    for _ in range(2):
        with meter.batch():
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        time.sleep(0.05)
    spent = meter.read()
    assert spent.batches == 2
    assert spent.busy_seconds > 0
    assert spent.idle_seconds >= 0.04


def test_the_state_tells_it_where_it_is_asked_for(tmp_path: Path, device: str) -> None:
    model_dir = write_random_model(tmp_path / "model", TinyModel(layers=2))
    (tmp_path / "adapters").mkdir()
    settings = {"device": device, "cpu_workers": 0}
    with EngineHarness(model_dir, tmp_path / "adapters", measure_device_time=True, **settings) as harness:
        number = harness.submit([5, 6, 7], max_tokens=8)
        harness.run()
        assert len(harness.answers[number].tokens) == 8
        spent = harness.instance.state(0).device_time
        assert spent is not None
        assert 8 <= spent.batches <= harness.engine.steps
        assert spent.busy_seconds > 0
        assert spent.idle_seconds >= 0
    with EngineHarness(model_dir, tmp_path / "adapters", **settings) as harness:
        assert harness.instance.state(0).device_time is None
