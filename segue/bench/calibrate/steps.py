"""Times an engine's steps as the engine itself sees them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

from segue.bench.calibrate.cases import CalibrationCase
from segue.bench.cases import Measure
from segue.bench.driver import EngineDriver
from segue.bench.engine import EngineBench
from segue.scheduler.cost_fit import TimedStep
from segue.scheduler.cost_model import StepLoad

_PROMPT_RUNS = 3
_RIDING_RUNS = 2


@dataclass(slots=True, kw_only=True)
class MeasuredStep:
    """Steps of a case with one load: ``seconds`` of each.

    Where all rows decode, their context grows by a token each from step to step, and the load is the mean one.
    """

    case: CalibrationCase
    decodes: StepLoad
    prompts: StepLoad
    seconds: list[float] = field(default_factory=list)

    def add(self, step: TimedStep) -> None:
        """Another step of the same load."""
        self.seconds.append(step.seconds)
        context = self.decodes.context_tokens
        mean = context + (step.decodes.context_tokens - context) / len(self.seconds)
        self.decodes = replace(self.decodes, context_tokens=round(mean))

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    @property
    def decodes_alone(self) -> bool:
        return self.prompts.tokens == 0

    @property
    def prompts_alone(self) -> bool:
        return self.decodes.tokens == 0


class StepMeasurer:
    """Runs cases on an engine and keeps what each step took. A case's steps are its own; those of filling a batch, with
    prompts and decodes in all proportions, count as well."""

    def __init__(self, driver: EngineDriver, bench: EngineBench, steps: int) -> None:
        self._driver = driver
        self._bench = bench
        self._steps = steps
        self._seen: list[TimedStep] = []
        self._measured: dict[tuple[CalibrationCase, StepLoad | int, StepLoad], MeasuredStep] = {}

    @property
    def measured(self) -> Sequence[MeasuredStep]:
        """All that was kept."""
        return list(self._measured.values())

    def run(self, case: CalibrationCase, *, keep: bool) -> None:
        """Run a case once, as short as it can be where nothing is kept. Raises BenchmarkError."""
        self._driver.listen(self._seen.append)
        try:
            if case.case.measure is Measure.FIRST_TOKEN:
                self._prompt(case, keep=keep)
            else:
                self._decode(case, keep=keep)
        finally:
            self._driver.listen(None)
            self._seen.clear()

    def _prompt(self, case: CalibrationCase, *, keep: bool) -> None:
        for _ in range(_PROMPT_RUNS if keep else 1):
            self._driver.run_to_first_tokens([self._bench.submit(case.case, 0, 1)])
        self._keep(case, lambda step: keep and not step.decodes.tokens)

    def _decode(self, case: CalibrationCase, *, keep: bool) -> None:
        with self._bench.decoding(case.case):
            # Steps of prompts alone and with decodes; decodes alone are those that follow, when all are past their
            # first steps.
            self._keep(case, lambda step: keep and case.riding is None and step.prompts.tokens > 0)
            if case.riding is None:
                for _ in range(self._steps if keep else 1):
                    self._driver.decode_seconds()
                self._keep(case, lambda step: keep and not step.prompts.tokens)
            else:
                for _ in range(_RIDING_RUNS if keep else 1):
                    self._driver.run_to_first_tokens([self._bench.submit(case.case, 0, 1, case.riding)])
                self._keep(case, lambda step: keep and step.prompts.tokens == case.riding)

    def _keep(self, case: CalibrationCase, wanted: Callable[[TimedStep], bool]) -> None:
        for step in self._seen:
            if not wanted(step):
                continue
            # The context of a batch that decodes grows with each step.
            alone = step.prompts.tokens == 0
            key = case, step.decodes.tokens if alone else step.decodes, step.prompts
            found = self._measured.get(key)
            if found is None:
                found = MeasuredStep(case=case, decodes=step.decodes, prompts=step.prompts)
                self._measured[key] = found
            found.add(step)
        self._seen.clear()
