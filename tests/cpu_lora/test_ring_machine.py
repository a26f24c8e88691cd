"""The job ring against a model of its slots, in every order of posting, answering, giving up and losing workers."""

from __future__ import annotations

import os
from dataclasses import dataclass

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from segue.cpu_lora import (
    CpuLoraConfig,
    DeltaTask,
    ElementType,
    Job,
    JobRing,
    JobState,
    SharedLayout,
    SharedMemory,
    WorkerPool,
)
from segue.cpu_lora.atomics import publish
from segue.cpu_lora.workers import WorkerLife, WorkerPhase
from tests.cpu_lora.fake_worker import FakeWorker, mark

# A failure is shrunk for minutes before it is shown.
pytestmark = pytest.mark.timeout(600)

WORKERS = 3
SLOTS = 3
IN_FEATURES = 2
WIDTH = 3
MOST_ROWS = 9
LARGEST_SEQUENCE = 0xFFFFFFFF


@dataclass(slots=True)
class ModelShare:
    generation: int
    rows: slice
    answer: JobState = JobState.PENDING


@dataclass(slots=True, kw_only=True)
class ModelJob:
    """What must hold of the job in a slot. ``is_flagged``: its request flag is written, by the ring or by a stream."""

    job: Job
    shares: dict[int, ModelShare]
    is_signalled: bool = False
    is_flagged: bool = False
    is_abandoned: bool = False

    @property
    def answers(self) -> set[JobState]:
        return {share.answer for share in self.shares.values()}

    @property
    def state(self) -> JobState:
        if not self.is_flagged or JobState.PENDING in self.answers:
            return JobState.PENDING
        return JobState.FAILED if JobState.FAILED in self.answers else JobState.DONE


@dataclass(slots=True)
class FakeProcess:
    """A worker's process: forked, then serving, then dead, which the watchdog learns only later."""

    generation: int
    worker: FakeWorker | None = None
    is_dead: bool = False


