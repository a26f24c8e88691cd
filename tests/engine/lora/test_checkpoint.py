from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from segue.engine.lora.checkpoint import MAX_CONFIG_BYTES, Checkpoint, open_checkpoint
from segue.engine.lora.manifest import Projection
from segue.engine.lora.safetensors_header import MAX_HEADER_BYTES
from segue.errors import AdapterRejectedError, StatusCode, UnsafePathError
from tests.checkpoints import TinyModel, write_random_adapter, write_random_model
from tests.descriptors import open_descriptors
from tests.engine.lora.adapter_folders import (
    ATTENTION,
    MODEL,
    SmallModel,
    peft_config,
    random_tensors,
    tensor_name,
    write_folder,
    write_raw_weights,
)

MAX_RANK = 64
Q0_A = tensor_name(0, Projection.Q, "A")


@pytest.fixture
def root_fd(tmp_path: Path) -> Iterator[int]:
    descriptor = os.open(tmp_path, os.O_RDONLY | os.O_DIRECTORY)
    before = open_descriptors()
    yield descriptor
    assert open_descriptors() == before, "a descriptor was left open"
    os.close(descriptor)


def open_one(root_fd: int, model: SmallModel = MODEL) -> Checkpoint:
    checkpoint = open_checkpoint(root_fd, ("one",), model, MAX_RANK)
    os.close(checkpoint.descriptor)
    return checkpoint


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_every_matrix_is_found_where_it_lies(tmp_path: Path, root_fd: int, dtype: torch.dtype) -> None:
    ranks = {Projection.Q: 2, Projection.DOWN: 8}
    targets = (Projection.Q, Projection.V, Projection.DOWN)
    tensors = random_tensors(ranks=ranks, targets=targets, dtype=dtype)
    config = peft_config(targets, rank_pattern={"q_proj": 2, "down_proj": 8}, alpha_pattern={"down_proj": 4})
    data = (write_folder(tmp_path / "one", tensors=tensors, config=config) / "adapter_model.safetensors").read_bytes()
    checkpoint = open_one(root_fd)
    assert len(checkpoint.layers) == MODEL.layers
    for index, layer in enumerate(checkpoint.layers):
        assert [module.projection for module in layer] == list(targets)
        assert [(module.rank, module.scale) for module in layer] == [(2, 4.0), (4, 2.0), (8, 0.5)]
        for module in layer:
            for matrix, span in (("A", module.a), ("B", module.b)):
                raw = bytearray(data[span.file_offset : span.file_offset + span.nbytes])
                found = torch.frombuffer(raw, dtype=dtype).view(span.rows, span.columns)
                assert torch.equal(found, tensors[tensor_name(index, module.projection, matrix)])


def test_an_adapter_that_peft_saved_is_served(tmp_path: Path, root_fd: int) -> None:
    base = write_random_model(tmp_path / "base", TinyModel(layers=2))
    write_random_adapter(tmp_path / "one", base, rank=8, targets=["k_proj", "up_proj"], rank_by_module={"k_proj": 3})
    checkpoint = open_one(root_fd, SmallModel(layers=2, hidden=64, kv=32, mlp=96))
    ranks = [[(module.projection.value, module.rank) for module in layer] for layer in checkpoint.layers]
    assert ranks == [[("k_proj", 3), ("up_proj", 8)]] * 2


