"""Jobs through real worker processes: values, order, slots."""

from __future__ import annotations

import dataclasses
import os
import random
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest

from segue.cpu_lora import DeltaTask, ElementType, Job, JobRing, JobState, SharedMemory, WorkerPool
from segue.cpu_lora.atomics import publish
from tests.cpu_lora.rig import Adapter, Rig, process_is_gone, wait_until

StartRig = Callable[..., Rig]


def posted(job: Job | None) -> Job:
    assert job is not None
    return job


def finish(rig: Rig, job: Job) -> npt.NDArray[Any]:
    assert rig.ring.wait([job], 20)
    assert job.poll() is JobState.DONE
    deltas = job.deltas.copy()
    rig.ring.release(job)
    return deltas


def whole_numbers(rig: Rig, *shape: int) -> npt.NDArray[np.float32]:
    return rig.rng.integers(-8, 9, shape).astype(np.float32)


def test_ten_thousand_rounds_of_fresh_data(start_rig: StartRig) -> None:
    """Every value of every round is compared; four jobs are in flight, one or two adapters in each.

    The values are small whole numbers, whose products and sums float32 holds exactly: the results must be equal.
    """
    rig = start_rig(workers=2, slots=4, min_rows_per_share=2)
    in_features, width, rng = 48, 40, rig.rng
    adapters = []
    for rank, scale in ((1, 2.0), (4, 0.5), (8, -1.0)):
        a, b = whole_numbers(rig, rank, in_features), whole_numbers(rig, width, rank)
        adapters.append(Adapter(a=a, b=b, a_offset_bytes=rig.put(a), b_offset_bytes=rig.put(b), scale=scale))
    in_flight: list[tuple[Job, npt.NDArray[np.float32]]] = []
    rounds = 0
    while rounds < 10_000:
        row_count = int(rng.integers(1, 13))
        rows = whole_numbers(rig, row_count, in_features)
        cut = int(rng.integers(0, row_count))
        spans = [(start, stop) for start, stop in ((0, cut), (cut, row_count)) if start < stop]
        chosen = [(adapters[int(rng.integers(3))], start, stop) for start, stop in spans]
        job = rig.ring.post(rows, [adapter.task(start, stop) for adapter, start, stop in chosen], width)
        if job is None:
            done, expected = in_flight.pop(0)
            np.testing.assert_array_equal(finish(rig, done), expected)
            rounds += 1
            continue
        rig.ring.signal(job)
        deltas = [adapter.scale * (rows[start:stop] @ adapter.a.T) @ adapter.b.T for adapter, start, stop in chosen]
        in_flight.append((job, np.concatenate(deltas)))
    assert [event.kind.value for event in rig.pool.events] == ["ready", "ready"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_rows_and_weights(start_rig: StartRig, dtype: str) -> None:
    rig = start_rig(workers=2)
    rng = np.random.default_rng(5)
    x, a, b = (rng.integers(-2, 3, shape).astype(np.float32) for shape in ((21, 64), (8, 64), (48, 8)))
    exact = (x @ a.T) @ b.T  # integers up to 2,048, which both formats round

    def narrow(values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        if dtype == "float16":
            return values.astype(np.float16)
        bits = values.astype(np.float32).view(np.uint32).astype(np.uint64)
        return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)

    adapter = Adapter(a=narrow(a), b=narrow(b), a_offset_bytes=rig.put(narrow(a)), b_offset_bytes=rig.put(narrow(b)),
                      scale=1.0)  # fmt: skip
    job = posted(rig.ring.post(narrow(x), [adapter.task(0, 21)], 48))
    rig.ring.signal(job)
    np.testing.assert_array_equal(finish(rig, job), narrow(exact))


def test_modules_side_by_side_and_zeros_between(start_rig: StartRig) -> None:
    """q and v with odd widths, k without adapter; the middle rows have none at all."""
    rig = start_rig(workers=2, min_rows_per_share=3)
    q, v = rig.adapter(7, 33, 19), rig.adapter(3, 33, 29)
    rows = rig.rows(40, 33)
    tasks: list[DeltaTask] = []
    for start, stop in ((0, 11), (17, 40)):
        tasks += [q.task(start, stop), v.task(start, stop, out_offset=30)]
        tasks.append(DeltaTask(row_start=start, row_stop=stop, out_offset=19, out_features=11, rank=0))
    tasks.append(DeltaTask(row_start=11, row_stop=17, out_offset=0, out_features=59, rank=0))
    expected = np.concatenate([q.delta(rows), np.zeros((40, 11)), v.delta(rows)], axis=1)
    expected[11:17] = 0
    for _ in range(20):
        job = posted(rig.ring.post(rows, tasks, 59))
        assert len(job.shares) == 2
        rig.memory.octets[job.deltas_offset : job.deltas_offset + 40 * 59 * 4] = 0xFF
        rig.ring.signal(job)
        deltas = finish(rig, job)
        np.testing.assert_allclose(deltas, expected, rtol=0, atol=1e-4)
        assert (deltas[11:17] == 0).all()
        assert (deltas[:, 19:30] == 0).all()


def test_few_rows_go_to_few_workers(start_rig: StartRig) -> None:
    rig = start_rig(workers=2, min_rows_per_share=4)
    adapter = rig.adapter(4, 16, 16)
    for row_count, shares in ((1, 1), (7, 1), (8, 2), (64, 2)):
        job = posted(rig.ring.post(rig.rows(row_count, 16), [adapter.task(0, row_count)], 16))
        assert len(job.shares) == shares
        rig.ring.signal(job)
        finish(rig, job)
    owners = set()
    for _ in range(4):
        job = posted(rig.ring.post(rig.rows(1, 16), [adapter.task(0, 1)], 16))
        owners.add(job.shares[0].worker)
        rig.ring.abandon(job)
    assert owners == {0, 1}


def test_as_many_workers_share_a_job_as_is_said(start_rig: StartRig) -> None:
    """Whatever ``min_rows_per_share`` is; never more than there are, or rows."""
    rig = start_rig(workers=2, min_rows_per_share=4)
    adapter = rig.adapter(4, 16, 16)
    for row_count, workers, shares in ((64, 1, 1), (2, 2, 2), (3, 9, 2), (1, 2, 1)):
        rows = rig.rows(row_count, 16)
        job = posted(rig.ring.post(rows, [adapter.task(0, row_count)], 16, workers))
        assert len(job.shares) == shares
        rig.ring.signal(job)
        np.testing.assert_allclose(finish(rig, job), adapter.delta(rows), rtol=0, atol=1e-4)
    with pytest.raises(ValueError, match="workers: must be at least 1, is 0"):
        rig.ring.post(rig.rows(2, 16), [adapter.task(0, 2)], 16, 0)


def test_prepared_jobs_are_signalled_in_any_order(start_rig: StartRig) -> None:
    rig = start_rig(workers=2, slots=6, min_rows_per_share=2)
    adapter = rig.adapter(8, 32, 24)
    for seed in range(30):
        jobs = []
        for _ in range(6):
            job = posted(rig.ring.prepare(6, 32, ElementType.FLOAT32, [adapter.task(0, 6)], 24))
            job.rows[:] = rows = rig.rows(6, 32)
            jobs.append((job, adapter.delta(rows)))
        random.Random(seed).shuffle(jobs)
        for index, (job, expected) in enumerate(jobs):
            rig.ring.signal(job)
            assert rig.ring.wait([other for other, _ in jobs[index:]], 20)
            assert all(other.poll() is JobState.PENDING for other, _ in jobs[index + 1 :])
            np.testing.assert_allclose(finish(rig, job), expected, rtol=0, atol=1e-4)
            rig.ring.check()


def test_a_deferred_job_waits_for_the_flag_of_another(start_rig: StartRig) -> None:
    rig = start_rig(workers=1)
    adapter, rows = rig.adapter(4, 16, 16), rig.rows(3, 16)
    job = posted(rig.ring.post(rows, [adapter.task(0, 3)], 16))
    rig.ring.defer(job)
    assert not rig.ring.wait([job], 0.05)
    assert job.poll() is JobState.PENDING
    writer = threading.Timer(0.05, publish, (rig.memory.words, job.request_flag_offset // 4, job.sequence))
    writer.start()
    assert rig.ring.wait([job], 20)
    writer.join()
    assert [int(rig.memory.words[share.reply_flag_offset // 4]) for share in job.shares] == [job.sequence]
    np.testing.assert_allclose(finish(rig, job), adapter.delta(rows), rtol=0, atol=1e-4)


def test_full_ring_refuses_and_recovers(start_rig: StartRig) -> None:
    rig = start_rig(workers=1, slots=2)
    adapter, rows = rig.adapter(2, 16, 16), rig.rows(2, 16)
    first, second = (posted(rig.ring.post(rows, [adapter.task(0, 2)], 16)) for _ in range(2))
    assert rig.ring.post(rows, [adapter.task(0, 2)], 16) is None
    assert rig.ring.free_slots == 0
    rig.ring.abandon(first)
    assert rig.ring.free_slots == 1
    rig.ring.signal(second)
    with pytest.raises(RuntimeError, match="has been given back"):
        first.poll()
    third = posted(rig.ring.post(rows, [adapter.task(0, 2)], 16))
    assert (third.slot, third.sequence) == (first.slot, first.sequence + 1)
    rig.ring.signal(third)
    finish(rig, second)
    finish(rig, third)
    assert rig.ring.free_slots == 2


def test_wrong_use_is_refused(start_rig: StartRig) -> None:
    rig = start_rig(workers=1, row_bytes=4096, delta_bytes=4096)
    adapter, rows = rig.adapter(2, 16, 16), rig.rows(2, 16)
    with pytest.raises(ValueError, match="rows: 65 x 16 take 4160 bytes, a slot has 4096"):
        rig.ring.post(rig.rows(65, 16), [adapter.task(0, 65)], 16)
    with pytest.raises(ValueError, match="deltas: 2 x 513 take 4104 bytes, a slot has 4096"):
        rig.ring.post(rows, [adapter.task(0, 2)], 513)
    with pytest.raises(ValueError, match="not float64"):
        rig.ring.post(rows.astype(np.float64), [adapter.task(0, 2)], 16)
    with pytest.raises(ValueError, match="two dimensions"):
        rig.ring.post(rows[0], [adapter.task(0, 1)], 16)
    with pytest.raises(ValueError, match="cover 32 of 2 x 17"):
        rig.ring.post(rows, [adapter.task(0, 2)], 17)
    job = posted(rig.ring.post(rows, [adapter.task(0, 2)], 16))
    with pytest.raises(RuntimeError, match="not complete"):
        rig.ring.release(job)
    with pytest.raises(RuntimeError, match="has no deltas: it is pending"):
        _ = job.deltas
    rig.ring.signal(job)
    with pytest.raises(RuntimeError, match="cannot go from signalled to signalled"):
        rig.ring.signal(job)
    finish(rig, job)
    with pytest.raises(RuntimeError, match="has been given back"):
        rig.ring.release(job)
    with pytest.raises(RuntimeError, match="without a matching arm"):
        rig.pool.disarm()


def test_workers_run_only_while_armed(start_rig: StartRig) -> None:
    rig = start_rig(workers=1)
    adapter, rows = rig.adapter(2, 16, 16), rig.rows(2, 16)

    def switches() -> list[str]:
        status = Path(f"/proc/{rig.pool.worker_pids[0]}/status").read_text()
        return [line for line in status.splitlines() if "ctxt_switches" in line]

    def rests() -> bool:
        before = switches()
        time.sleep(0.1)
        return switches() == before

    rig.compute(adapter, rows)
    assert wait_until(rests)
    rig.pool.arm()
    assert wait_until(lambda: not rests())
    rig.pool.arm()
    rig.pool.disarm()
    assert wait_until(lambda: not rests())
    rig.pool.disarm()
    assert wait_until(rests)
    np.testing.assert_allclose(rig.compute(adapter, rows), adapter.delta(rows), rtol=0, atol=1e-4)


def test_pinned_workers_stay_on_their_cores(start_rig: StartRig) -> None:
    cores = tuple(sorted(os.sched_getaffinity(0)))[:2]
    rig = start_rig(workers=len(cores), cores=cores)
    assert [os.sched_getaffinity(pid) for pid in rig.pool.worker_pids] == [{core} for core in cores]
    adapter, rows = rig.adapter(2, 16, 16), rig.rows(30, 16)
    np.testing.assert_allclose(rig.compute(adapter, rows), adapter.delta(rows), rtol=0, atol=1e-4)


def test_without_workers_nothing_is_accepted(start_rig: StartRig) -> None:
    rig = start_rig(workers=0)
    assert rig.pool.ready_workers == 0
    assert rig.pool.zygote_pid is None
    adapter = rig.adapter(2, 16, 16)
    assert rig.ring.post(rig.rows(2, 16), [adapter.task(0, 2)], 16) is None


def test_pool_refuses_memory_of_another_shape(start_rig: StartRig) -> None:
    rig = start_rig(workers=0)
    with pytest.raises(ValueError, match="laid out for 0 workers and 16 slots"):
        WorkerPool(dataclasses.replace(rig.pool.config, workers=3), rig.memory)


def test_close_answers_what_is_unfinished(start_rig: StartRig) -> None:
    rig = start_rig(workers=2, slots=4)
    adapter, rows = rig.adapter(2, 16, 16), rig.rows(9, 16)
    prepared, signalled = (posted(rig.ring.post(rows, [adapter.task(0, 9)], 16)) for _ in range(2))
    pids: Sequence[int] = rig.pool.worker_pids
    zygote_pid = rig.pool.zygote_pid
    assert zygote_pid is not None
    rig.pool.close()
    rig.ring.signal(signalled)
    assert signalled.poll() is JobState.FAILED
    assert rig.ring.post(rows, [adapter.task(0, 9)], 16) is None
    rig.ring.release(signalled)
    rig.ring.abandon(prepared)
    rig.ring.check()
    assert rig.ring.free_slots == 4
    assert all(process_is_gone(pid) for pid in (*pids, zygote_pid))
    rig.pool.close()


def test_public_names() -> None:
    import segue.cpu_lora

    assert JobRing is segue.cpu_lora.JobRing
    assert all(getattr(segue.cpu_lora, name) is not None for name in segue.cpu_lora.__all__)
    assert SharedMemory.__module__ == "segue.cpu_lora.memory"
    with pytest.raises(AttributeError, match="no attribute 'absent'"):
        _ = segue.cpu_lora.absent
