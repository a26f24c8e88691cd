"""How many pages the pool has where the configuration leaves it open. Pure arithmetic on bytes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from segue.config import ConfigError
from segue.engine.config import EngineConfig
from segue.engine.lora.copy_queue import GROUP_BYTES
from segue.engine.models.config import ModelConfig
from segue.scheduler.plan import pages_for

# On the CPU device: a quarter of the memory that is available, 4 GiB at most.
_CPU_SHARE = 4
_CPU_MAX_BYTES = 4 << 30
_GIB = 1 << 30


@dataclass(frozen=True, slots=True, kw_only=True)
class PageNeeds:
    """What a model and its configuration ask of the pool.

    ``page_bytes`` is a page in all layers. ``least_tokens`` of one request must fit. ``useful_pages`` is what
    ``max_running`` requests of full length take, and as much again for adapters.
    """

    page_bytes: int
    page_tokens: int
    least_tokens: int
    useful_pages: int

    @classmethod
    def of(cls, config: EngineConfig, model: ModelConfig, context_tokens: int, item_bytes: int) -> PageNeeds:
        """``least_tokens`` is the context where the configuration names one, else what one pass computes."""
        page_elems = 2 * config.page_tokens * model.kv_heads * model.head_dim
        return cls(
            page_bytes=model.layers * page_elems * item_bytes,
            page_tokens=config.page_tokens,
            least_tokens=config.max_context_tokens or min(context_tokens, config.budget_tokens),
            useful_pages=2 * config.max_running * (pages_for(context_tokens, config.page_tokens) + 1),
        )


def cpu_pages(needs: PageNeeds, available_bytes: int) -> int:
    """Pages in host memory: as many as are useful, at most 4 GiB and a quarter of what is available.

    Raises ConfigError when not even one request fits.
    """
    budget_bytes = min(available_bytes // _CPU_SHARE, _CPU_MAX_BYTES)
    terms = {"a quarter of the available memory, 4 GiB at most": budget_bytes}
    return min(_checked(needs, "host memory", budget_bytes, terms), needs.useful_pages)


def cuda_pages(needs: PageNeeds, free_bytes: int, fraction: float, reserve: Mapping[str, int]) -> int:
    """Pages in device memory: ``(free_bytes * fraction - sum of reserve) / page_bytes``, less the padding page.

    ``free_bytes`` are those that are free once the model is loaded, and ``reserve`` is what else will be allocated, by
    name. Raises ConfigError, with all terms, when not even one request fits.
    """
    budget_bytes = int(free_bytes * fraction) - sum(reserve.values())
    terms = {f"{fraction:g} x {_gib(free_bytes)} free": int(free_bytes * fraction)}
    terms.update({f"less {name}": -size_bytes for name, size_bytes in reserve.items()})
    return _checked(needs, "device memory", budget_bytes, terms)


def _checked(needs: PageNeeds, where: str, budget_bytes: int, terms: Mapping[str, int]) -> int:
    pages = budget_bytes // needs.page_bytes - 1
    least = pages_for(needs.least_tokens, needs.page_tokens) + 1
    if pages < least:
        listed = ", ".join(f"{name}: {_gib(size_bytes)}" for name, size_bytes in terms.items())
        raise ConfigError(
            f"{where}: one request of {needs.least_tokens} tokens needs {_gib((least + 1) * needs.page_bytes)} of "
            f"pages, and there are {_gib(max(0, budget_bytes))} for them ({listed})"
        )
    return pages


def _gib(size_bytes: int) -> str:
    return f"{size_bytes / _GIB:.3g} GiB"


def staging_bytes(config: EngineConfig, model: ModelConfig, item_bytes: int) -> int:
    """What one copy of weights brings at most: a group of layers, or one with every projection in the largest rank."""
    layer = config.max_lora_rank * item_bytes * sum(sum(shape) for shape in model.projection_shapes().values())
    return max(layer, GROUP_BYTES if config.device == "cuda" else 0)
