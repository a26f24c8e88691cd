"""What a step, a copy and the CPU's help cost, in seconds, from what they must compute and read.

A step's time is linear in what it reads and computes, with coefficients that are never negative: so more work never
costs less. Our kernels read the weights of the adapters that are present, each once, whatever the largest rank. Kernels
of others cost something else, for which there are terms as well (Li et al., "Toppings", USENIX ATC 2025, equation 2; as
CaraServe arXiv:2401.11240): Punica's BGMV pads every request to the largest rank of the batch, S-LoRA's MBGMV pays the
sum of all requests' ranks.
"""

from __future__ import annotations

import bisect
import itertools
import math
from dataclasses import dataclass, fields
from enum import Enum

from segue.config import ConfigError, require

# The part of a CPU job's time that a worker must save to be given a share, since it reads again what others read. A
# little more than a fiftieth: where all is shared, the fiftieth saves exactly that, and rounding must not decide.
_LEAST_SAVING = 0.02 + 1e-9


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLoad:
    """Rows that run together, as far as their cost depends on them.

    ``tokens`` rows read ``context_tokens`` tokens of KV: the sum over the rows of what each attends to. They use
    ``adapters`` different adapters whose weights have ``adapter_bytes`` bytes together. ``max_rank`` is the largest
    rank of a row's adapter, and ``rank_tokens`` the sum over the rows of their adapters' ranks.
    """

    tokens: int = 0
    context_tokens: int = 0
    adapters: int = 0
    adapter_bytes: int = 0
    max_rank: int = 0
    rank_tokens: int = 0

    @property
    def padded_rank_tokens(self) -> int:
        """The rows' ranks when each is padded to the largest."""
        return self.tokens * self.max_rank

    def joined(self, rows: StepLoad, *, shared_adapter: bool = False) -> StepLoad:
        """These and ``rows`` together. ``shared_adapter``: the adapters of ``rows`` are all among these already."""
        return StepLoad(
            tokens=self.tokens + rows.tokens,
            context_tokens=self.context_tokens + rows.context_tokens,
            adapters=self.adapters + (0 if shared_adapter else rows.adapters),
            adapter_bytes=self.adapter_bytes + (0 if shared_adapter else rows.adapter_bytes),
            max_rank=max(self.max_rank, rows.max_rank),
            rank_tokens=self.rank_tokens + rows.rank_tokens,
        )


class LoraForm(Enum):
    """What the LoRA part of a step grows with: the terms of StepCoefficients that a fit may use for it.

    PRESENT_BYTES is that of our kernels: launches wherever there is an adapter, work for each of them, their weights
    read once, and products that grow with the rows' own ranks.
    """

    PRESENT_BYTES = ("seconds_with_adapters", "seconds_per_adapter", "seconds_per_adapter_byte", "seconds_per_rank")
    MAX_RANK = ("seconds_per_padded_rank",)
    SUM_OF_RANKS = ("seconds_per_rank",)

    @property
    def terms(self) -> tuple[str, ...]:
        """All terms of a step's cost in this form."""
        return ("fixed_seconds", "seconds_per_token", "seconds_per_context_token", *self.value)


def require_coefficients(owner: object) -> None:
    """Every field of this dataclass that is named for seconds must be a finite number and not negative.

    Raises ConfigError.
    """
    for item in fields(owner):  # type: ignore[arg-type]
        if "seconds" not in item.name or item.name == "row_seconds":
            continue
        value = getattr(owner, item.name)
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if not number:
            raise ConfigError(f"{item.name}: must be a number, is {value!r}")
        require(math.isfinite(value) and value >= 0, item.name, f"must be finite and not negative, is {value}")


def _require_rising(name: str, tokens: tuple[int, ...]) -> None:
    """Raises ConfigError unless these are rising numbers of rows."""
    whole = all(isinstance(count, int) and not isinstance(count, bool) for count in tokens)
    rising = whole and all(low < high for low, high in itertools.pairwise((0, *tokens)))
    require(rising, name, f"must be whole numbers from 1 on that rise, is {tokens!r}")


