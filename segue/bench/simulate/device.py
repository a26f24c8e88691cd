"""How long a simulated replica's device takes: steps, and the passes of loading adapters between them."""

from __future__ import annotations

import math
from dataclasses import dataclass

from segue.bench.simulate.config import ReplicaConfig
from segue.bench.simulate.residency import SimulatedResidency
from segue.scheduler.cost_model import StepLoad
from segue.scheduler.plan import PassPlan, StepPlan

# What prompts took is forgotten over so many seconds of steps: some answers long.
_SHARE_SECONDS = 10.0


@dataclass(frozen=True, slots=True)
class Flight:
    """A pass under way, which ends at ``ends``."""

    plan: PassPlan
    ends: float


@dataclass(slots=True)
class _Pass:
    """A pass of an adapter that was loading when it began: ``layers`` are still to run, and it ends no earlier than
    ``ready_at``."""

    plan: PassPlan
    load: StepLoad
    layers: int
    ready_at: float


class SimulatedDevice:
    """A cost model in place of a device."""

    def __init__(self, config: ReplicaConfig, residency: SimulatedResidency) -> None:
        self._config = config
        self._profile = config.profile
        self._residency = residency
        self._passes: list[_Pass] = []
        self.prompt_share = 0.0
        """Of the time of late, what prompts took."""

    @property
    def has_passes(self) -> bool:
        """Whether layers of a pass are still to run."""
        return bool(self._passes)

    def begin(self, plan: PassPlan, load: StepLoad, now: float) -> None:
        """Begin a pass with this load."""
        ready_at = now + self._profile.cold_prefill_seconds(load, self._config.cpu_cores)
        self._passes.append(_Pass(plan, load, self._profile.layers, ready_at))

    def step(
        self, decodes: StepLoad, prompts: StepLoad, plan: StepPlan, now: float
    ) -> tuple[float, tuple[Flight, ...]]:
        """Seconds of a step, and the passes that it brings to their end.

        The device computes the rows of passes as well: each pass on its own, layers between two steps of those that
        decode, or all prompts in one iteration where they do not ride (``prompts`` has them then). A pass ends with the
        step or, where its weights come later, when they have come.
        """
        seconds = self._advance_passes(plan)
        seconds += self._profile.step_seconds(decodes, prompts)
        weight = math.exp(-seconds / _SHARE_SECONDS)
        share = 1 - self._profile.decode_seconds(decodes) / seconds
        self.prompt_share += (1 - weight) * (share - self.prompt_share)
        over = [item for item in self._passes if not item.layers]
        self._passes = [item for item in self._passes if item.layers]
        return seconds, tuple(Flight(item.plan, max(now + seconds, item.ready_at)) for item in over)

    def _advance_passes(self, plan: StepPlan) -> float:
        """Run layers of the passes, of each as many as the plan has; seconds that this takes.

        Beside requests that decode a layer runs only when its weights have landed, or the CPU helps.
        """
        total, seconds = self._profile.layers, 0.0
        for item in self._passes:
            layers = item.layers
            rows = sum(rows.count for rows in item.plan.rows)
            most_layers = plan.most_layers(rows=rows, layers=total)
            if self._profile.prompts_ride and most_layers is not None:
                landed = total
                if not self._config.cpu_cores:
                    shares = map(self._residency.landed_share, item.plan.version_ids)
                    landed = int(total * min(shares))
                layers = max(0, min(layers, most_layers, item.layers - (total - landed)))
            item.layers -= layers
            if self._profile.prompts_ride:
                seconds += self._profile.prefill_seconds(item.load) * layers / total
        return seconds
