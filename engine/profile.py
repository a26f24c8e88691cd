"""A cost profile from its file."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from segue.config import ConfigError, from_table, read_toml, require
from segue.scheduler.cost_model import CopyCoefficients, CostProfile, CpuCoefficients, StepCoefficients

_TABLES = {"decode": StepCoefficients, "prefill": StepCoefficients, "copy": CopyCoefficients, "cpu": CpuCoefficients}


def load_profile(path: Path, *, layers: int | None = None) -> CostProfile:
    """The profile that ``segue calibrate`` wrote; it must be of a model with ``layers`` layers, where given.

    Raises ConfigError, in one line that names the file and the field, for a file that cannot be read or parsed, an
    unknown or missing field, and a value that is no cost.
    """
    table = read_toml(path)
    try:
        # Each table by itself first: what is wrong in it is then named with the table.
        for name, cls in _TABLES.items():
            if isinstance(table.get(name), Mapping):
                _checked(name, cls, table[name])
        profile = from_table(CostProfile, table, where="profile")
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    fits = layers is None or profile.layers == layers
    require(fits, f"{path}: layers", f"the profile is of a model with {profile.layers}, this one has {layers}")
    return profile


def _checked(name: str, cls: type[object], table: Mapping[str, object]) -> None:
    try:
        from_table(cls, table, where=name)
    except ConfigError as error:
        # A value's own check does not know in which table it stands.
        named = str(error).startswith((f"{name}.", f"{name}:"))
        raise error if named else ConfigError(f"{name}.{error}") from error
