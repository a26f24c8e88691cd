"""What the engine's steps cost: told to whoever measures, and compared with the profile, which they correct."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from segue.engine.forward_pass import RequestRows
from segue.engine.lora.store import AdapterStore
from segue.engine.messages import CorrectionState, CostState
from segue.scheduler.cost_correction import Correction, ProfileCorrection
from segue.scheduler.cost_fit import TimedStep
from segue.scheduler.cost_model import CostProfile, StepLoad
from segue.scheduler.tally import Tally, context_tokens

# Scales move little from step to step, and a corrected profile takes 40 us to make.
_REFRESH_STEPS = 16


class StepCosts:
    """The cost profile of one engine, kept right by its own steps. All of it runs on the engine's thread."""

    def __init__(self, profile: CostProfile | None, store: AdapterStore) -> None:
        """``listener`` is told of every step whose time is that of its rows alone."""
        self._measured = profile
        self._store = store
        self._corrected = profile
        self.correction = ProfileCorrection()
        self.listener: Callable[[TimedStep], None] | None = None

    @property
    def profile(self) -> CostProfile | None:
        """The profile with what the steps have taught, up to a few steps ago: a value that later ones do not change."""
        return self._corrected

    def state(self) -> CostState | None:
        """The profile as it is now and its errors; None without one."""
        profile = self.profile
        if profile is None:
            return None
        return CostState(
            profile=profile,
            decode=_correction_state(self.correction.decode),
            prefill=_correction_state(self.correction.prefill),
        )

    def loads(self, rows: Sequence[RequestRows]) -> tuple[StepLoad, StepLoad] | None:
        """The load of the rows that decode and of those of prompts; None where nobody would learn from it."""
        if self._measured is None and self.listener is None:
            return None
        decodes, prompts = Tally(), Tally()
        for item in rows:
            version_id = item.request.version_id
            decodes_in = item.count == 1 and item.start >= len(item.request.submit.prompt_token_ids)
            (decodes if decodes_in else prompts).add(
                None if version_id is None else self._store.cost(version_id),
                item.count,
                context_tokens(item.start, item.count),
            )
        return decodes.load, prompts.load

    def observe(self, decodes: StepLoad, prompts: StepLoad, seconds: float) -> None:
        """A step with these rows took so long."""
        if self.listener is not None:
            self.listener(TimedStep(decodes=decodes, prompts=prompts, seconds=seconds))
        if self._measured is not None:
            self.correction = self.correction.learned(self._measured, decodes, prompts, seconds)
            learned = self.correction.decode.steps + self.correction.prefill.steps
            if learned % _REFRESH_STEPS == 0:
                self._corrected = self.correction.applied_to(self._measured)


def _correction_state(correction: Correction) -> CorrectionState:
    return CorrectionState(steps=correction.steps, scales=correction.scales, mean_error=correction.mean_error)