def _require_rows(tokens: tuple[int, ...], seconds: tuple[float, ...]) -> None:
    """Raises ConfigError unless these are rising numbers of rows and as many times that never fall."""
    _require_rising("row_tokens", tokens)
    numbers = all(isinstance(value, int | float) and not isinstance(value, bool) for value in seconds)
    finite = numbers and all(math.isfinite(value) for value in seconds)
    never_fall = finite and all(less <= more for less, more in itertools.pairwise((0, *seconds)))
    require(never_fall, "row_seconds", f"must be finite numbers from 0 on that never fall, is {seconds!r}")
    require(len(tokens) == len(seconds), "row_seconds", f"must be {len(tokens)} as row_tokens, is {seconds!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StepCoefficients:
    """Of a step: seconds of the step itself, of each row, of each token of KV that a row reads, of adapters being
    there at all, of each adapter, of each byte of the adapters' weights, and of each row's rank, padded or not.

    Where that is no straight line (one row has kernels of its own, few rows wait for the model's weights, many for
    arithmetic), ``row_tokens`` rows take ``row_seconds`` more, which never fall: linear between two numbers of rows,
    as much as the first below it, and beyond the last as steep as before it. All terms together never fall, so more
    still never costs less.

    Where the device runs batches of some sizes only, ``padded_tokens`` are these: the base model's products are over as
    many rows as the next of them has, and beyond the last over the rows that there are.
    """

    fixed_seconds: float = 0.0
    seconds_per_token: float = 0.0
    row_tokens: tuple[int, ...] = ()
    row_seconds: tuple[float, ...] = ()
    padded_tokens: tuple[int, ...] = ()
    seconds_per_context_token: float = 0.0
    seconds_with_adapters: float = 0.0
    seconds_per_adapter: float = 0.0
    seconds_per_adapter_byte: float = 0.0
    seconds_per_padded_rank: float = 0.0
    seconds_per_rank: float = 0.0

    def __post_init__(self) -> None:
        require_coefficients(self)
        _require_rows(self.row_tokens, self.row_seconds)
        _require_rising("padded_tokens", self.padded_tokens)

    def padded(self, tokens: int) -> int:
        """How many rows the device computes where there are so many."""
        place = bisect.bisect_left(self.padded_tokens, tokens)
        return self.padded_tokens[place] if place < len(self.padded_tokens) else tokens

    def base_seconds(self, tokens: int) -> float:
        """Seconds of the base model's products over so many rows; 0 without rows."""
        if tokens == 0:
            return 0.0
        tokens = self.padded(tokens)
        return self.fixed_seconds + self.seconds_per_token * tokens + self._more_seconds(tokens)

    def _more_seconds(self, tokens: int) -> float:
        """What ``row_seconds`` says of so many rows."""
        count = len(self.row_tokens)
        if count < 2 or tokens <= self.row_tokens[0]:
            return self.row_seconds[0] if count else 0.0
        right = min(bisect.bisect_left(self.row_tokens, tokens), count - 1)
        (low, high), (less, more) = self.row_tokens[right - 1 : right + 1], self.row_seconds[right - 1 : right + 1]
        return less + (more - less) * (tokens - low) / (high - low)

    def parts(self, load: StepLoad) -> tuple[float, float, float]:
        """Seconds of the base model's products, of attention, and of LoRA. All 0 when there are no rows."""
        if load.tokens == 0:
            return (0.0, 0.0, 0.0)
        return (
            self.base_seconds(load.tokens),
            self.seconds_per_context_token * load.context_tokens,
            self.seconds_with_adapters * (load.adapters > 0)
            + self.seconds_per_adapter * load.adapters
            + self.seconds_per_adapter_byte * load.adapter_bytes
            + self.seconds_per_padded_rank * load.padded_rank_tokens
            + self.seconds_per_rank * load.rank_tokens,
        )

    def scaled(self, base: float, attention: float, lora: float) -> StepCoefficients:
        """The coefficients of which ``parts`` are so many times these."""
        return StepCoefficients(
            fixed_seconds=base * self.fixed_seconds,
            seconds_per_token=base * self.seconds_per_token,
            row_tokens=self.row_tokens,
            row_seconds=tuple(base * seconds for seconds in self.row_seconds),
            padded_tokens=self.padded_tokens,
            seconds_per_context_token=attention * self.seconds_per_context_token,
            seconds_with_adapters=lora * self.seconds_with_adapters,
            seconds_per_adapter=lora * self.seconds_per_adapter,
            seconds_per_adapter_byte=lora * self.seconds_per_adapter_byte,
            seconds_per_padded_rank=lora * self.seconds_per_padded_rank,
            seconds_per_rank=lora * self.seconds_per_rank,
        )

    def seconds(self, load: StepLoad) -> float:
        """Seconds of a step with these rows and no others."""
        base, attention, lora = self.parts(load)
        return base + attention + lora


@dataclass(frozen=True, slots=True, kw_only=True)
class CopyCoefficients:
    """Of a copy from host memory to the device."""

    fixed_seconds: float = 0.0
    seconds_per_byte: float = 0.0

    def __post_init__(self) -> None:
        require_coefficients(self)


@dataclass(frozen=True, slots=True, kw_only=True)
class CpuCoefficients:
    """Of one layer's deltas on CPU workers: seconds of the hand-over, of each row's way there and back, and of each
    worker that is woken and waited for; of a core for each rank's weights that it reads, for each row that it has, and
    for each of their ranks."""

    fixed_seconds: float = 0.0
    seconds_per_token: float = 0.0
    seconds_per_worker: float = 0.0
    core_seconds_per_rank: float = 0.0
    core_seconds_per_token: float = 0.0
    core_seconds_per_token_rank: float = 0.0

    def __post_init__(self) -> None:
        require_coefficients(self)

    def on_workers(self, tokens: int, rank: int, workers: int, adapters: int = 1) -> float:
        """Seconds of one layer's deltas of rows with so many adapters of this rank, in equal shares of ``workers``."""
        return self.seconds_per_token * tokens + self._shared_seconds(tokens, rank, workers, adapters)

    def workers(self, tokens: int, rank: int, most: int, adapters: int = 1) -> int:
        """How many of ``most`` workers, at least one, share a layer's deltas: one more as long as it saves enough.

        Never more than rows, and never fewer for more rows: the rows' ways there and back, which no worker shortens,
        do not count. CaraServe (arXiv:2401.11240) chooses cores by a profile of how many tokens each computes.
        """
        count = 1
        seconds = self._shared_seconds(tokens, rank, count, adapters)
        while count < min(most, tokens):
            with_another = self._shared_seconds(tokens, rank, count + 1, adapters)
            if seconds - with_another <= _LEAST_SAVING * seconds:
                break
            count, seconds = count + 1, with_another
        return count

    def seconds(self, tokens: int, rank: int, cores: int) -> float:
        """Seconds of one layer's deltas on as many of ``cores`` workers, at least one, as share them.

        More rows, or a larger rank, take at most _LEAST_SAVING less: where they get one worker more.
        """
        return self.on_workers(tokens, rank, self.workers(tokens, rank, cores))

    def _shared_seconds(self, tokens: int, rank: int, workers: int, adapters: int) -> float:
        """Without the rows' ways. Each worker reads its rows' adapters: the weights of one adapter are read by all."""
        return (
            self.fixed_seconds
            + self.seconds_per_worker * workers
            + self.core_seconds_per_rank * rank * max(1.0, adapters / workers)
            + (self.core_seconds_per_token + self.core_seconds_per_token_rank * rank) * tokens / workers
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class CostProfile:
    """What was measured on one machine with one model. ``name`` says which; the model has ``layers`` layers.

    ``prompts_ride``: rows of prompts share the step of those that decode, so its fixed part is paid once. Otherwise a
    step with both is two iterations, one after the other.
    """

    name: str
    layers: int
    decode: StepCoefficients
    prefill: StepCoefficients
    copy: CopyCoefficients = CopyCoefficients()
    cpu: CpuCoefficients | None = None
    prompts_ride: bool = True

    def __post_init__(self) -> None:
        require(isinstance(self.name, str) and bool(self.name), "name", "must be a text that is not empty")
        whole = isinstance(self.layers, int) and not isinstance(self.layers, bool)
        require(whole and self.layers >= 1, "layers", f"must be a whole number from 1 on, is {self.layers!r}")
        require(isinstance(self.prompts_ride, bool), "prompts_ride", f"must be true or false, is {self.prompts_ride!r}")
        require(self.decode.fixed_seconds > 0, "decode.fixed_seconds", "must be greater than 0: no step takes no time")

    def decode_seconds(self, load: StepLoad) -> float:
        """Seconds of a step whose rows all decode."""
        return self.decode.seconds(load)

    def prefill_seconds(self, load: StepLoad) -> float:
        """Seconds of a step whose rows are all of prompts."""
        return self.prefill.seconds(load)

    def step_parts(self, decodes: StepLoad, prompts: StepLoad) -> tuple[float, float, float]:
        """Seconds of a step with both kinds of rows: the base model's products, attention, LoRA.

        Where prompts ride, what a step pays once is paid once, by the dearer kind. The products are over all rows
        together: they take no less than over as many rows of prompts.
        """
        (base, attention, lora), more = self.decode.parts(decodes), self.prefill.parts(prompts)
        if self.prompts_ride and decodes.tokens and prompts.tokens:
            base -= min(self.decode.fixed_seconds, self.prefill.fixed_seconds)
            base = max(base, self.prefill.base_seconds(decodes.tokens + prompts.tokens) - more[0])
            if decodes.adapters and prompts.adapters:
                lora -= min(self.decode.seconds_with_adapters, self.prefill.seconds_with_adapters)
        return base + more[0], attention + more[1], lora + more[2]

    def step_seconds(self, decodes: StepLoad, prompts: StepLoad) -> float:
        """Seconds of a step with both kinds of rows."""
        return math.fsum(self.step_parts(decodes, prompts))

    def copy_seconds(self, copy_bytes: int) -> float:
        """Seconds until so many bytes are on the device, over a link that does nothing else."""
        return self.copy.fixed_seconds + self.copy.seconds_per_byte * copy_bytes if copy_bytes else 0.0

    def cpu_delta_seconds(self, tokens: int, rank: int, cores: int) -> float:
        """Seconds of one layer's deltas on ``cores`` cores, which share the rows. Infinite where there is no help."""
        if self.cpu is None or cores < 1:
            return math.inf
        return self.cpu.seconds(tokens, rank, cores)

    def cold_prefill_seconds(self, load: StepLoad, cores: int) -> float:
        """Seconds of a prefill whose adapter's copy begins with it, by the better of two ways.

        Streamed: a layer waits for its own weights, so the longer of copying and computing bounds it, and one layer of
        the other is not overlapped. Helped: the deltas of all layers come from the CPU. ``load`` has one adapter.
        """
        compute_seconds = self.prefill_seconds(load)
        copy_seconds = self.copy_seconds(load.adapter_bytes)
        streamed = max(compute_seconds, copy_seconds) + min(compute_seconds, copy_seconds) / self.layers
        helped = compute_seconds + self.layers * self.cpu_delta_seconds(load.tokens, load.max_rank, cores)
        return min(streamed, helped)
