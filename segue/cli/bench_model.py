"""Options that name a model, its device and its helpers, for several subcommands of ``segue bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from segue.cli.common import UserError

ModelOption = Annotated[Path | None, typer.Option(metavar="DIR", help="The base model's folder, in place of --shape.")]
DtypeOption = Annotated[str | None, typer.Option(metavar="NAME", help="float32 (default), bfloat16 or float16.")]
DeviceOption = Annotated[str | None, typer.Option(metavar="NAME", help="cpu (default) or cuda.")]
CpuWorkersOption = Annotated[
    int | None, typer.Option(metavar="N", help="CPU LoRA workers; default all cores but four, 1 to 12.")
]
TorchThreadsOption = Annotated[int, typer.Option(metavar="N", help="Threads of torch's matrix products.")]


def shape_and_model(shape: str | None, model: Path | None, default_shape: str) -> tuple[str | None, str | None]:
    """The shape or else the model's folder, one of them None. Raises UserError where both are given."""
    if shape is not None and model is not None:
        raise UserError("give --shape or --model, not both")
    return (shape or default_shape, None) if model is None else (None, str(model))
