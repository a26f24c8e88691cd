from __future__ import annotations

import errno
import os
import time
from pathlib import Path

import msgspec
import pytest
import torch

from segue.engine.lora.events import LayerHost, LayerLanded, LoadFailed, Verified
from segue.engine.lora.manifest import Projection
from segue.engine.lora.states import LayerState
from segue.errors import AdapterRejectedError
from segue.types import Tier
from tests.engine.lora.adapter_folders import MODEL, peft_config, random_tensors, tensor_name, write_folder
from tests.engine.lora.store_rig import MakeRig, StoreRig, assert_same, expected

ABSENT, READING, HOST, LANDING, _ENQUEUED, LANDED = LayerState
TENSORS_PER_LAYER = 8


def test_layers_go_from_disk_to_host_to_device_in_order(rig: StoreRig) -> None:
    version = rig.add("one")
    rig.reads.shut()
    rig.copies.shut()
    assert rig.store.tier(version) is Tier.DISK
    rig.store.acquire(version)
    rig.store.start_load(version)
    rig.check()
    assert rig.states(version) == [READING] * 3
    rig.reads.allow(1)
    rig.drain_until(lambda: rig.store.is_in_host(version, 0))
    assert rig.states(version) == [HOST, READING, READING]
    rig.start_copy(version)
    rig.check()
    assert rig.states(version) == [LANDING, READING, READING]
    rig.copies.allow(TENSORS_PER_LAYER)
    rig.drain_until(lambda: rig.states(version)[0] is LANDED)
    assert rig.states(version) == [LANDED, READING, READING]
    assert not rig.store.is_landed(version)
    rig.reads.open()
    rig.drain_until(lambda: rig.store.is_verified(version))
    assert rig.states(version) == [LANDED, LANDING, LANDING]
    assert rig.store.tier(version) is Tier.HOST
    rig.copies.open()
    rig.drain_until(lambda: rig.store.is_landed(version))
    assert rig.store.tier(version) is Tier.DEVICE
    hosts = [event.layer for event in rig.events if isinstance(event, LayerHost)]
    landings = [event for event in rig.events if isinstance(event, LayerLanded)]
    assert hosts == [event.layer for event in landings] == [0, 1, 2]
    assert tuple(event.monotonic_seconds for event in landings) == rig.store.landed_seconds(version)
    assert sorted(event.monotonic_seconds for event in landings) == [event.monotonic_seconds for event in landings]
    assert sum(isinstance(event, Verified) for event in rig.events) == 1