class RingMachine(RuleBasedStateMachine):
    """The real ring, slots and worker lives; in place of processes and the watchdog's thread there are rules."""

    def __init__(self) -> None:
        super().__init__()
        config = CpuLoraConfig(
            workers=WORKERS, slots=SLOTS, max_tasks=2, row_bytes=4096, delta_bytes=4096, store_bytes=64,
            min_rows_per_share=2,
        )  # fmt: skip
        self.memory = SharedMemory.create(SharedLayout.plan(config))
        self.pool = WorkerPool(config, self.memory)
        self.ring = JobRing(self.pool)
        self.lives: list[WorkerLife] = self.pool._watchdog.lives
        self.processes: dict[int, FakeProcess] = {}
        self.used: dict[int, ModelJob] = {}
        self.given_back: list[Job] = []
        self.sequences = [0] * SLOTS
        self.arms = 0
        self.has_waited = False

    @initialize(first=st.sampled_from([0, LARGEST_SEQUENCE - 2]), workers=st.integers(1, WORKERS))
    def begin(self, first: int, workers: int) -> None:
        """Some workers serve; the slots may have been used for long, so that their numbers are about to wrap."""
        for entry in self.pool.slot_table._slots:
            entry.sequence = first
        self.sequences = [first] * SLOTS
        for index in range(workers):
            self.start_worker(index)

    # -- the engine ----------------------------------------------------------------------------------------------------

    def reclaim(self) -> None:
        """Abandoned jobs are over when the last share is answered."""
        for slot, entry in tuple(self.used.items()):
            if entry.is_abandoned and (not entry.is_signalled or entry.state is not JobState.PENDING):
                del self.used[slot]

    def ready(self) -> list[tuple[int, int]]:
        return [
            (index, process.generation)
            for index, process in sorted(self.processes.items())
            if process.worker is not None and self.lives[index].phase is WorkerPhase.LIVE
        ]

    @rule(row_count=st.integers(1, MOST_ROWS))
    def post(self, row_count: int) -> None:
        """What an engine does when nothing is deferred."""
        prepared = set(self.used)
        self.prepare(row_count)
        for slot in set(self.used) - prepared:
            self.signal(slot, defers=False)

    @rule(row_count=st.integers(1, MOST_ROWS))
    def prepare(self, row_count: int) -> None:
        task = DeltaTask(row_start=0, row_stop=row_count, out_offset=0, out_features=WIDTH, rank=0)
        job = self.ring.prepare(row_count, IN_FEATURES, ElementType.FLOAT32, [task], WIDTH)
        if not self.ready() or len(self.used) == SLOTS:
            assert job is None
            return
        assert job is not None, "a slot and a worker are free"
        assert job.slot not in self.used, "a slot is handed out twice"
        claims = [process.worker.claim for process in self.processes.values() if process.worker is not None]
        assert all(claim is None or claim[0] != job.slot for claim in claims), "a worker still writes to the slot"
        assert job.sequence == self.sequences[job.slot] % LARGEST_SEQUENCE + 1
        self.sequences[job.slot] = job.sequence
        assert {(share.worker, share.generation) for share in job.shares} <= set(self.ready())
        rows = [row for share in job.shares for row in range(share.row_start, share.row_stop)]
        assert rows == list(range(row_count)), "the shares are not the rows"
        job.rows[:] = mark(job.sequence, 0)
        shares = {
            share.worker: ModelShare(share.generation, slice(share.row_start, share.row_stop)) for share in job.shares
        }
        assert len(shares) == len(job.shares), "a worker has two shares"
        self.used[job.slot] = ModelJob(job=job, shares=shares)

    @rule(slot=st.integers(0, SLOTS - 1), defers=st.booleans())
    def signal(self, slot: int, defers: bool) -> None:
        entry = self.used.get(slot)
        if entry is None:
            return
        send = self.ring.defer if defers else self.ring.signal
        if entry.is_signalled:
            with pytest.raises(RuntimeError, match=r"has been given back|cannot go from signalled"):
                send(entry.job)
            return
        send(entry.job)
        entry.is_signalled, entry.is_flagged = True, not defers

    @rule(slot=st.integers(0, SLOTS - 1))
    def write_deferred_flag(self, slot: int) -> None:
        """What a CUDA stream does, sooner or later, even when the job has been abandoned by then."""
        entry = self.used.get(slot)
        if entry is not None and entry.is_signalled and not entry.is_flagged:
            publish(self.memory.words, entry.job.request_flag_offset // 4, entry.job.sequence)
            entry.is_flagged = True

    @rule(slot=st.integers(0, SLOTS - 1))
    def release(self, slot: int) -> None:
        entry = self.used.get(slot)
        if entry is None or entry.is_abandoned:
            return
        if entry.state is JobState.PENDING:
            with pytest.raises(RuntimeError, match="is not complete"):
                self.ring.release(entry.job)
            return
        self.ring.release(entry.job)
        self.given_back.append(entry.job)
        del self.used[slot]

    @rule()
    def release_all(self) -> None:
        for slot in range(SLOTS):
            self.release(slot)

    def check_deltas(self, entry: ModelJob) -> None:
        if entry.state is JobState.FAILED:
            with pytest.raises(RuntimeError, match="it is failed"):
                _ = entry.job.deltas
            return
        for worker, share in entry.shares.items():
            assert (entry.job.deltas[share.rows] == mark(entry.job.sequence, worker)).all(), "deltas of another job"

    @rule(slot=st.integers(0, SLOTS - 1))
    def abandon(self, slot: int) -> None:
        entry = self.used.get(slot)
        if entry is None or entry.is_abandoned:
            return
        self.ring.abandon(entry.job)
        entry.is_abandoned = True
        self.given_back.append(entry.job)

    @precondition(lambda self: self.given_back)
    @rule(number=st.integers(0, 1000))
    def use_what_was_given_back(self, number: int) -> None:
        job = self.given_back[number % len(self.given_back)]
        for use in (Job.poll, self.ring.signal, self.ring.defer, self.ring.release, self.ring.abandon):
            with pytest.raises(RuntimeError, match="has been given back"):
                use(job)

    @rule(arms=st.booleans())
    def arm_ahead(self, arms: bool) -> None:
        if arms:
            self.pool.arm()
            self.arms += 1
        elif self.arms:
            self.pool.disarm()
            self.arms -= 1

    @precondition(lambda self: not self.has_waited)
    @rule()
    def wait(self) -> None:
        """Once, for a wait in vain gives up the core again and again."""
        self.has_waited = True
        entries = [entry for entry in self.used.values() if not entry.is_abandoned]
        complete = any(entry.state is not JobState.PENDING for entry in entries)
        assert self.ring.wait([entry.job for entry in entries], 0.0) == complete

    # -- the workers ---------------------------------------------------------------------------------------------------

    def serving(self, index: int) -> FakeWorker | None:
        process = self.processes.get(index)
        return None if process is None or process.is_dead else process.worker

    @rule(index=st.integers(0, WORKERS - 1))
    def look(self, index: int) -> None:
        """A worker finds each share of its own life that is flagged and unanswered, and no other."""
        worker = self.serving(index)
        if worker is None or worker.claim is not None:
            return
        mine = [
            (slot, entry.job.sequence)
            for slot, entry in sorted(self.used.items())
            if entry.is_flagged
            and (share := entry.shares.get(index)) is not None
            and share.generation == worker.generation
            and share.answer is JobState.PENDING
        ]
        worker.look()
        assert worker.claim == (mine[0] if mine else None)
        if worker.claim is not None:
            assert (worker.compute() == mark(worker.claim[1], 0)).all(), "the rows of another job"

    @rule(index=st.integers(0, WORKERS - 1))
    def reply(self, index: int) -> None:
        worker = self.serving(index)
        if worker is None or worker.claim is None:
            return
        slot, sequence = worker.claim
        entry = self.used[slot]
        assert entry.job.sequence == sequence, "the slot was reused under a worker's hands"
        worker.reply()
        entry.shares[index].answer = JobState.DONE

    @rule()
    def serve_all(self) -> None:
        """Every worker answers all that it can: a job whose workers all live is done then."""
        for index in range(WORKERS):
            for _ in range(SLOTS + 1):
                self.reply(index)
                self.look(index)
        for entry in self.used.values():
            if entry.is_flagged and all(
                (worker := self.serving(index)) is not None and worker.generation == share.generation
                for index, share in entry.shares.items()
            ):
                assert entry.state is JobState.DONE

    # -- the workers' lives --------------------------------------------------------------------------------------------

    @rule(index=st.integers(0, WORKERS - 1))
    def start_worker(self, index: int) -> None:
        self.fork(index)
        self.see_fork(index)
        self.come_up(index)

    @rule(index=st.integers(0, WORKERS - 1))
    def fork(self, index: int) -> None:
        if self.lives[index].phase is WorkerPhase.ABSENT:
            self.lives[index].start()
            self.processes[index] = FakeProcess(self.lives[index].generation)

    @rule(index=st.integers(0, WORKERS - 1))
    def see_fork(self, index: int) -> None:
        if self.lives[index].phase is WorkerPhase.STARTING:
            self.lives[index].live(os.getpid(), os.eventfd(0, os.EFD_CLOEXEC))

    @rule(index=st.integers(0, WORKERS - 1))
    def come_up(self, index: int) -> None:
        process = self.processes.get(index)
        if process is not None and not process.is_dead and process.worker is None:
            process.worker = FakeWorker(self.memory, index, process.generation)

    @rule(index=st.integers(0, WORKERS - 1))
    def kill(self, index: int) -> None:
        """The watchdog has sent the signal. Until it takes effect the worker goes on, but gets no new shares."""
        if self.lives[index].phase is WorkerPhase.LIVE:
            self.lives[index]._move(WorkerPhase.KILLED)

    @rule(index=st.integers(0, WORKERS - 1))
    def die(self, index: int) -> None:
        if index in self.processes:
            self.processes[index].is_dead = True

    @rule(index=st.integers(0, WORKERS - 1))
    def bury(self, index: int) -> None:
        """The watchdog sees the death, and only then answers what the worker has left."""
        process = self.processes.get(index)
        if process is None or not process.is_dead or self.lives[index].phase is WorkerPhase.STARTING:
            return
        self.pool._watchdog._bury({index})
        del self.processes[index]
        for entry in self.used.values():
            share = entry.shares.get(index)
            if share is not None and share.answer is JobState.PENDING:
                share.answer = JobState.FAILED

    @rule(index=st.integers(0, WORKERS - 1))
    def lose_worker(self, index: int) -> None:
        self.die(index)
        self.bury(index)

    # -- what always holds ---------------------------------------------------------------------------------------------

    @invariant()
    def agrees_with_the_model(self) -> None:
        self.reclaim()
        assert self.ring.free_slots == SLOTS - len(self.used)
        self.ring.check()
        assert self.pool.ready_lives() == self.ready()
        armed = len(self.used) + self.arms
        assert self.pool._arming.count == armed
        assert self.memory.words[self.memory.layout.armed_offset // 4] == (armed > 0)
        for entry in self.used.values():
            if not entry.is_abandoned:
                assert entry.job.poll() is entry.state
                if entry.state is not JobState.PENDING:
                    self.check_deltas(entry)
        assert self.pool.slot_table.waiting_workers() == {
            worker
            for entry in self.used.values()
            for worker, share in entry.shares.items()
            if entry.is_flagged and share.answer is JobState.PENDING
        }

    def teardown(self) -> None:
        """When all flags are written and all workers dead, every job is over and every slot free."""
        for slot in range(SLOTS):
            self.abandon(slot)
            self.write_deferred_flag(slot)
        for index in range(WORKERS):
            if index in self.processes:
                self.processes[index].is_dead = True
            self.see_fork(index)
            self.bury(index)
        self.agrees_with_the_model()
        assert self.used == {}
        assert self.ring.free_slots == SLOTS
        self.pool.close()
        self.memory.close()


RingMachine.TestCase.settings = settings(max_examples=200, stateful_step_count=50, deadline=None)
TestRing = RingMachine.TestCase
