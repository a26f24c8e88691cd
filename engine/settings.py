"""What the parts of an engine begin with, reckoned from its configuration and its model."""

from __future__ import annotations

import os
from pathlib import Path

from segue.config import require
from segue.cpu_lora import CpuLoraConfig
from segue.engine.config import EngineConfig, HandoffConfig, HandoffMode
from segue.engine.lora.handover import rank_elems
from segue.engine.lora.manifest import Projection
from segue.engine.lora.points import POINT_PROJECTIONS
from segue.engine.lora.reader import ReadLimits
from segue.engine.models.config import ModelConfig
from segue.engine.profile import load_profile
from segue.scheduler.cost_model import CostProfile
from segue.scheduler.handoff import FixedHandover, FollowPlan, HandoffPolicy, LoadFirst, StreamLayers
from segue.scheduler.handoff_costs import HandoffCosts, assumed_profile

# Up to about so many rows a pass takes the time in which the device reads the model's weights.
_MERGED_ROWS = 256
_MOST_READ_THREADS = 8


def read_limits(config: EngineConfig) -> ReadLimits:
    """Threads that read run on the workers' cores as well, from which this thread and those that it starts may be kept
    away: a read lasts some milliseconds, in which workers have nothing to do for the adapter that is read."""
    cores = frozenset(os.sched_getaffinity(0)) | frozenset(config.cpu_cores)
    threads = config.read_threads or default_read_threads(len(cores))
    return ReadLimits(threads=threads, stall_seconds=config.read_stall_seconds, cores=cores)


def default_read_threads(cores: int) -> int:
    """Threads that read adapters' files: half of the cores that they may run on, and no more than keep memory busy.

    A file in the page cache comes as fast as so many threads copy it: on 16 cores 30 GB/s by 8, 18 by 4 and 9 by 2.
    """
    return max(1, min(_MOST_READ_THREADS, cores // 2))


def handoff_policy(config: HandoffConfig) -> HandoffPolicy:
    """The policy that the configuration names."""
    match HandoffMode(config.mode):
        case HandoffMode.AUTO | HandoffMode.PLANNER:
            return FollowPlan()
        case HandoffMode.FIXED:
            return FixedHandover(config.cpu_layers)
        case HandoffMode.STREAM:
            return StreamLayers()
        case HandoffMode.LOAD_FIRST:
            return LoadFirst()


def merged_rows(config: EngineConfig) -> int:
    """Rows that passes of adapters in host memory may share: the configuration's, or what suits the device."""
    if config.merged_rows is not None:
        return config.merged_rows
    return _MERGED_ROWS if config.device == "cuda" else 0


def measured_profile(config: EngineConfig, model: ModelConfig) -> CostProfile | None:
    """The file's that the configuration names. Raises ConfigError."""
    return None if config.profile_path is None else load_profile(Path(config.profile_path), layers=model.layers)


def handoff_costs(
    config: EngineConfig, model: ModelConfig, item_bytes: int, profile: CostProfile | None
) -> HandoffCosts:
    """What the planner begins with: the profile, or what is assumed of a machine without one.

    Raises ConfigError for a profile of a model with another number of layers.
    """
    weight, enqueues = config.handoff.harm_weight, config.device == "cuda"
    if profile is not None:
        require(
            profile.layers == model.layers, "profile", f"is of {profile.layers} layers, the model has {model.layers}"
        )
        return HandoffCosts.measured(profile, weight, enqueues=enqueues)
    shapes = dict(model.projection_shapes())
    assumed = assumed_profile(
        layers=model.layers,
        parameters=model.layers * sum(wide * high for wide, high in shapes.values()),
        item_bytes=item_bytes,
        rank_elems=rank_elems(shapes),
        device=config.device,
    )
    return HandoffCosts.assumed(assumed, weight, enqueues=enqueues)


def worker_config(config: EngineConfig, model: ModelConfig, item_bytes: int) -> CpuLoraConfig:
    """Slots that hold the widest LoRA point of a full pass."""
    shapes: dict[Projection, tuple[int, int]] = dict(model.projection_shapes())
    widest_in = max(in_features for in_features, _ in shapes.values())
    widest_out = max(
        sum(shapes[projection][1] for projection in projections) for projections in POINT_PROJECTIONS.values()
    )
    return CpuLoraConfig(
        workers=config.cpu_workers,
        row_bytes=config.budget_tokens * widest_in * item_bytes,
        delta_bytes=config.budget_tokens * widest_out * item_bytes,
        store_bytes=config.host_store_bytes,
        slots=config.cpu_slots,
        cores=config.cpu_cores,
        stall_seconds=config.cpu_stall_seconds,
    )