@pytest.mark.parametrize("model_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("file_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_weights_are_the_checkpoints_on_host_and_device(
    make_rig: MakeRig, model_dtype: torch.dtype, file_dtype: torch.dtype
) -> None:
    rig = make_rig(dtype=model_dtype)
    ranks = {Projection.Q: 3, Projection.UP: 7, Projection.DOWN: 5}
    tensors = random_tensors(ranks=ranks, targets=ranks, dtype=file_dtype)
    pattern = {projection.value: rank for projection, rank in ranks.items()}
    version = rig.add("one", tensors, peft_config(ranks, rank_pattern=pattern))
    rig.start_copy(version)
    rig.drain_until(lambda: rig.store.is_landed(version) and rig.store.is_verified(version))
    for layer in range(MODEL.layers):
        wanted = expected(tensors, layer, model_dtype)
        assert_same(rig.in_host(version, layer), wanted)
        assert_same(rig.landed(version, layer), wanted)
    weights = sum(tensor.numel() for tensor in tensors.values()) * model_dtype.itemsize
    assert 0 <= rig.host_bytes_held - weights < 64
    assert rig.memory.touchable_bytes == weights


def test_a_layer_without_modules_lands_with_the_others(rig: StoreRig) -> None:
    tensors = {name: tensor for name, tensor in random_tensors().items() if ".layers.1." not in name}
    targets = [f"{layer}.self_attn.{name}" for layer in (0, 2) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    version = rig.add("one", tensors, peft_config(target_modules=targets))
    rig.start_copy(version)
    rig.drain_until(lambda: rig.store.is_landed(version))
    assert rig.landed(version, 1) == {}
    assert_same(rig.landed(version, 2), expected(tensors, 2, torch.float32))


def test_start_load_twice_reads_once(rig: StoreRig) -> None:
    version = rig.add("one")
    for _ in range(2):
        rig.store.start_load(version)
    rig.drain_until(lambda: rig.store.is_verified(version))
    rig.store.start_load(version)
    rig.drain()
    assert len([event for event in rig.events if isinstance(event, LayerHost)]) == MODEL.layers


def test_views_are_given_only_of_what_is_there(rig: StoreRig) -> None:
    version = rig.add("one")
    with pytest.raises(ValueError, match="not in host memory"):
        rig.store.host_view(version, 0)
    with pytest.raises(ValueError, match="has no pages"):
        rig.store.page_table(version)
    with pytest.raises(ValueError, match="not in host memory"):
        rig.store.hold_host(version)
    with pytest.raises(ValueError, match="not held"):
        rig.store.drop_host(version)
    with pytest.raises(KeyError):
        rig.store.acquire(version + 1)
    with pytest.raises(ValueError, match="no users"):
        rig.store.release(version)


def test_pages_must_be_the_right_number_and_given_once(rig: StoreRig) -> None:
    version = rig.add("one")
    pages = rig.pool.allocate(rig.store.device_pages(version) + 1, "test")
    with pytest.raises(ValueError, match="pages, not"):
        rig.store.start_copy(version, pages)
    rig.pool.free(pages)
    rig.start_copy(version)
    with pytest.raises(ValueError, match="has its pages"):
        rig.store.start_copy(version, ())
    assert rig.store.has_pages(version)


def test_the_throttle_spaces_the_landings_and_can_be_charged(make_rig: MakeRig) -> None:
    rig = make_rig(copy_bytes_per_second=1e6)
    version = rig.add("one")
    rig.store.start_load(version)
    rig.drain_until(lambda: rig.store.is_verified(version))
    begin = time.monotonic()
    rig.store.link.book(20_000)
    rig.start_copy(version)
    rig.drain_until(lambda: rig.store.is_landed(version))
    layer_seconds = rig.host_bytes_held / MODEL.layers / 1e6
    for layer, landed in enumerate(rig.store.landed_seconds(version)):
        assert landed is not None
        assert landed - begin >= 0.02 + (layer + 1) * layer_seconds - 1e-3


# -- what is wrong with the weights ------------------------------------------------------------------------------------


def fail(rig: StoreRig, version: int) -> str:
    rig.drain_until(lambda: any(isinstance(event, LoadFailed) for event in rig.events))
    (failure,) = (event for event in rig.events if isinstance(event, LoadFailed))
    assert failure.version_id == version
    return failure.message


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_layer_with_nan_is_never_used(rig: StoreRig, value: float) -> None:
    tensors = random_tensors()
    tensors[tensor_name(1, Projection.V, "B")][7, 2] = value
    version = rig.add("one", tensors)
    rig.store.acquire(version)
    rig.start_copy(version)
    message = fail(rig, version)
    assert "layer 1 v_proj lora_B holds NaN or infinite values" in message
    assert not any(isinstance(event, LayerHost | LayerLanded) and event.layer >= 1 for event in rig.events)
    with pytest.raises(AdapterRejectedError, match="v_proj"):
        rig.store.acquire(version)
    with pytest.raises(AdapterRejectedError, match="v_proj"):
        rig.store.start_load(version)


def test_values_that_overflow_the_models_dtype_are_refused(make_rig: MakeRig) -> None:
    rig = make_rig(dtype=torch.float16)
    tensors = random_tensors()
    tensors[tensor_name(0, Projection.K, "A")][0, 0] = 1e6
    assert "layer 0 k_proj lora_A holds NaN or infinite values in float16" in fail(rig, _load(rig, tensors))


def _load(rig: StoreRig, tensors: dict[str, torch.Tensor] | None = None) -> int:
    version = rig.add("one", tensors)
    rig.store.start_load(version)
    return version


def test_what_users_hold_of_a_failed_version_stays_until_they_release_it(rig: StoreRig) -> None:
    tensors = random_tensors()
    tensors[tensor_name(2, Projection.Q, "A")][0, 0] = torch.nan
    version = rig.add("one", tensors)
    rig.store.acquire(version)
    rig.start_copy(version)
    fail(rig, version)
    rig.drain_until(lambda: LANDING not in rig.states(version))
    assert rig.states(version)[2] is ABSENT
    assert rig.store.device_pages_held > 0
    rig.store.hold_host(version)
    rig.store.release(version)
    rig.check()
    assert rig.store.device_pages_held == 0
    assert rig.host_bytes_held > 0
    rig.store.drop_host(version)
    rig.check()
    assert rig.host_bytes_held == 0
    with pytest.raises(KeyError):
        rig.store.tier(version)
    rig.store.close_version(version)


@pytest.mark.parametrize("keep", ["all but one byte", "half"])
def test_a_file_cut_short_after_it_was_opened_is_truncated(rig: StoreRig, keep: str) -> None:
    version = rig.add("one")
    file = rig.root / "one" / "adapter_model.safetensors"
    size = file.stat().st_size
    os.truncate(file, size - 1 if keep == "all but one byte" else size // 2)
    rig.store.start_load(version)
    assert "truncated: it ends within layer" in fail(rig, version)


@pytest.mark.parametrize("change", ["overwrite", "touch"])
def test_a_file_that_changes_while_it_is_read_is_refused(rig: StoreRig, change: str) -> None:
    version = rig.add("one")
    rig.reads.shut()
    rig.store.start_load(version)
    rig.reads.allow(2)
    rig.drain_until(lambda: rig.store.is_in_host(version, 1))
    file = rig.root / "one" / "adapter_model.safetensors"
    if change == "overwrite":
        with file.open("r+b") as handle:
            handle.write(file.read_bytes())
    else:
        os.utime(file)
    rig.reads.open()
    assert "changed while it was read" in fail(rig, version)
    assert not any(isinstance(event, Verified) for event in rig.events)


@pytest.mark.parametrize("change", ["weights replaced", "folder replaced", "deleted"])
def test_a_file_replaced_by_rename_is_read_to_its_end(rig: StoreRig, tmp_path: Path, change: str) -> None:
    tensors = random_tensors()
    version = rig.add("one", tensors)
    rig.reads.shut()
    rig.store.start_load(version)
    rig.reads.allow(1)
    rig.drain_until(lambda: rig.store.is_in_host(version, 0))
    folder, new = rig.root / "one", write_folder(tmp_path / "new", tensors=random_tensors(seed=9))
    if change == "weights replaced":
        (new / "adapter_model.safetensors").rename(folder / "adapter_model.safetensors")
    elif change == "folder replaced":
        folder.rename(tmp_path / "aside")
        new.rename(folder)
    else:
        (folder / "adapter_model.safetensors").unlink()
    rig.reads.open()
    rig.drain_until(lambda: rig.store.is_verified(version))
    for layer in range(MODEL.layers):
        assert_same(rig.in_host(version, layer), expected(tensors, layer, torch.float32))


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (OSError(errno.EIO, "Input/output error"), "could not be read: Input/output error"),
        (MemoryError(), "not enough memory"),
        (RuntimeError("secret detail"), "internal error while the weights were read"),
    ],
)
def test_whatever_goes_wrong_in_the_reader_is_reported(rig: StoreRig, error: Exception, message: str) -> None:
    def fail_to_read() -> None:
        raise error

    rig.on_read = fail_to_read
    reported = fail(rig, _load(rig))
    assert message in reported
    assert "secret" not in reported
    rig.on_read = lambda: None
    other = rig.add("two")
    rig.store.start_load(other)
    rig.drain_until(lambda: rig.store.is_verified(other))


def test_whatever_goes_wrong_in_the_copier_is_reported(rig: StoreRig) -> None:
    def fail_to_land() -> None:
        raise RuntimeError("secret detail")

    rig.on_land = fail_to_land
    version = rig.add("one")
    rig.start_copy(version)
    assert fail(rig, version) == "internal error while the weights were copied to the device"
    rig.drain_until(lambda: rig.pool.free_pages == rig.pool.pages and rig.host_bytes_held == 0)
    rig.on_land = lambda: None
    other = rig.add("two")
    rig.start_copy(other)
    rig.drain_until(lambda: rig.store.is_landed(other))


def test_an_adapter_larger_than_the_host_store_is_refused_at_register(make_rig: MakeRig) -> None:
    rig = make_rig(host_bytes=4096)
    with pytest.raises(AdapterRejectedError, match="bytes, the host store has 4096 in all"):
        rig.add("one")


def test_a_version_is_registered_once_and_with_the_models_layers(rig: StoreRig) -> None:
    rig.add("one")
    with rig.catalog.lookup("one") as opened:
        manifest = opened.manifest
    with pytest.raises(ValueError, match="known already"):
        rig.store.register(manifest, os.open(rig.root, os.O_RDONLY))
    other = msgspec.structs.replace(manifest, version_id=99, layers=manifest.layers[:2])
    with pytest.raises(ValueError, match="2 layers, the pool has 3"):
        rig.store.register(other, os.open(rig.root, os.O_RDONLY))
