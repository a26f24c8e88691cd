"""Adds the LoRA deltas to a forward pass: from the device's pages where a layer has landed, else from the CPU workers.

One applier serves one pass. Its rows are cut into segments, one for each adapter present; at every layer the hand-off
policy chooses each adapter's source, so a pass may begin on the CPU and go over to the device at any layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

import torch
from torch import Tensor

from segue.cpu_lora import DeltaTask, Job, JobState
from segue.engine.lanes import Lane
from segue.engine.lora.bridge import ColumnRanges, CpuBridge, PointWork, PostedJob, WorkerLostError, element_type
from segue.engine.lora.device_lora import DeviceLora, LoraSegment
from segue.engine.lora.handover import HandoverPlanner, PassHandover
from segue.engine.lora.host_plan import HostModule
from segue.engine.lora.manifest import Projection
from segue.engine.lora.points import POINT_PROJECTIONS, LoraPoint
from segue.engine.lora.states import LayerState
from segue.engine.lora.store import AdapterStore
from segue.engine.timeline import LayerRecord
from segue.scheduler.handoff import HandoffPolicy, LayerSource, LayerView
from segue.types import LoraSource

_REPORTED = {LayerSource.DEVICE: LoraSource.DEVICE, LayerSource.CPU: LoraSource.CPU}


class Blocked(Enum):
    """What a resting pass waits for. NOTHING is a pass that rests at a layer boundary and can go on.

    DEVICE: it is as far ahead of the device as it may be.
    """

    NOTHING = "nothing"
    DEVICE = "device"
    WEIGHTS = "weights"
    SLOT = "slot"
    DELTAS = "deltas"
    LINK = "link"


@dataclass(slots=True)
class _CpuPart:
    """The rows of one LoRA point that go to the workers, and where their deltas belong."""

    work: PointWork
    columns: ColumnRanges
    posted: PostedJob | None = None


@dataclass(slots=True, kw_only=True)
class LoraResources:
    """What appliers share: the adapters, what computes deltas, the policy, and each projection's (in, out) features.

    ``planner`` makes the plans of a policy that follows them. Another ``policy`` may be set while passes run; they ask
    it from their next layer on.
    """

    store: AdapterStore
    bridge: CpuBridge
    device_lora: DeviceLora
    policy: HandoffPolicy
    shapes: dict[Projection, tuple[int, int]]
    dtype: torch.dtype
    planner: HandoverPlanner
    clock: Callable[[], float]


class LoraApplier:
    """The LoraHook of one pass. ``blocked`` says what it waits for whenever its generators have yielded.

    ``cpu_allowed`` is False for a pass that lost its CPU workers too often. A pass of which every adapter has landed
    never waits. Another keeps close to the device in its ``lane`` with layers that it would not take from the device:
    what is not enqueued yet can still choose weights that land meanwhile. ``close`` must be called when the pass is
    given up before its end.

    An adapter that has no pages at the beginning is served by the CPU alone to the pass's end, whatever the policy.
    """

    def __init__(
        self, segments: tuple[LoraSegment, ...], resources: LoraResources, lane: Lane, *, cpu_allowed: bool
    ) -> None:
        self.blocked = Blocked.NOTHING
        self.records: dict[int, list[LayerRecord]] = {}
        self._segments = segments
        self._resources = resources
        self._lane = lane
        self._cpu_allowed = cpu_allowed
        self._versions = tuple(dict.fromkeys(segment.version_id for segment in segments))
        store = resources.store
        self._landed = {version for version in self._versions if store.is_landed(version)}
        self.without_pages = {version for version in self._versions if not store.has_pages(version)}
        self._device = resources.device_lora.begin(
            [segment for segment in segments if segment.version_id not in self.without_pages]
        )
        self._handovers = self._begin_handovers()
        self._sources: dict[int, LayerSource] = {}
        self._held: list[int] = []
        self._workers: int | None = None
        self._part: _CpuPart | None = None
        self._added: list[PostedJob] = []
        self._start_seconds = 0.0
        self._awaited_since: float | None = None
        self._behind: dict[int, torch.cuda.Event] = {}

    @property
    def awaited_seconds(self) -> float:
        """For how long the pass has been waiting for a layer's weights; 0 if it does not."""
        return 0.0 if self._awaited_since is None else self._resources.clock() - self._awaited_since

    @property
    def job(self) -> Job | None:
        """The job whose deltas the pass waits for."""
        return self._part.posted.job if self._part is not None and self._part.posted is not None else None

    @property
    def has_lost_worker(self) -> bool:
        """Whether deltas that were added are garbage; final when the device has done all that was enqueued."""
        self._added = [posted for posted in self._added if posted.poll() is not JobState.DONE]
        return any(posted.poll() is JobState.FAILED for posted in self._added)

    @property
    def is_on_device(self) -> bool:
        """Whether all deltas of the layer that was entered last come from the device's pages."""
        return all(source is LayerSource.DEVICE for source in self._sources.values())

    def enter_layer(self, layer: int) -> Iterator[None]:
        """Choose each adapter's source; yield while one of them can be served by neither device nor CPU.

        Raises WorkerLostError when a worker was lost.
        """
        is_settled = False
        while self._is_loading and not self._lane.is_close:
            is_settled = self._is_settled(layer)
            if is_settled:
                break
            self.blocked = Blocked.DEVICE
            yield
        self.blocked = Blocked.NOTHING
        if self.has_lost_worker:
            raise WorkerLostError
        for version_id in self._versions:
            source = LayerSource.DEVICE if is_settled else self._choose(version_id, layer)
            while source is LayerSource.WAIT:
                if self._awaited_since is None:
                    self._awaited_since = self._resources.clock()
                self.blocked = Blocked.WEIGHTS
                yield
                source = self._choose(version_id, layer)
            self._awaited_since = None
            self.blocked = Blocked.NOTHING
            self._enter(version_id, layer, source)
        self._workers = self._job_workers(layer)
        self._start_seconds = self._resources.clock()

    def _enter(self, version_id: int, layer: int, source: LayerSource) -> None:
        self._sources[version_id] = source
        store = self._resources.store
        if version_id in self._handovers:
            at_once = source is LayerSource.CPU or self._layer_state(version_id, layer) is LayerState.LANDED
            self._handovers[version_id].enter(source, at_once=at_once)
        if source is LayerSource.CPU:
            store.hold_host(version_id)
            self._held.append(version_id)
            return
        landing = store.landing_event(version_id, layer)
        # Layers that came by one copy have one event.
        if landing is not None and landing is not self._behind.get(version_id):
            self._lane.wait(landing)
            self._behind[version_id] = landing

    def begin(self, layer: int, point: LoraPoint, x: Tensor) -> None:
        """Send the rows of CPU segments to the workers, so that they compute beside the base GEMM."""
        self._part = self._cpu_part(layer, point)
        if self._part is not None:
            self._post(self._part, x)

    def finish(self, layer: int, point: LoraPoint, x: Tensor, out: Tensor) -> Iterator[None]:
        """Add all deltas into ``out`` [T, merged out features] in place; yield while a reply is pending.

        Raises WorkerLostError when a worker was lost.
        """
        on_device = {version_id for version_id in self._versions if self._sources[version_id] is LayerSource.DEVICE}
        if on_device:
            self._device.add(layer, point, x, out, on_device)
        part = self._part
        if part is None:
            return
        while part.posted is None:
            if self._resources.bridge.ready_workers == 0:
                raise WorkerLostError
            self.blocked = Blocked.SLOT
            yield
            self._post(part, x)
        posted = part.posted
        while not self._resources.bridge.may_add(posted):
            self.blocked = Blocked.DELTAS
            yield
        while posted.link_seconds > self._resources.clock():
            self.blocked = Blocked.LINK
            yield
        self.blocked = Blocked.NOTHING
        self._part = None
        self._resources.bridge.add(posted, part.columns, out)
        self._added.append(posted)

    def leave_layer(self, _layer: int) -> None:
        """Record the layer and let go of host weights."""
        now = self._resources.clock()
        for version_id in self._versions:
            record = LayerRecord(_REPORTED[self._sources[version_id]], self._start_seconds, now)
            self.records.setdefault(version_id, []).append(record)
        self._drop_held()
        self._lane.mark()

    def conclude(self, requests: Sequence[int], lane_seconds: Callable[[], Sequence[float]]) -> None:
        """The pass, for which ``requests`` wait for their first token, has ended well: what its layers took corrects
        the costs. ``lane_seconds``: see ``Lane.layer_seconds``."""
        for version_id, handover in self._handovers.items():
            handover.conclude(requests, self.records.get(version_id, ()), lane_seconds)

    def close(self) -> None:
        """Give up the pass: a job under way becomes an orphan that holds its host weights until it is complete."""
        self._resources.planner.leave_workers(self)
        for handover in self._handovers.values():
            handover.give_up()
        part, self._part = self._part, None
        if part is not None and part.posted is not None:
            self._resources.bridge.leave(part.posted)
        self._drop_held()

    @property
    def _is_loading(self) -> bool:
        store = self._resources.store
        return any(not store.is_landed(version) for version in self._versions if version not in self._landed)

    def _is_settled(self, layer: int) -> bool:
        """Whether nothing that lands meanwhile can change where the layer's deltas come from."""
        return all(self._choose(version_id, layer) is LayerSource.DEVICE for version_id in self._versions)

    def _choose(self, version_id: int, layer: int) -> LayerSource:
        if version_id in self._landed:
            return LayerSource.DEVICE
        store = self._resources.store
        state = self._layer_state(version_id, layer)
        landed = state is LayerState.LANDED
        enqueued = state is LayerState.ENQUEUED
        in_host = store.is_in_host(version_id, layer)
        # What is enqueued lands within milliseconds: no plan would have the CPU do it as well.
        handover = None if landed or enqueued or not in_host else self._handovers.get(version_id)
        view = LayerView(
            layer=layer,
            landed=landed,
            enqueued=enqueued,
            adapter_landed=store.is_landed(version_id),
            in_host=in_host,
            ready_workers=self._resources.bridge.ready_workers,
            cpu_allowed=self._cpu_allowed,
            planned=None if handover is None else handover.planned(layer, self._lane.layers_ahead),
        )
        if version_id in self.without_pages:
            return self._choose_without_pages(version_id, view)
        return self._resources.policy.choose(view)

    def _choose_without_pages(self, version_id: int, view: LayerView) -> LayerSource:
        """The CPU, or a wait for what is being read. Raises WorkerLostError where neither will ever be."""
        if view.cpu_possible:
            return LayerSource.CPU
        if view.in_host or not self._resources.store.is_coming_to_host(version_id):
            raise WorkerLostError
        return LayerSource.WAIT

    def _layer_state(self, version_id: int, layer: int) -> LayerState:
        return self._resources.store.layer_state(version_id, layer)

    def _begin_handovers(self) -> dict[int, PassHandover]:
        """The plans of the adapters that are loading."""
        planner = self._resources.planner
        if not self._resources.policy.follows_plan:
            return {}
        rows = self._rows_of(self._versions)
        return {
            version_id: planner.begin(self, version_id, count, sum(rows.values()), cpu_allowed=self._cpu_allowed)
            for version_id, count in rows.items()
            if version_id not in self._landed and version_id not in self.without_pages
        }

    def _rows_of(self, versions: Iterable[int]) -> dict[int, int]:
        """Each version's rows of the pass."""
        rows = dict.fromkeys(versions, 0)
        for segment in self._segments:
            if segment.version_id in rows:
                rows[segment.version_id] += segment.row_stop - segment.row_start
        return rows

    def _job_workers(self, layer: int) -> int | None:
        """How many workers share each job of the layer that was entered."""
        planner = self._resources.planner
        on_cpu = [version_id for version_id in self._versions if self._sources[version_id] is LayerSource.CPU]
        if not on_cpu:
            planner.leave_workers(self)
            return None
        return planner.job_workers(self, layer, self._rows_of(on_cpu))

    def _cpu_part(self, layer: int, point: LoraPoint) -> _CpuPart | None:
        segments = tuple(item for item in self._segments if self._sources[item.version_id] is LayerSource.CPU)
        modules = {
            segment.version_id: {
                module.projection: module
                for module in self._resources.store.host_view(segment.version_id, layer).modules
            }
            for segment in segments
        }
        present = [
            projection
            for projection in POINT_PROJECTIONS[point]
            if any(projection in targeted for targeted in modules.values())
        ]
        if not present:
            return None
        columns = self._columns(point, present)
        tasks: list[DeltaTask] = []
        row = 0
        for segment in segments:
            stop = row + segment.row_stop - segment.row_start
            for projection, (offset, _, width) in zip(present, columns, strict=True):
                tasks.append(self._task(modules[segment.version_id].get(projection), row, stop, offset, width))
            row = stop
        width = columns[-1][0] + columns[-1][2]
        work = PointWork(segments=segments, tasks=tuple(tasks), delta_width=width, workers=self._workers)
        return _CpuPart(work=work, columns=columns)

    def _columns(self, point: LoraPoint, present: list[Projection]) -> ColumnRanges:
        columns = []
        in_reply = in_output = 0
        for projection in POINT_PROJECTIONS[point]:
            width = self._resources.shapes[projection][1]
            if projection in present:
                columns.append((in_reply, in_output, width))
                in_reply += width
            in_output += width
        return tuple(columns)

    def _task(self, module: HostModule | None, row: int, stop: int, offset: int, width: int) -> DeltaTask:
        if module is None:
            return DeltaTask(row_start=row, row_stop=stop, out_offset=offset, out_features=width, rank=0)
        return DeltaTask(
            row_start=row,
            row_stop=stop,
            out_offset=offset,
            out_features=width,
            rank=module.rank,
            a_offset_bytes=module.a_offset_bytes,
            b_offset_bytes=module.b_offset_bytes,
            scale=module.scale,
            dtype=element_type(self._resources.dtype),
        )

    def _post(self, part: _CpuPart, x: Tensor) -> None:
        part.posted = self._resources.bridge.post(x, part.work)

    def _drop_held(self) -> None:
        for version_id in self._held:
            self._resources.store.drop_host(version_id)
        self._held = []
