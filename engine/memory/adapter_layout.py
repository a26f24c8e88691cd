"""Where an adapter's matrices lie in its pages. Pure integers: shapes in, element offsets out.

One layer's weights are a linear stream of elements over the adapter's pages: element e is at page ``e // page_elems``,
offset ``e % page_elems``. For each targeted projection in order come A as rows [rank, in_features], then B transposed
as rows [rank, out_features]. Every row starts at a multiple of ``chunk_elems`` and takes whole chunks, and a page is a
whole number of chunks, so that an aligned chunk never crosses a page.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd

from segue.engine.lora.manifest import AdapterManifest, ModuleWeights, Projection

MIN_CHUNK_ELEMS = 8
MAX_CHUNK_ELEMS = 1024


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleLayout:
    """One targeted projection of one layer; ``a_start`` and ``b_start`` are element offsets into the layer's stream."""

    projection: Projection
    rank: int
    scale: float
    in_features: int
    out_features: int
    a_start: int
    b_start: int


@dataclass(frozen=True, slots=True, kw_only=True)
class AdapterLayout:
    """The layout of one adapter version. ``layers[i]`` may be empty; the same ``pages`` page ids serve every layer."""

    layers: tuple[tuple[ModuleLayout, ...], ...]
    page_elems: int
    chunk_elems: int
    pages: int

    @classmethod
    def plan(cls, manifest: AdapterManifest, *, page_elems: int, chunk_elems: int) -> AdapterLayout:
        """Lay out every layer of ``manifest``. Raises ValueError unless a page is a whole number of chunks."""
        if chunk_elems <= 0 or page_elems <= 0 or page_elems % chunk_elems:
            raise ValueError(f"page_elems {page_elems} must be a multiple of chunk_elems {chunk_elems}")
        planned = [_plan_layer(layer, chunk_elems) for layer in manifest.layers]
        largest = max((elements for _, elements in planned), default=0)
        return cls(
            layers=tuple(modules for modules, _ in planned),
            page_elems=page_elems,
            chunk_elems=chunk_elems,
            pages=-(-largest // page_elems),
        )


def choose_chunk_elems(page_elems: int, feature_widths: Iterable[int]) -> int:
    """The chunk of a model: the largest power of two that divides the page and every feature width, 8 to 1024.

    Widths with a smaller power of two have padded rows. Raises ValueError when the page is not a multiple of 8.
    """
    if page_elems <= 0 or page_elems % MIN_CHUNK_ELEMS:
        raise ValueError(f"page_elems: must be a positive multiple of {MIN_CHUNK_ELEMS}, is {page_elems}")
    common = gcd(page_elems, *feature_widths)
    power = common & -common
    return min(max(power, MIN_CHUNK_ELEMS), MAX_CHUNK_ELEMS)


def _plan_layer(modules: Iterable[ModuleWeights], chunk_elems: int) -> tuple[tuple[ModuleLayout, ...], int]:
    """The modules' layouts and the stream's length in elements."""
    layouts = []
    end = 0
    for module in modules:
        a_start = end
        b_start = a_start + module.rank * _whole_chunks(module.in_features, chunk_elems)
        end = b_start + module.rank * _whole_chunks(module.out_features, chunk_elems)
        layouts.append(
            ModuleLayout(
                projection=module.projection,
                rank=module.rank,
                scale=module.scale,
                in_features=module.in_features,
                out_features=module.out_features,
                a_start=a_start,
                b_start=b_start,
            )
        )
    return tuple(layouts), end


def _whole_chunks(columns: int, chunk_elems: int) -> int:
    return -(-columns // chunk_elems) * chunk_elems
