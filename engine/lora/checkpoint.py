"""Opening an adapter folder: safely, and knowing all of its weights' places before any of them is read. No torch."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

from segue.engine.lora.adapter_path import FileIdentity, identity_of, open_folder, open_regular, read_exactly
from segue.engine.lora.manifest import ModuleWeights, Projection, TensorSpan
from segue.engine.lora.module_match import MLP
from segue.engine.lora.peft_config import ModuleRule, parse_peft_config
from segue.engine.lora.safetensors_header import TensorEntry, read_header
from segue.engine.lora.strict_json import quoted
from segue.errors import AdapterRejectedError

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILES = ("adapter_model.bin", "adapter_model.pt", "adapter_model.pth")
MAX_CONFIG_BYTES = 1 << 20

_TENSOR_NAME = re.compile(
    r"base_model\.model\.model\.layers\.(0|[1-9][0-9]{0,5})\.(self_attn|mlp)\.([a-z]+_proj)\.lora_([AB])\.weight"
)
_PROJECTIONS = {projection.value: projection for projection in Projection}


class ModelShapes(Protocol):
    """What an adapter must fit: the base model's number of layers and its projections' (in_features, out_features)."""

    @property
    def layers(self) -> int: ...

    def projection_shapes(self) -> Mapping[Projection, tuple[int, int]]: ...


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """An opened adapter folder. ``descriptor`` is the weights file's; whoever holds the checkpoint owns it."""

    descriptor: int
    weights_identity: FileIdentity
    config_identity: FileIdentity
    layers: tuple[tuple[ModuleWeights, ...], ...]


def open_checkpoint(root_fd: int, parts: tuple[str, ...], model: ModelShapes, max_rank: int) -> Checkpoint:
    """Open the folder ``parts`` below ``root_fd`` and check everything but the weights' values.

    Raises AdapterNotFoundError, UnsafePathError (a link or special file is in the way) or AdapterRejectedError (not a
    LoRA adapter that this base model can serve; the message names what is wrong).
    """
    folder_fd = open_folder(root_fd, parts)
    try:
        config_identity, config = _read_config(folder_fd)
        descriptor = _open_weights(folder_fd)
    finally:
        os.close(folder_fd)
    try:
        identity = identity_of(os.fstat(descriptor))
        rules = parse_peft_config(config, model.layers)
        tensors = read_header(descriptor, identity[2], WEIGHTS_FILE)
        layers = _match_tensors(tensors, rules, model, max_rank)
    except BaseException:
        os.close(descriptor)
        raise
    return Checkpoint(descriptor=descriptor, weights_identity=identity, config_identity=config_identity, layers=layers)


def _read_config(folder_fd: int) -> tuple[FileIdentity, bytes]:
    descriptor = open_regular(folder_fd, CONFIG_FILE)
    if descriptor is None:
        raise AdapterRejectedError(f"the adapter has no {CONFIG_FILE}")
    try:
        identity = identity_of(os.fstat(descriptor))
        data = read_exactly(descriptor, MAX_CONFIG_BYTES + 1, 0)
    finally:
        os.close(descriptor)
    if len(data) > MAX_CONFIG_BYTES:
        raise AdapterRejectedError(f"{CONFIG_FILE} is larger than {MAX_CONFIG_BYTES} bytes")
    return identity, data


def _open_weights(folder_fd: int) -> int:
    descriptor = open_regular(folder_fd, WEIGHTS_FILE)
    if descriptor is not None:
        return descriptor
    for name in PICKLE_FILES:
        try:
            os.stat(name, dir_fd=folder_fd, follow_symlinks=False)
        except FileNotFoundError:
            continue
        raise AdapterRejectedError(f"{name} is a pickle, which can run code: only {WEIGHTS_FILE} is served")
    raise AdapterRejectedError(f"the adapter has no {WEIGHTS_FILE}")


def _match_tensors(
    tensors: Mapping[str, TensorEntry],
    rules: Mapping[tuple[int, Projection], ModuleRule],
    model: ModelShapes,
    max_rank: int,
) -> tuple[tuple[ModuleWeights, ...], ...]:
    """Each layer's modules in the order of Projection. Tensors and configuration must name the same modules."""
    places = {_place_of(name, model.layers): (name, entry) for name, entry in tensors.items()}
    for layer, projection, matrix in places:
        if (layer, projection) not in rules:
            name = places[layer, projection, matrix][0]
            raise AdapterRejectedError(f"tensor {quoted(name)} is of a module that target_modules does not name")
    shapes = model.projection_shapes()
    layers: list[tuple[ModuleWeights, ...]] = []
    for layer in range(model.layers):
        modules = []
        for projection in Projection:
            rule = rules.get((layer, projection))
            if rule is not None:
                pair = places.get((layer, projection, "A")), places.get((layer, projection, "B"))
                modules.append(_module(layer, projection, pair, rule, shapes[projection], max_rank))
        layers.append(tuple(modules))
    return tuple(layers)


def _place_of(name: str, layers: int) -> tuple[int, Projection, str]:
    match = _TENSOR_NAME.fullmatch(name)
    projection = None if match is None else _PROJECTIONS.get(match[3])
    if match is None or projection is None or (match[2] == "mlp") != (projection in MLP):
        raise AdapterRejectedError(f"tensor {quoted(name)} is not supported: it is no LoRA matrix of a projection")
    layer = int(match[1])
    if layer >= layers:
        raise AdapterRejectedError(
            f"tensor {quoted(name)} is of layer {layer}, the base model has {layers}: the adapter is of another model"
        )
    return layer, projection, match[4]


def _module(
    layer: int,
    projection: Projection,
    pair: tuple[tuple[str, TensorEntry] | None, tuple[str, TensorEntry] | None],
    rule: ModuleRule,
    features: tuple[int, int],
    max_rank: int,
) -> ModuleWeights:
    a_found, b_found = pair
    where = f"layer {layer} {projection.value}"
    if a_found is None or b_found is None:
        missing = " and ".join(name for name, found in (("lora_A", a_found), ("lora_B", b_found)) if found is None)
        raise AdapterRejectedError(f"{where} is targeted but {WEIGHTS_FILE} lacks its {missing}")
    a, b = _matrix(*a_found), _matrix(*b_found)
    if a.rows != b.columns:
        raise AdapterRejectedError(f"{where}: lora_A has rank {a.rows}, lora_B has rank {b.columns}")
    if a.rows != rule.rank:
        raise AdapterRejectedError(f"{where}: its tensors have rank {a.rows}, {CONFIG_FILE} says {rule.rank}")
    if a.rows > max_rank:
        raise AdapterRejectedError(f"{where}: rank {a.rows} is over the limit of {max_rank}")
    if (a.columns, b.rows) != features:
        raise AdapterRejectedError(
            f"{where}: the adapter is for {a.columns} to {b.rows} features, the base model has "
            f"{features[0]} to {features[1]}: it is of another base model"
        )
    return ModuleWeights(projection=projection, rank=rule.rank, scale=rule.scale, a=a, b=b)


def _matrix(name: str, entry: TensorEntry) -> TensorSpan:
    if len(entry.shape) != 2:
        raise AdapterRejectedError(f"tensor {quoted(name)} has {len(entry.shape)} dimensions, a matrix has 2")
    rows, columns = entry.shape
    return TensorSpan(file_offset=entry.file_offset, rows=rows, columns=columns, dtype=entry.dtype)
