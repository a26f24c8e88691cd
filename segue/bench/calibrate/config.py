"""What a calibration is told."""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass

from segue.bench.prepare import DTYPES, require_device, require_model
from segue.bench.random_checkpoints import Targets
from segue.config import require, require_positive


@dataclass(frozen=True, slots=True, kw_only=True)
class CalibrateConfig:
    """The machine's engine, and the points that are measured of it.

    The model is the one in ``model_dir``, or a random one of ``shape``. Decode steps are timed at ``batches`` by
    ``contexts`` (tokens of each prompt), prompts at ``prompts`` tokens, with adapters of ``ranks`` for ``targets``, at
    most ``most_adapters`` of a rank. ``cpu_workers`` are those of the engine; the CPU's help is measured for up to so
    many. All ends about ``seconds`` after the start, what is not in the caches of compiled kernels excepted. ``steps``
    decode steps are timed in each of at most ``rounds`` rounds.
    """

    shape: str | None = None
    model_dir: str | None = None
    dtype: str = "float32"
    device: str = "cpu"
    targets: str = Targets.QKVO.value
    ranks: tuple[int, ...] = (8, 16, 32, 64)
    batches: tuple[int, ...] = (1, 2, 3, 4, 6, 8, 12, 16)
    contexts: tuple[int, ...] = (48, 192)
    prompts: tuple[int, ...] = (8, 16, 32, 64, 96, 128, 192, 256, 384, 512)
    most_adapters: int = 32
    cpu_workers: int = 2
    cpu_tokens: tuple[int, ...] = (1, 8, 32, 128)
    steps: int = 12
    rounds: int = 5
    seconds: float = 110.0
    torch_threads: int = 1

    def __post_init__(self) -> None:
        require_model(self.shape, self.model_dir)
        require(self.dtype in DTYPES, "dtype", f"must be one of {', '.join(DTYPES)}, is {self.dtype!r}")
        require(self.device in ("cpu", "cuda"), "device", f"must be 'cpu' or 'cuda', is {self.device!r}")
        require_device(self.device)
        known = tuple(Targets)
        require(self.targets in known, "targets", f"must be one of {', '.join(known)}, is {self.targets!r}")
        for name, least in (("ranks", 2), ("batches", 3), ("contexts", 1), ("prompts", 5), ("cpu_tokens", 2)):
            values = getattr(self, name)
            rising = all(low < high for low, high in itertools.pairwise(values))
            require(len(values) >= least, name, f"must be at least {least} numbers, is {values}")
            require(values[0] >= 1 and rising, name, f"must be rising and from 1 on, is {values}")
        require(max(self.batches) >= 8, "batches", f"must reach 8, is {self.batches}")
        require_positive(self, "most_adapters", "steps", "rounds", "seconds", "torch_threads")
        usable = len(os.sched_getaffinity(0))
        require(
            0 <= self.cpu_workers <= usable,
            "cpu_workers",
            f"must be 0 to {usable}, the cores of this process, is {self.cpu_workers}",
        )

    @property
    def cores(self) -> tuple[int, ...]:
        """Numbers of CPU workers that are compared: the powers of 2, and all."""
        powers = [1 << power for power in range(self.cpu_workers.bit_length())]
        return tuple(sorted({*(count for count in powers if count <= self.cpu_workers), self.cpu_workers} - {0}))
