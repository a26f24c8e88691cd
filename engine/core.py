"""The engine: takes messages, carries out the scheduler's plan step by step, and says what each step brought.

All of it runs on one thread. Copies, disk reads and CPU LoRA jobs run elsewhere and are seen when they have ended.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from segue.engine.forward_pass import ForwardPass, PassState, RequestRows
from segue.engine.lora.bridge import CpuBridge
from segue.engine.lora.manifest import AdapterManifest
from segue.engine.lora.store import AdapterStore, LoadFailed
from segue.engine.memory.pool import PagePool
from segue.engine.messages import Failed, Finished, NewTokens, StepOutput, Submit, VersionFailed, VersionState
from segue.engine.request import Request, RequestState
from segue.engine.requests import RequestTable
from segue.engine.residency import Residency
from segue.engine.runner import PassRunner
from segue.engine.sampling import SampledToken, UnusableLogitsError, sample
from segue.errors import (
    AdapterNotFoundError,
    AdapterRejectedError,
    InternalError,
    InvalidRequestError,
    OverloadedError,
    SegueError,
)
from segue.scheduler.batch import (
    Admission,
    AdmittedRequest,
    PassPlan,
    QueuedRequest,
    SchedulerLimits,
    pages_for,
    plan_step,
)
from segue.types import FinishReason

_MAX_LOST_PASSES = 3
# A prompt's page and the page that admission keeps for its first token.
_SMALLEST_REQUEST_PAGES = 2


class Engine:
    """One base model, its pool and its adapters. ``step`` is called as long as there is work.

    ``max_waiting`` bounds the queue. With ``check_invariants`` every manager is verified after every step.
    """

    def __init__(
        self,
        *,
        runner: PassRunner,
        pool: PagePool,
        store: AdapterStore,
        bridge: CpuBridge,
        limits: SchedulerLimits,
        max_waiting: int,
        clock: Callable[[], float],
        check_invariants: bool = False,
    ) -> None:
        self._runner = runner
        self._pool = pool
        self._store = store
        self._bridge = bridge
        self._limits = limits
        self._max_waiting = max_waiting
        self._clock = clock
        self._check_invariants = check_invariants
        self._requests = RequestTable()
        self._residency = Residency(store, pool, self._requests)
        self._passes: list[ForwardPass] = []
        self._output = StepOutput()
        self._version_failures: dict[int, str] = {}
        self._evictions: set[int] = set()
        self._versions: set[int] = set()
        self._unreported: list[VersionFailed] = []
        self._progressed = False
        self.steps = 0

    @property
    def requests(self) -> RequestTable:
        return self._requests

    @property
    def passes(self) -> Sequence[ForwardPass]:
        """Passes that have not ended."""
        return self._passes

    @property
    def can_go_on(self) -> bool:
        """Whether another step would do anything before something arrives from outside."""
        resting = any(item.state is PassState.RESTING for item in self._passes)
        return resting or self._progressed

    # -- messages ----------------------------------------------------------------------------------------------------

    def submit(self, submit: Submit) -> None:
        """Queue a request, or report why it cannot be served."""
        error = self._refusal(submit)
        if error is not None:
            self._output.failed.append(Failed(submit.number, error.reason, error.message))
            return
        self._requests.add(Request.of(submit))
        if submit.adapter_version_id is not None:
            self._store.acquire(submit.adapter_version_id)
            self._store.start_load(submit.adapter_version_id)

    def cancel(self, number: int) -> None:
        """End a request; its pages are free as soon as the pass that it is in has ended."""
        request = self._requests.get(number)
        if request is not None and request.state is not RequestState.ENDING:
            self._finish(request, FinishReason.CANCELLED)

    def open_version(self, manifest: AdapterManifest, descriptor: int) -> None:
        """Make an adapter version known; the engine owns ``descriptor`` from now on."""
        try:
            self._store.register(manifest, descriptor)
        except AdapterRejectedError as error:
            self._fail_version(manifest.version_id, error.message)
            return
        pages = self._store.device_pages(manifest.version_id)
        if pages + _SMALLEST_REQUEST_PAGES > self._pool.pages:
            self._fail_version(
                manifest.version_id, f"the adapter takes {pages} pages, the pool has {self._pool.pages} in all"
            )
            self._store.close_version(manifest.version_id)
            return
        self._versions.add(manifest.version_id)

    def close_version(self, version_id: int) -> None:
        """Forget a version when its last user ends."""
        self._version_failures.pop(version_id, None)
        self._evictions.discard(version_id)
        self._versions.discard(version_id)
        self._store.close_version(version_id)

    def evict(self, version_id: int) -> None:
        """Drop a version's weights from device and host as soon as no admitted request uses them."""
        if version_id in self._versions:
            self._evictions.add(version_id)
        self._carry_out_evictions()

    def preload(self, version_id: int) -> None:
        """Bring a version to the host, and to the device when there are free pages for it."""
        if version_id not in self._versions:
            return
        self._store.start_load(version_id)
        pages = self._residency.pages_to_reserve(version_id)
        if 0 < pages <= self._pool.free_pages:
            self._residency.start_copy(version_id, pages)

    def version_states(self) -> list[VersionState]:
        """Where each known version is, and how many requests name it."""
        return [
            VersionState(version_id, self._store.tier(version_id), self._store.users(version_id))
            for version_id in sorted(self._versions)
        ]

    # -- one step ----------------------------------------------------------------------------------------------------

    def step(self) -> tuple[StepOutput, list[VersionFailed]]:
        """Plan one step and carry it out; what it brought, and the versions that failed."""
        self.steps += 1
        self._progressed = False
        self._apply_store_events()
        for version_id in self._bridge.reap():
            self._store.drop_host(version_id)
        plan = plan_step(
            [_queued(request) for request in self._requests.queue],
            [_admitted(request) for request in self._requests.admitted if request.state is RequestState.ADMITTED],
            free_pages=self._pool.free_pages,
            passes_in_flight=len(self._passes),
            residency=self._residency,
            limits=self._limits,
        )
        for version_id in plan.evict:
            self._store.evict_device(version_id)
        for number in plan.preempt:
            self._pool.free(self._requests.preempt(self._known(number)))
        for number in plan.grow:
            self._known(number).pages.extend(self._pool.allocate(1, f"request {number}"))
        for admission in plan.admit:
            self._admit(admission)
        for pass_plan in plan.passes:
            self._start_pass(pass_plan)
        if plan.decode:
            self._decode([self._known(number) for number in plan.decode])
        self._advance_passes(plan.layers_per_pass)
        if self._check_invariants:
            self.check()
        return self._take_output()

    def check(self) -> None:
        """Verify the invariants of every manager. Raises AssertionError."""
        self._requests.check(self._limits.page_tokens)
        self._pool.check()
        self._store.check()
        self._bridge.check()
        in_passes = {rows.request.number for item in self._passes for rows in item.rows}
        flying = {request.number for request in self._requests if request.in_flight}
        assert in_passes == flying, f"in passes {in_passes}, in flight {flying}"
        kv_pages = sum(len(request.pages) for request in self._requests)
        held = self._pool.free_pages + kv_pages + self._store.device_pages_held
        assert held == self._pool.pages, f"{held} pages are accounted for of {self._pool.pages}"

    # -- parts of a step ---------------------------------------------------------------------------------------------

    def _refusal(self, submit: Submit) -> SegueError | None:
        version_id = submit.adapter_version_id
        adapter_pages = 0
        if version_id is not None:
            if version_id in self._version_failures:
                return AdapterRejectedError(self._version_failures[version_id])
            if version_id not in self._versions:
                return AdapterNotFoundError("this adapter version is no longer known")
            adapter_pages = self._store.device_pages(version_id)
        kv_pages = pages_for(len(submit.prompt_token_ids) + submit.max_tokens, self._limits.page_tokens)
        if adapter_pages + kv_pages + 1 > self._pool.pages:
            return InvalidRequestError(
                f"the request needs {kv_pages} pages of KV and {adapter_pages} for its adapter; "
                f"the pool has {self._pool.pages}"
            )
        if len(self._requests.queue) >= self._max_waiting:
            return OverloadedError(f"{self._max_waiting} requests are waiting already")
        return None

    def _known(self, number: int) -> Request:
        request = self._requests.get(number)
        if request is None:
            raise KeyError(f"the plan names request {number}, which has ended")
        return request

    def _apply_store_events(self) -> None:
        for event in self._store.drain():
            self._progressed = True
            if isinstance(event, LoadFailed):
                self._fail_version(event.version_id, event.message)

    def _fail_version(self, version_id: int, message: str) -> None:
        self._version_failures[version_id] = message
        self._versions.discard(version_id)
        self._unreported.append(VersionFailed(version_id, message))
        for request in self._requests:
            if request.version_id == version_id and request.state is not RequestState.ENDING:
                self._output.failed.append(Failed(request.number, AdapterRejectedError.reason, message))
                self._end(request)

    def _admit(self, admission: Admission) -> None:
        request = self._known(admission.number)
        tier = self._residency.tier(request.version_id)
        if admission.version_id is not None and admission.adapter_pages:
            self._residency.start_copy(admission.version_id, admission.adapter_pages)
        self._requests.admit(request, self._pool.allocate(admission.kv_pages, f"request {request.number}"))
        request.timeline.admit(tier, self._clock())

    def _start_pass(self, plan: PassPlan) -> None:
        rows = [RequestRows(self._known(item.number), item.start, item.count) for item in plan.rows]
        cpu_allowed = all(item.request.lost_passes < _MAX_LOST_PASSES for item in rows)
        self._passes.append(self._runner.start(rows, plan.version_id, cpu_allowed=cpu_allowed))
        for item in rows:
            item.request.in_flight = True

    def _decode(self, requests: list[Request]) -> None:
        done = self._runner.decode(requests)
        self._commit(done)
        self._progressed = True

    def _advance_passes(self, max_layers: int | None) -> None:
        for item in list(self._passes):
            if all(rows.request.state is RequestState.ENDING for rows in item.rows):
                item.close()
                self._leave(item)
                continue
            if item.state in (PassState.RESTING, PassState.BLOCKED):
                with torch.inference_mode():
                    item.advance(max_layers)
            if item.state is PassState.LOST:
                self._leave(item)
                for rows in item.rows:
                    rows.request.lost_passes += 1
                    rows.request.timeline.retry()
                self._progressed = True
            elif item.state is PassState.DONE and self._is_verified(item):
                self._leave(item)
                self._commit(item)
                self._progressed = True

    def _carry_out_evictions(self) -> None:
        for version_id in self._evictions - self._requests.versions_in_use():
            self._evictions.discard(version_id)
            self._store.evict_device(version_id)
            self._store.evict_host(version_id)

    def _is_verified(self, item: ForwardPass) -> bool:
        versions = {rows.request.version_id for rows in item.rows}
        return all(version_id is None or self._store.is_verified(version_id) for version_id in versions)

    def _leave(self, item: ForwardPass) -> None:
        """The pass has ended: its requests may be scheduled again, and those that were ending end."""
        self._passes.remove(item)
        for rows in item.rows:
            rows.request.in_flight = False
            if rows.request.state is RequestState.ENDING:
                self._release(rows.request)

    def _commit(self, item: ForwardPass) -> None:
        """Take the KV of a pass as computed, and the next token of each request that has all of it."""
        live = [(index, rows) for index, rows in enumerate(item.rows) if rows.request.state is RequestState.ADMITTED]
        sampling = []
        for index, rows in live:
            request = rows.request
            records = item.applier.records.get(request.version_id) if request.version_id is not None else None
            request.timeline.record_pass(records or [])
            request.computed_tokens = rows.start + rows.count
            if request.computed_tokens == len(request.token_ids):
                sampling.append((index, request))
        self._sample(item, sampling)

    def _sample(self, item: ForwardPass, wanted: list[tuple[int, Request]]) -> None:
        """Draw the next token of each request from its row of logits; one whose logits are unusable fails alone."""
        while wanted:
            logits = item.logits[[index for index, _ in wanted]]
            try:
                tokens = sample(logits, [request.sampling_row() for _, request in wanted])
            except UnusableLogitsError as error:
                for position in error.problems:
                    self._fail_computation(wanted[position][1])
                wanted = [each for position, each in enumerate(wanted) if position not in error.problems]
                continue
            for (_, request), token in zip(wanted, tokens, strict=True):
                self._append(request, token)
            return

    def _fail_computation(self, request: Request) -> None:
        """The model gave no usable logits: with an adapter that is the adapter's doing, its weights overflow."""
        error: SegueError = InternalError("the model's output is not finite")
        if request.version_id is not None:
            error = AdapterRejectedError("the model's output with this adapter is not finite")
        self._output.failed.append(Failed(request.number, error.reason, error.message))
        self._end(request)

    def _append(self, request: Request, token: SampledToken) -> None:
        if request.timeline.first_token_seconds is None:
            request.timeline.first_token_seconds = self._clock()
        request.append(token.token_id)
        logprobs = [] if token.logprob is None else [token.logprob]
        self._output.tokens.append(NewTokens(request.number, [token.token_id], logprobs))
        if token.token_id in request.submit.sampling.stop_token_ids:
            self._finish(request, FinishReason.STOP)
        elif request.generated_tokens >= request.submit.max_tokens:
            self._finish(request, FinishReason.LENGTH)

    def _finish(self, request: Request, reason: FinishReason) -> None:
        landed = () if request.version_id is None else self._store.landed_seconds(request.version_id)
        timing = request.timeline.timing(landed, request.generated_tokens, self._clock())
        self._output.finished.append(
            Finished(request.number, reason, len(request.submit.prompt_token_ids), request.generated_tokens, 0, timing)
        )
        self._end(request)

    def _end(self, request: Request) -> None:
        if request.in_flight:
            request.move_to(RequestState.ENDING)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        self._pool.free(self._requests.end(request))
        if request.version_id is not None:
            self._store.release(request.version_id)
            self._carry_out_evictions()
        self._progressed = True

    def _take_output(self) -> tuple[StepOutput, list[VersionFailed]]:
        output, self._output = self._output, StepOutput()
        failures, self._unreported = self._unreported, []
        return output, failures


def _queued(request: Request) -> QueuedRequest:
    return QueuedRequest(number=request.number, tokens=len(request.token_ids), version_id=request.version_id)


def _admitted(request: Request) -> AdmittedRequest:
    return AdmittedRequest(
        number=request.number,
        tokens=len(request.token_ids),
        computed_tokens=request.computed_tokens,
        pages=len(request.pages),
        version_id=request.version_id,
        in_flight=request.in_flight,
    )
