"""Options that several subcommands of ``segue bench`` have, and what their values mean."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypedDict, TypeVar

import typer

from segue.cli.common import UserError

_T = TypeVar("_T")
_SHAPES = ("tiny", "small", "medium", "llama-2-7b", "llama-3.1-8b")


def _random_model(default: str) -> Any:
    names = ", ".join(f"{name} (default)" if name == default else name for name in _SHAPES)
    return typer.Option(metavar="NAME", help=f"A random model: {names}.")


ShapeOption = Annotated[str | None, _random_model("small")]
TinyShapeOption = Annotated[str | None, _random_model("tiny")]
ModelOption = Annotated[Path | None, typer.Option(metavar="DIR", help="The base model's folder, in place of --shape.")]
DtypeOption = Annotated[str | None, typer.Option(metavar="NAME", help="float32 (default), bfloat16 or float16.")]
DeviceOption = Annotated[str | None, typer.Option(metavar="NAME", help="cpu (default) or cuda.")]
TorchThreadsOption = Annotated[int, typer.Option(metavar="N", help="Threads of torch's matrix products.")]
CpuWorkersOption = Annotated[
    int | None, typer.Option(metavar="N", help="CPU LoRA workers; default all cores but four, 1 to 12.")
]

RanksOption = Annotated[str, typer.Option(metavar="N,...", help="The adapters' ranks.")]
TargetOption = Annotated[
    str | None,
    typer.Option(metavar="qkvo|all", help="The projections that adapters change; default qkvo."),
]
TargetsOption = Annotated[
    str | None, typer.Option(metavar="qkvo|all,...", help="The projections that adapters change; default qkvo.")
]
SeedOption = Annotated[int | None, typer.Option(metavar="N", help="Of all that is drawn; default 0.")]
RoundsOption = Annotated[int, typer.Option(metavar="N", help="Rounds through all cases.")]
TimingsOption = Annotated[int, typer.Option(metavar="N", help="Timings of each case.")]
SecondsOption = Annotated[float, typer.Option(metavar="LIMIT", help="No round begins later than this after the start.")]

JsonOption = Annotated[Path | None, typer.Option("--json", metavar="FILE.json", help="Write the report here.")]
PlotOption = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE", help="Draw it: .png or .svg; needs the extra 'bench'.")
]


class ModelSettings(TypedDict):
    """What a benchmark's configuration says of the model: exactly one of ``shape`` and ``model_dir`` is set."""

    shape: str | None
    model_dir: str | None
    dtype: str
    device: str


def model_settings(
    shape: str | None, model: Path | None, dtype: str | None, device: str | None, *, default_shape: str
) -> ModelSettings:
    """What the four options say, or else their defaults. Raises UserError for a shape beside a model's folder."""
    if shape is not None and model is not None:
        raise UserError("give --shape or --model, not both")
    return {
        "shape": (shape or default_shape) if model is None else None,
        "model_dir": None if model is None else str(model),
        "dtype": dtype or "float32",
        "device": device or "cpu",
    }


def preset_of(presets: Mapping[str, _T], name: str) -> _T:
    """The preset of that name. Raises UserError."""
    if name not in presets:
        raise UserError(f"--preset: must be one of {', '.join(presets)}, is {name!r}")
    return presets[name]


def changed(config: Any, **values: object) -> Any:
    """The dataclass ``config`` with those values that are not None."""
    return dataclasses.replace(config, **{name: value for name, value in values.items() if value is not None})


def numbers(option: str, text: str) -> tuple[int, ...]:
    """The whole numbers of an option. Raises UserError naming it."""
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise UserError(f"{option}: must be whole numbers with commas between them, is {text!r}") from None
