"""What CPU workers can do for adapters that have no pages, as the scheduler sees it."""

from __future__ import annotations

import math

from segue.engine.lora.bridge import CpuBridge
from segue.engine.lora.handover import HandoverPlanner
from segue.engine.lora.store import AdapterStore


class WorkerService:
    """Satisfies segue.scheduler.plan.CpuService. Without a planner nothing is known of times: all take none."""

    def __init__(
        self, store: AdapterStore, bridge: CpuBridge, planner: HandoverPlanner | None, *, layers_per_step: int
    ) -> None:
        """``layers_per_step`` is how far a pass advances between two steps with decodes."""
        self._store = store
        self._bridge = bridge
        self._planner = planner
        self._layers_per_step = layers_per_step

    def pass_seconds(self, version_id: int, tokens: int, step_seconds: float) -> float:
        """See CpuService."""
        if self._bridge.ready_workers == 0 or not self._store.is_coming_to_host(version_id):
            return math.inf
        if self._planner is None:
            return 0.0
        layers = self._planner.cpu_layer_seconds(version_id, tokens)
        return max(sum(layers), step_seconds * len(layers) / self._layers_per_step)

    def step_seconds(self, requests: int) -> float:
        """See CpuService."""
        return 0.0 if self._planner is None else self._planner.costs.step_seconds(requests)

    def held_pages(self, version_id: int) -> int:
        """See CpuService."""
        return self._store.device_pages(version_id) if self._store.has_pages(version_id) else 0
