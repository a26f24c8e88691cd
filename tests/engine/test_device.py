"""What an engine says where its device is not there."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from segue.config import ConfigError
from segue.engine.device import CpuStreams, device_streams
from tests.checkpoints import TinyModel, write_random_model
from tests.engine.harness import EngineHarness


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_cuda_without_a_device_is_one_clear_line(tmp_path: Path) -> None:
    model_dir = write_random_model(tmp_path / "model", TinyModel(layers=1))
    (tmp_path / "adapters").mkdir()
    with pytest.raises(ConfigError, match=r"^device: is 'cuda', but [^\n]+$"):
        EngineHarness(model_dir, tmp_path / "adapters", device="cuda")


def test_on_the_cpu_nothing_is_under_way() -> None:
    streams = device_streams("cpu")
    assert isinstance(streams, CpuStreams)
    assert streams.device.type == "cpu"
    done: list[str] = []
    streams.enqueue_copy(lambda: done.append("copied"), [])
    streams.enqueue_landing(lambda: done.append("landed"), [])
    assert done == ["copied", "landed"]


def test_dummy_weights_need_no_checkpoint_and_are_the_same_each_time(tmp_path: Path) -> None:
    model_dir = write_random_model(tmp_path / "model", TinyModel(layers=2))
    (tmp_path / "adapters").mkdir()
    for path in model_dir.glob("*.safetensors"):
        path.unlink()
    answers = []
    for _ in range(2):
        with EngineHarness(model_dir, tmp_path / "adapters", load_format="dummy", cpu_workers=0) as harness:
            number = harness.submit([5, 6, 7], max_tokens=8)
            harness.run()
            answers.append(harness.answers[number].tokens)
    assert answers[0] == answers[1]
    assert len(answers[0]) == 8
