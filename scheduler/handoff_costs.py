"""What a hand-over plan needs of the cost model, for one engine: a profile, corrected by what passes have taken."""

from __future__ import annotations

from dataclasses import dataclass, replace

from segue.scheduler.cost_correction import Correction, CorrectionLimits
from segue.scheduler.cost_model import CopyCoefficients, CostProfile, CpuCoefficients, StepCoefficients, StepLoad

# A profile was measured here: it may be off by what else the machine does.
MEASURED_LIMITS = CorrectionLimits(memory_steps=50, least=0.25, most=4.0)
# Without one nothing is known but orders of magnitude, so much is learned from the first passes.
ASSUMED_LIMITS = CorrectionLimits(memory_steps=20, least=0.02, most=50.0, clip=10.0)

# What is assumed of hardware without a profile: less than the slowest device has that is worth the name, since a CPU
# that is taken for slow is not asked, and a stream that is not helped is never slower than one of today's engines.
_DEVICE_BYTES_PER_SECOND = {"cuda": 1.5e12, "cpu": 1e10}
_DEVICE_OPERATIONS_PER_SECOND = {"cuda": 1.5e14, "cpu": 1e10}
_COPY_BYTES_PER_SECOND = 10e9
_CORE_OPERATIONS_PER_SECOND = 10e9
_CORE_BYTES_PER_SECOND = 5e9
# On CUDA a layer with deltas from the CPU is not a graph: its operations are enqueued one by one (2.5 ms on an H200).
_CPU_LAYER_SECONDS = {"cuda": 2.5e-3, "cpu": 400e-6}
_LAYER_SECONDS = 50e-6


@dataclass(frozen=True, slots=True, kw_only=True)
class HandoffCosts:
    """A profile, and scales for what passes compute (base model, CPU deltas), learned from passes that ended.

    ``harm_weight``: how much a second of another request counts beside one of the prefill's own. ``enqueues``: the host
    enqueues what the device computes, a layer on the CPU operation by operation, and whatever else loads waits for it.
    ``is_measured``: the profile is of this machine.
    """

    profile: CostProfile
    compute: Correction
    harm_weight: float = 1.0
    enqueues: bool = False
    is_measured: bool = True

    @classmethod
    def measured(cls, profile: CostProfile, harm_weight: float = 1.0, *, enqueues: bool = False) -> HandoffCosts:
        """By a profile of this machine."""
        compute = Correction(limits=MEASURED_LIMITS)
        return cls(profile=profile, compute=compute, harm_weight=harm_weight, enqueues=enqueues)

    @classmethod
    def assumed(cls, profile: CostProfile, harm_weight: float = 1.0, *, enqueues: bool = False) -> HandoffCosts:
        """By ``assumed_profile``."""
        compute = Correction(limits=ASSUMED_LIMITS)
        return cls(profile=profile, compute=compute, harm_weight=harm_weight, enqueues=enqueues, is_measured=False)

    @property
    def layer_host_seconds(self) -> float:
        """What a layer on the CPU takes the loop, as far as others wait for that."""
        cpu = self.profile.cpu
        return cpu.fixed_seconds if self.enqueues and cpu is not None else 0.0

    @property
    def copy_bytes_per_second(self) -> float:
        """What the profile says of the link; what is measured meanwhile counts instead."""
        seconds = self.profile.copy.seconds_per_byte
        return 1 / seconds if seconds > 0 else _COPY_BYTES_PER_SECOND

    def base_seconds(self, tokens: int) -> float:
        """Seconds of one layer of a prefill of so many rows, without deltas from the CPU."""
        return self.compute.scales[0] * self._base_seconds(tokens)

    def step_seconds(self, requests: int) -> float:
        """Seconds of a step in which so many requests decode."""
        return self.compute.scales[0] * self.profile.decode_seconds(StepLoad(tokens=requests))

    def cpu_seconds(self, tokens: int, rank: int, cores: int) -> float:
        """Seconds that deltas of this rank from so many cores add to a layer. Infinite where there is no help."""
        return self.compute.scales[1] * self._cpu_seconds(tokens, rank, cores)

    def job_workers(self, tokens: int, rank: int, cores: int, adapters: int = 1) -> int | None:
        """How many of ``cores`` workers, at least one, share a layer's deltas; None where nothing was measured."""
        cpu = self.profile.cpu
        return cpu.workers(tokens, rank, cores, adapters) if self.is_measured and cpu is not None else None

    def learned(
        self, tokens: int, base_layers: int, cpu: list[tuple[int, int]], measured_seconds: float
    ) -> HandoffCosts:
        """The costs after ``base_layers`` layers of so many rows took that long together.

        ``cpu`` has (rank, cores) of those of them whose deltas came from the CPU.
        """
        cpu_seconds = sum(self._cpu_seconds(tokens, rank, cores) for rank, cores in cpu)
        parts = (base_layers * self._base_seconds(tokens), cpu_seconds, 0.0)
        return replace(self, compute=self.compute.learned(parts, measured_seconds))

    def _base_seconds(self, tokens: int) -> float:
        load = StepLoad(tokens=tokens, context_tokens=tokens * (tokens + 1) // 2)
        return self.profile.prefill_seconds(load) / self.profile.layers

    def _cpu_seconds(self, tokens: int, rank: int, cores: int) -> float:
        return self.profile.cpu_delta_seconds(tokens, rank, cores) if rank else 0.0


def assumed_profile(*, layers: int, parameters: int, item_bytes: int, rank_elems: int, device: str) -> CostProfile:
    """What a step, a copy and the CPU's help may cost where nothing was measured.

    ``rank_elems``: elements of one rank of one layer's q, k, v and o, in and out together.
    """
    step = StepCoefficients(
        fixed_seconds=layers * _LAYER_SECONDS + parameters * item_bytes / _DEVICE_BYTES_PER_SECOND[device],
        seconds_per_token=2 * parameters / _DEVICE_OPERATIONS_PER_SECOND[device],
    )
    return CostProfile(
        name="assumed",
        layers=layers,
        decode=step,
        prefill=step,
        copy=CopyCoefficients(seconds_per_byte=1 / _COPY_BYTES_PER_SECOND),
        cpu=CpuCoefficients(
            fixed_seconds=_CPU_LAYER_SECONDS[device],
            core_seconds_per_rank=rank_elems * item_bytes / _CORE_BYTES_PER_SECOND,
            core_seconds_per_token_rank=2 * rank_elems / _CORE_OPERATIONS_PER_SECOND,
        ),
    )
