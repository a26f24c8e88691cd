"""What is compiled before an engine on CUDA serves: side by side, told file by file, and nothing of it twice."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest
import torch

from segue.config import ConfigError
from segue.engine.config import EngineConfig
from segue.engine.cuda.compile import (
    Module,
    build,
    compile_host_rows,
    compile_lora,
    compile_modules,
    flashinfer_modules,
)
from segue.engine.cuda.lora import KernelLora, LoraSizes
from segue.engine.instance import EngineInstance
from tests.checkpoints import TinyModel, write_random_adapter, write_random_model
from tests.engine.harness import EngineHarness

needs_ninja = pytest.mark.skipif(shutil.which("ninja") is None, reason="needs ninja")


@dataclass
class FakeSpec:
    """A module whose compiler is a shell command for each source, run by ninja."""

    name: str
    folder: Path
    command: str = "cp $in $out"
    count: int = 2
    is_aot: bool = False
    written: list[str] = field(default_factory=list)

    @property
    def build_dir(self) -> Path:
        return self.folder / self.name

    @property
    def sources(self) -> list[Path]:
        return [self.build_dir / f"{index}.cu" for index in range(self.count)]

    @property
    def library(self) -> Path:
        return self.build_dir / f"{self.name}.so"

    @property
    def ninja_path(self) -> Path:
        return self.build_dir / "build.ninja"

    @property
    def lock_path(self) -> Path:
        return self.folder / f"{self.name}.lock"

    def write_ninja(self) -> None:
        self.written.append(self.name)
        self.build_dir.mkdir(parents=True, exist_ok=True)
        lines = ["rule compile", f"  command = {self.command}", "rule link", "  command = cat $in > $out"]
        for source in self.sources:
            if not source.exists():
                source.touch()
            lines.append(f"build {source}.o: compile {source}")
        lines.append(f"build {self.library}: link {' '.join(f'{source}.o' for source in self.sources)}")
        self.ninja_path.write_text("\n".join(lines) + "\n")


@needs_ninja
def test_every_module_is_built_and_every_file_is_told(tmp_path: Path) -> None:
    specs = [FakeSpec("a", tmp_path, count=3), FakeSpec("b", tmp_path), FakeSpec("brought", tmp_path, is_aot=True)]
    told: list[tuple[str, int, int]] = []
    loaded: list[str] = []
    modules = [Module(spec=spec, load=partial(loaded.append, spec.name)) for spec in specs]
    compile_modules(modules, lambda *progress: told.append(progress), cores=2)
    assert [spec.library.exists() for spec in specs] == [True, True, False]
    assert loaded == ["a", "b", "brought"]
    assert {(stage, total) for stage, _, total in told} == {("compile FlashInfer kernels", 7)}
    assert sorted(done for _, done, _ in told) == [done for _, done, _ in told]
    assert {done for _, done, _ in told} == set(range(8))


@needs_ninja
def test_what_is_up_to_date_is_not_built_again(tmp_path: Path) -> None:
    log = tmp_path / "log"
    spec = FakeSpec("a", tmp_path, command=f"echo compiled >> {log} && cp $in $out")
    told: list[int] = []
    for _ in range(2):
        build([spec], lambda _stage, done, _total: told.append(done), cores=1)
    assert log.read_text().count("compiled") == 2
    assert told[-2:] == [0, 3]


@needs_ninja
def test_no_more_compilers_run_than_there_are_cores(tmp_path: Path) -> None:
    """Each command counts those that run with it: a folder for each, which only one can make."""
    running = tmp_path / "running"
    running.mkdir()
    command = f"mktemp -d {running}/XXXXXX > $out && ls {running} | wc -l >> {tmp_path}/counts && sleep 0.05"
    command += " && rmdir `cat $out`"
    specs = [FakeSpec(name, tmp_path, command=command, count=3) for name in "abcd"]
    build(specs, lambda *_: None, cores=2)
    counts = [int(line) for line in (tmp_path / "counts").read_text().split()]
    assert len(counts) == 12
    assert max(counts) <= 2


@needs_ninja
def test_a_module_that_does_not_compile_is_one_line(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiler = tmp_path / "compiler"
    compiler.write_text("echo first; echo 'norm.cu(3): error: no such thing'; exit 1")
    specs = [FakeSpec("good", tmp_path), FakeSpec("norm", tmp_path, command=f"sh {compiler}", count=1)]
    with pytest.raises(
        ConfigError,
        match=r"^device: FlashInfer's module norm does not compile: norm\.cu\(3\): error: no such thing$",
    ):
        build(specs, lambda *_: None, cores=2)
    assert "first" in caplog.text
    assert specs[0].library.exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are compiled where there is a GPU")
def test_the_lora_kernels_are_launched_with_nothing_to_do(tmp_path: Path) -> None:
    model_dir = write_random_model(tmp_path / "model", TinyModel(layers=1))
    config = EngineConfig(model_dir=str(model_dir), cpu_workers=0)
    told: list[tuple[int, int]] = []
    with EngineInstance.build(config) as instance:
        pool = instance._pool
        sizes = LoraSizes(adapters=16, adapter_pages=8, max_rank=16, max_rows=32)
        shapes = dict(instance._model_config.projection_shapes())
        lora = KernelLora(instance.store, pool, sizes, shapes, 16, multiprocessors=2)
        compile_lora(lora, lambda _stage, done, total: told.append((done, total)), pool.dtype)
    assert told == [(done, 12) for done in range(13)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_kernels_of_cpu_rows_are_launched(dtype: torch.dtype) -> None:
    told: list[tuple[int, int]] = []
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    compile_host_rows(lambda _stage, done, total: told.append((done, total)), dtype, device)
    assert told == [(0, 1), (1, 1)]


@pytest.mark.gpu
@pytest.mark.parametrize("window", [None, 32])
def test_an_engine_calls_no_module_that_was_not_compiled(tmp_path: Path, window: int | None) -> None:
    windowed = TinyModel(layers=2, head_dim=64, family="mistral", extra={"sliding_window": window})
    model = TinyModel(layers=2, head_dim=64) if window is None else windowed
    model_dir = write_random_model(tmp_path / "model", model)
    write_random_adapter(tmp_path / "adapters" / "a", model_dir, seed=1, rank=8)
    with EngineHarness(model_dir, tmp_path / "adapters", device="cuda", dtype="bfloat16") as harness:
        from flashinfer.jit.core import jit_spec_registry

        compiled = set(jit_spec_registry.get_all_specs())
        number = harness.submit(list(range(3, 40)), "a", max_tokens=8)
        harness.run()
        assert len(harness.answers[number].tokens) == 8
        assert set(jit_spec_registry.get_all_specs()) == compiled
    needed = flashinfer_modules(torch.bfloat16, 64, [window])
    assert {module.spec.name for module in needed} <= compiled
    assert os.environ["FLASHINFER_USE_CUDA_NORM"] == "1"
