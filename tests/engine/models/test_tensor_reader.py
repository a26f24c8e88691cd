"""Reading tensors in chunks, side by side: bit for bit what safetensors reads, in any dtype, and clear errors."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from segue.engine.models.checkpoint_files import StoredTensor, stored_tensors
from segue.engine.models.config import ModelConfig, ModelError
from segue.engine.models.landing import Comparison, DeviceLanding, HostLanding, Landing
from segue.engine.models.tensor_reader import TensorRead, read_tensors
from segue.engine.models.weights import load_weights
from tests.checkpoints import write_random_model

CHUNK_BYTES = 256
DTYPES = (torch.float32, torch.float16, torch.bfloat16)
SHAPES = ((3, 100), (1,), (64, 2), (7, 33), (257,))


def write_tensors(directory: Path, dtype: torch.dtype) -> dict[str, Tensor]:
    """model.safetensors with tensors that begin and end anywhere within chunks, and their values."""
    directory.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)
    tensors = {
        f"t{index}": torch.randn(shape, generator=generator).to(dtype) * 100 for index, shape in enumerate(SHAPES)
    }
    # Odd header lengths put the tensors at odd places of the file.
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt", "note": "abc"})
    return load_file(directory / "model.safetensors")


def empty_reads(stored: Sequence[StoredTensor], dtype: torch.dtype, device: str = "cpu") -> dict[str, TensorRead]:
    return {
        tensor.name: TensorRead(stored=tensor, destination=torch.zeros(tensor.shape, dtype=dtype, device=device))
        for tensor in stored
    }


@pytest.mark.parametrize("readers", [1, 4])
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
@pytest.mark.parametrize("stored", [*DTYPES, torch.float64], ids=str)
def test_values_are_those_of_the_library(
    tmp_path: Path, stored: torch.dtype, wanted: torch.dtype, readers: int
) -> None:
    expected = write_tensors(tmp_path, stored)
    reads = empty_reads(stored_tensors(tmp_path), wanted)
    sizes: list[int] = []
    read_tensors(list(reads.values()), HostLanding(), sizes.append, readers=readers, chunk_bytes=CHUNK_BYTES)
    assert reads.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(reads[name].destination, tensor.to(wanted))
    assert sum(sizes) == sum(tensor.nbytes for tensor in expected.values())
    assert max(sizes) == CHUNK_BYTES


def test_slices_of_a_merged_tensor_are_filled_and_nothing_beside_them(tmp_path: Path) -> None:
    expected = write_tensors(tmp_path, torch.bfloat16)
    merged = torch.full((11, 100), 7.0, dtype=torch.bfloat16)
    reads = [
        TensorRead(stored=tensor, destination=merged[4:7]) for tensor in stored_tensors(tmp_path) if tensor.name == "t0"
    ]
    read_tensors(reads, HostLanding(), lambda _: None, chunk_bytes=CHUNK_BYTES)
    assert torch.equal(merged[4:7], expected["t0"])
    assert bool((merged[:4] == 7).all())
    assert bool((merged[7:] == 7).all())


def test_one_dtype_is_read_in_place(tmp_path: Path) -> None:
    write_tensors(tmp_path, torch.float16)
    reads = empty_reads(stored_tensors(tmp_path), torch.float16)
    landing = HostLanding()
    destination = reads["t4"].destination
    with landing.buffer(destination, torch.float16) as buffer:
        buffer[:2] = torch.tensor([1.5], dtype=torch.float16).view(torch.uint8).numpy().tobytes()
    assert destination[0] == 1.5


class _RecordingLanding:
    """A HostLanding that remembers what was asked for, by the destinations' addresses."""

    def __init__(self) -> None:
        self.inner = HostLanding()
        self.addresses: list[int] = []

    @contextmanager
    def buffer(self, destination: Tensor, stored: torch.dtype) -> Iterator[memoryview]:
        self.addresses.append(destination.data_ptr())
        with self.inner.buffer(destination, stored) as buffer:
            yield buffer

    def finish(self) -> None:
        self.inner.finish()


def test_files_are_read_in_turn(tmp_path: Path) -> None:
    reads: list[TensorRead] = []
    for name in ("a", "b"):
        write_tensors(tmp_path / name, torch.float32)
        reads += empty_reads(stored_tensors(tmp_path / name), torch.float32).values()
    landing = _RecordingLanding()
    read_tensors(reads, landing, lambda _: None, readers=1, chunk_bytes=1 << 20)
    first, second = reads[: len(SHAPES)], reads[len(SHAPES) :]
    in_turn = [read.destination.data_ptr() for pair in zip(first, second, strict=True) for read in pair]
    assert landing.addresses == in_turn


