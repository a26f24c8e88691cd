"""What happened to a request, recorded while it happens, and the Timing that its caller gets."""

from __future__ import annotations

from dataclasses import dataclass, field

from segue.types import LayerTiming, LoraSource, Tier, Timing


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A layer of a pass: what computed the LoRA deltas, and from when to when the layer ran (monotonic seconds)."""

    source: LoraSource
    start_seconds: float
    end_seconds: float


@dataclass(slots=True, kw_only=True)
class Timeline:
    """Recorded in monotonic seconds; reported relative to the request's arrival. Its adapter was in ``tier`` then."""

    arrival_seconds: float
    tier: Tier = Tier.NONE
    admitted_seconds: float | None = None
    first_token_seconds: float | None = None
    prefill_attempts: int = 0
    cpu_tokens: int = 0
    _records: dict[int, LayerRecord] = field(default_factory=dict)

    def admit(self, now: float) -> None:
        """The request got its pages; only the first admission counts as the end of its queueing."""
        self.prefill_attempts += 1
        if self.admitted_seconds is None:
            self.admitted_seconds = now

    def retry(self) -> None:
        """The pass under way was lost and is repeated."""
        if self.first_token_seconds is None:
            self.prefill_attempts += 1

    def record_pass(self, records: list[LayerRecord]) -> None:
        """Add a pass that ended well: up to the first token its layers count, afterwards whether the CPU helped.

        A long prompt takes several passes; a layer counts as CPU when the CPU computed any of its rows.
        """
        if self.first_token_seconds is not None:
            self.cpu_tokens += any(record.source is LoraSource.CPU for record in records)
            return
        for layer, record in enumerate(records):
            known = self._records.get(layer)
            if known is not None:
                source = LoraSource.CPU if LoraSource.CPU in (known.source, record.source) else record.source
                record = LayerRecord(source, known.start_seconds, record.end_seconds)
            self._records[layer] = record

    def timing(self, landed_seconds: tuple[float | None, ...], tokens: int, now: float) -> Timing:
        """The times of a request that generated ``tokens`` tokens and ends now.

        ``landed_seconds[i]`` is when layer i of its adapter landed on the device; () for the base model.
        """
        first = self.first_token_seconds
        admitted = self.admitted_seconds
        layers = tuple(
            LayerTiming(
                layer=layer,
                source=record.source,
                start_seconds=record.start_seconds - self.arrival_seconds,
                end_seconds=record.end_seconds - self.arrival_seconds,
                landed_seconds=self._landed(landed_seconds, layer),
            )
            for layer, record in sorted(self._records.items())
        )
        return Timing(
            tier=self.tier,
            queue_seconds=(now if admitted is None else admitted) - self.arrival_seconds,
            ttft_seconds=(now if first is None else first) - self.arrival_seconds,
            tpot_seconds=None if first is None or tokens < 2 else (now - first) / (tokens - 1),
            total_seconds=now - self.arrival_seconds,
            cpu_layers=sum(record.source is LoraSource.CPU for record in self._records.values()),
            layers=layers,
            prefill_attempts=max(1, self.prefill_attempts),
            cpu_tokens=self.cpu_tokens,
        )

    def _landed(self, landed_seconds: tuple[float | None, ...], layer: int) -> float | None:
        if layer >= len(landed_seconds):
            return None
        landed = landed_seconds[layer]
        return None if landed is None else max(0.0, landed - self.arrival_seconds)