def without(*names: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def remove(tensors: dict[str, torch.Tensor]) -> None:
        for name in names:
            del tensors[name]

    return remove


def replaced(name: str, tensor: torch.Tensor) -> Callable[[dict[str, torch.Tensor]], None]:
    return lambda tensors: tensors.update({name: tensor})


@pytest.mark.parametrize(
    ("spoil", "problem"),
    [
        (without(Q0_A), "layer 0 q_proj is targeted but .* lacks its lora_A"),
        (without(tensor_name(2, Projection.V, "B")), "layer 2 v_proj .* lacks its lora_B"),
        (without(Q0_A, tensor_name(0, Projection.Q, "B")), "lacks its lora_A and lora_B"),
        (replaced(Q0_A, torch.zeros(4, 33)), "33 to 32 features, the base model has 32 to 32: .*another base model"),
        (replaced(tensor_name(1, Projection.K, "B"), torch.zeros(32, 4)), "layer 1 k_proj: .*another base model"),
        (replaced(Q0_A, torch.zeros(3, 32)), "lora_A has rank 3, lora_B has rank 4"),
        (replaced(Q0_A, torch.zeros(4, 32, 1)), "3 dimensions"),
        (replaced(Q0_A, torch.zeros(0, 32)), "rank 0"),
        (replaced(Q0_A, torch.zeros(4, 32, dtype=torch.int8)), "dtype 'I8'"),
        (replaced(Q0_A, torch.zeros(4, 32, dtype=torch.float64)), "dtype 'F64'"),
        (replaced(tensor_name(3, Projection.Q, "A"), torch.zeros(4, 32)), "layer 3, the base model has 3"),
        (replaced(tensor_name(0, Projection.UP, "A"), torch.zeros(4, 32)), "target_modules does not name"),
        (replaced("base_model.model.lm_head.weight", torch.zeros(4, 32)), "'base_model.model.lm_head.weight' is not"),
        (replaced(Q0_A.replace("lora_A.weight", "lora_magnitude_vector"), torch.zeros(4)), "lora_magnitude_vector"),
        (replaced(Q0_A.replace("lora_A", "lora_embedding_A"), torch.zeros(4, 4)), "lora_embedding_A"),
        (replaced(Q0_A.replace("self_attn", "mlp"), torch.zeros(4, 32)), "mlp.q_proj"),
        (replaced(Q0_A.replace("layers.0", "layers.00"), torch.zeros(4, 32)), "layers.00"),
        (replaced(Q0_A.replace(".weight", ".bias"), torch.zeros(4)), "lora_A.bias"),
    ],
)
def test_tensors_that_do_not_fit_are_refused_by_name(
    tmp_path: Path, root_fd: int, spoil: Callable[[dict[str, torch.Tensor]], None], problem: str
) -> None:
    tensors = random_tensors()
    spoil(tensors)
    write_folder(tmp_path / "one", tensors=tensors)
    with pytest.raises(AdapterRejectedError, match=problem) as caught:
        open_one(root_fd)
    assert caught.value.code is StatusCode.FAILED_PRECONDITION


def test_the_ranks_of_config_and_tensors_must_agree(tmp_path: Path, root_fd: int) -> None:
    write_folder(tmp_path / "one", config=peft_config(r=8))
    with pytest.raises(AdapterRejectedError, match=r"tensors have rank 4, adapter_config\.json says 8"):
        open_one(root_fd)


def test_a_rank_over_the_limit_is_refused(tmp_path: Path, root_fd: int) -> None:
    write_folder(tmp_path / "one", tensors=random_tensors(rank=65), config=peft_config(r=65))
    with pytest.raises(AdapterRejectedError, match="rank 65 is over the limit of 64"):
        open_one(root_fd)


@pytest.mark.parametrize("name", ["adapter_model.bin", "adapter_model.pt"])
def test_a_pickle_is_refused_by_name(tmp_path: Path, root_fd: int, name: str) -> None:
    folder = write_folder(tmp_path / "one")
    (folder / "adapter_model.safetensors").rename(folder / name)
    with pytest.raises(AdapterRejectedError, match=rf"{name} is a pickle"):
        open_one(root_fd)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
def test_a_missing_file_is_named(tmp_path: Path, root_fd: int, name: str) -> None:
    (write_folder(tmp_path / "one") / name).unlink()
    with pytest.raises(AdapterRejectedError, match=f"has no {name}"):
        open_one(root_fd)


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json"])
@pytest.mark.parametrize("kind", ["link", "fifo", "folder"])
def test_a_file_that_is_not_regular_is_unsafe(tmp_path: Path, root_fd: int, name: str, kind: str) -> None:
    file = write_folder(tmp_path / "one") / name
    moved = file.rename(tmp_path / name)
    if kind == "link":
        file.symlink_to(moved)
    elif kind == "fifo":
        os.mkfifo(file)
    else:
        file.mkdir()
    with pytest.raises(UnsafePathError):
        open_one(root_fd)


def test_a_config_that_is_too_large_is_refused(tmp_path: Path, root_fd: int) -> None:
    folder = write_folder(tmp_path / "one")
    (folder / "adapter_config.json").write_bytes(b" " * (MAX_CONFIG_BYTES + 1))
    with pytest.raises(AdapterRejectedError, match="larger than"):
        open_one(root_fd)


@pytest.mark.parametrize("keep_bytes", [0, 5, 8, 60, 2000, -1])
def test_a_truncated_file_is_refused(tmp_path: Path, root_fd: int, keep_bytes: int) -> None:
    file = write_folder(tmp_path / "one") / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:keep_bytes])
    with pytest.raises(AdapterRejectedError, match="truncated"):
        open_one(root_fd)