class _MeetingLanding(_RecordingLanding):
    """Lets no reader go on before another one reads as well."""

    def __init__(self) -> None:
        super().__init__()
        self.barrier = threading.Barrier(2, timeout=20)

    @contextmanager
    def buffer(self, destination: Tensor, stored: torch.dtype) -> Iterator[memoryview]:
        with super().buffer(destination, stored) as buffer:
            self.barrier.wait()
            yield buffer


def test_chunks_are_read_side_by_side(tmp_path: Path) -> None:
    expected = write_tensors(tmp_path, torch.float32)
    reads = [
        read for name, read in empty_reads(stored_tensors(tmp_path), torch.float32).items() if name in ("t0", "t2")
    ]
    read_tensors(reads, _MeetingLanding(), lambda _: None, readers=2, chunk_bytes=1 << 20)
    for read in reads:
        assert torch.equal(read.destination, expected[read.stored.name])


def test_a_file_that_became_shorter_is_named_with_the_tensor(tmp_path: Path) -> None:
    write_tensors(tmp_path, torch.float32)
    stored = stored_tensors(tmp_path)
    path = tmp_path / "model.safetensors"
    os.truncate(path, path.stat().st_size - 20)
    reads = list(empty_reads(stored, torch.float32).values())
    with pytest.raises(ModelError, match=rf"model\.safetensors: is truncated: it ends within tensor {stored[-1].name}"):
        read_tensors(reads, HostLanding(), lambda _: None, chunk_bytes=CHUNK_BYTES)


def test_a_file_that_went_away_is_named(tmp_path: Path) -> None:
    write_tensors(tmp_path, torch.float32)
    reads = list(empty_reads(stored_tensors(tmp_path), torch.float32).values())
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ModelError, match=r"model\.safetensors: No such file"):
        read_tensors(reads, HostLanding(), lambda _: None)


def test_reading_ends_when_nobody_wants_to_hear_of_it(tmp_path: Path) -> None:
    write_tensors(tmp_path, torch.float32)
    reads = list(empty_reads(stored_tensors(tmp_path), torch.float32).values())

    def hang_up(_size_bytes: int) -> None:
        raise ConnectionError("gone")

    before = threading.active_count()
    with pytest.raises(ConnectionError, match="gone"):
        read_tensors(reads, HostLanding(), hang_up, readers=2, chunk_bytes=CHUNK_BYTES)
    assert threading.active_count() == before


@pytest.mark.parametrize("wanted", DTYPES, ids=str)
def test_a_comparison_finds_one_other_value(tmp_path: Path, wanted: torch.dtype) -> None:
    expected = write_tensors(tmp_path, torch.float32)
    stored = stored_tensors(tmp_path)
    for place, differs in ((None, False), (0, True), (256, True)):
        values = {name: tensor.to(wanted, copy=True) for name, tensor in expected.items()}
        if place is not None:
            values["t4"][place] += 1
        comparison = Comparison()
        reads = [TensorRead(stored=tensor, destination=values[tensor.name]) for tensor in stored]
        read_tensors(reads, comparison, lambda _: None, chunk_bytes=CHUNK_BYTES)
        assert comparison.differs is differs


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", DTYPES, ids=str)
@pytest.mark.parametrize("stored", DTYPES, ids=str)
def test_staged_values_are_those_of_the_library(tmp_path: Path, stored: torch.dtype, wanted: torch.dtype) -> None:
    """Far more chunks than buffers, so that every buffer is used again while copies are under way."""
    expected = write_tensors(tmp_path, stored)
    device = torch.device("cuda", torch.cuda.current_device())
    landing: Landing = DeviceLanding(device, buffers=3, buffer_bytes=64)
    reads = empty_reads(stored_tensors(tmp_path), wanted, "cuda")
    read_tensors(list(reads.values()), landing, lambda _: None, readers=2, chunk_bytes=64)
    for name, tensor in expected.items():
        assert torch.equal(reads[name].destination.cpu(), tensor.to(wanted))


@pytest.mark.gpu
@pytest.mark.parametrize("wanted", [torch.float32, torch.bfloat16], ids=str)
def test_a_checkpoint_on_cuda_is_that_on_the_cpu(tmp_path: Path, wanted: torch.dtype) -> None:
    model_dir = write_random_model(tmp_path, max_shard_bytes=60_000, dtype=torch.bfloat16)
    config = ModelConfig.load(model_dir)
    host, device = load_weights(model_dir, config, wanted), load_weights(model_dir, config, wanted, "cuda")
    assert torch.equal(host.embedding, device.embedding.cpu())
    for one, other in zip(host.layers, device.layers, strict=True):
        assert torch.equal(one.qkv.weight, other.qkv.weight.cpu())
        assert torch.equal(one.gate_up.weight, other.gate_up.weight.cpu())
        assert torch.equal(one.input_norm, other.input_norm.cpu())