def entry(start: int, stop: int, **changes: Any) -> dict[str, Any]:
    return {"dtype": "F32", "shape": [(stop - start) // 4], "data_offsets": [start, stop], **changes}


@pytest.mark.parametrize(
    ("header", "data_bytes", "problem"),
    [
        ({"a": entry(0, 8), "b": entry(4, 12)}, 12, "'b' overlaps"),
        ({"a": entry(0, 8), "b": entry(0, 8)}, 8, "overlaps"),
        ({"a": entry(0, 8), "b": entry(12, 16)}, 16, "'b' leaves a hole"),
        ({"a": entry(0, 8)}, 12, "belong to no tensor"),
        ({"a": entry(0, 8)}, 4, "truncated"),
        ({"a": entry(0, 1 << 40)}, 8, "truncated"),
        ({"a": entry(0, 8, shape=[3])}, 8, "do not fit"),
        ({"a": entry(0, 8, shape=[1 << 61, 1 << 61])}, 8, "do not fit"),
        ({"a": entry(0, 8, shape=[-2])}, 8, "whole numbers"),
        ({"a": entry(0, 8, shape=[True, 2])}, 8, "whole numbers"),
        ({"a": entry(0, 8, shape=[2.0])}, 8, "whole numbers"),
        ({"a": entry(0, 8, shape=[1] * 9 + [2])}, 8, "whole numbers"),
        ({"a": entry(0, 8, shape=2)}, 8, "whole numbers"),
        ({"a": entry(0, 8, data_offsets=[0])}, 8, "whole numbers"),
        ({"a": entry(8, 0, shape=[2])}, 8, "do not fit"),
        ({"a": entry(0, 8, dtype=["F32"])}, 8, "dtype"),
        ({"a": entry(0, 8, more=1)}, 8, "nothing else"),
        ({"a": {"dtype": "F32", "shape": [2]}}, 8, "nothing else"),
        ({"a": 7}, 8, "nothing else"),
        (b"[]", 0, "malformed header"),
        (b'{"a": 1, "a": 2}', 0, "twice"),
        (b"\xff", 0, "UTF-8"),
        (b'{"a"', 0, "malformed header"),
        (b"", 0, "malformed header"),
        ({}, 0, "lacks its lora_A"),
    ],
)
def test_a_malformed_header_is_refused(
    tmp_path: Path, root_fd: int, header: Any, data_bytes: int, problem: str
) -> None:
    write_raw_weights(write_folder(tmp_path / "one"), header, bytes(data_bytes))
    with pytest.raises(AdapterRejectedError, match=problem):
        open_one(root_fd)


def test_a_header_that_claims_to_be_huge_is_refused_unread(tmp_path: Path, root_fd: int) -> None:
    file = write_folder(tmp_path / "one") / "adapter_model.safetensors"
    with file.open("wb") as sparse:
        sparse.write((MAX_HEADER_BYTES + 1).to_bytes(8, "little"))
        sparse.truncate(1 << 40)
    with pytest.raises(AdapterRejectedError, match="more than the"):
        open_one(root_fd)


def test_metadata_and_trailing_blanks_in_the_header_do_not_matter(tmp_path: Path, root_fd: int) -> None:
    folder = write_folder(tmp_path / "one")
    file = folder / "adapter_model.safetensors"
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = data[8 : 8 + length].replace(b"{", b'{"__metadata__":{"format":"pt"},', 1) + b"   "
    write_raw_weights(folder, header, data[8 + length :])
    assert [len(layer) for layer in open_one(root_fd).layers] == [len(ATTENTION)] * MODEL.layers
