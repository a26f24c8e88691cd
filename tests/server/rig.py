"""A whole front end for tests: a model folder with a tokenizer, adapters, and a server with a FakeEngine."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

from segue import Client, RetryPolicy
from segue.engine.config import EngineConfig
from segue.engine.messages import StartProgress
from segue.server.app import Server
from segue.server.config import ServerConfig, SupervisionConfig

WAIT_SECONDS = 20.0
HIDDEN = 16
LAYERS = 2
MODEL_NAME = "tiny"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "[{{ message.role }}]{{ message.content }}"
    "{% endfor %}{% if add_generation_prompt %}[answer]{% endif %}"
)

_FAKE_ENGINE = Path(__file__).with_name("fake_engine.py")


def byte_level_tokenizer() -> Tokenizer:
    """A byte-level BPE with merges, multi-byte ones among them, and two special tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["hello world, hello there: 你好世界 😀 né né né"], trainer)
    tokenizer.add_tokens([AddedToken("naïve 你", special=False)])
    return tokenizer


def write_model(directory: Path, *, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A model folder without weights: the front end does not read them."""
    directory.mkdir(parents=True)
    byte_level_tokenizer().save(str(directory / "tokenizer.json"))
    tokenizer_config = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    if chat_template is not None:
        tokenizer_config["chat_template"] = chat_template
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": HIDDEN,
        "intermediate_size": HIDDEN,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "vocab_size": 400,
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-6,
        "hidden_act": "silu",
        "eos_token_id": 1,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return directory


def write_adapter(directory: Path, *, rank: int = 4) -> Path:
    """A LoRA adapter of q_proj for the model of ``write_model``."""
    directory.mkdir(parents=True)
    tensors = {}
    for layer in range(LAYERS):
        prefix = f"base_model.model.model.layers.{layer}.self_attn.q_proj"
        tensors[f"{prefix}.lora_A.weight"] = np.full((rank, HIDDEN), 0.1, np.float32)
        tensors[f"{prefix}.lora_B.weight"] = np.full((HIDDEN, rank), 0.1, np.float32)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["q_proj"], "bias": "none"}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def wait_until(condition: Callable[[], bool], what: str) -> None:
    """Poll until ``condition`` holds; fail after WAIT_SECONDS."""
    deadline = time.monotonic() + WAIT_SECONDS
    while not condition():
        assert time.monotonic() < deadline, f"waited {WAIT_SECONDS:g} s in vain: {what}"
        time.sleep(0.005)


class LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="server loop")
        self._thread.start()

    def run(self, coroutine: Any) -> Any:
        future: Future[Any] = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        return future.result(WAIT_SECONDS)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        self._loop.close()


@dataclass
class Rig:
    """A running server and where its parts are."""

    server: Server
    loop: LoopThread
    adapters_dir: Path
    model_dir: Path
    engine_log: Path
    progress: list[StartProgress]
    clients: list[Client] = field(default_factory=list)

    @property
    def target(self) -> str:
        return f"127.0.0.1:{self.server.port}"

    def client(self) -> Client:
        """A client with a connection of its own, which sends nothing twice."""
        options = (("grpc.use_local_subchannel_pool", 1),)
        self.clients.append(Client(self.target, channel_options=options, retry=RetryPolicy(attempts=1)))
        return self.clients[-1]

    def messages(self, name: str) -> list[dict[str, Any]]:
        """The messages of this kind that the FakeEngines have got, in order."""
        lines = map(json.loads, self.engine_log.read_text().splitlines())
        return [line for line in lines if line["message"] == name]

    def wait_for(self, name: str, count: int = 1) -> list[dict[str, Any]]:
        """Wait until the FakeEngine has got so many messages of a kind."""
        wait_until(lambda: len(self.messages(name)) >= count, f"{count} {name} at the engine")
        return self.messages(name)

    def engine_pid(self) -> int:
        """The process id of the newest FakeEngine."""
        return int(self.messages("Start")[-1]["pid"])

    def close(self) -> None:
        for client in self.clients:
            client.close()
        self.loop.run(self.server.stop())


def fake_engine_command(log: Path, *arguments: str, step_seconds: float = 0.002) -> tuple[str, ...]:
    """The command line of a FakeEngine."""
    return (sys.executable, str(_FAKE_ENGINE), "--log", str(log), "--step-seconds", str(step_seconds), *arguments)


def server_config(model_dir: Path, adapters_dir: Path, *, start_seconds: float = 60.0) -> ServerConfig:
    """A server on any free port that does not wait long for anything."""
    return ServerConfig(
        engine=EngineConfig(model_dir=str(model_dir), max_lora_rank=64, copy_bytes_per_second=1e9),
        adapters_dir=str(adapters_dir),
        listen="127.0.0.1:0",
        model_name=MODEL_NAME,
        default_max_tokens=8,
        drain_seconds=0.0,
        supervision=SupervisionConfig(
            start_seconds=start_seconds, stop_seconds=2.0, restart_min_seconds=0.05, restart_max_seconds=0.2
        ),
    )


@contextmanager
def running_server(
    loop: LoopThread,
    directory: Path,
    *engine_arguments: str,
    chat_template: str | None = CHAT_TEMPLATE,
    step_seconds: float = 0.002,
    start_seconds: float = 60.0,
    drain_seconds: float = 0.0,
    pinned_adapters: tuple[str, ...] = (),
    load_format: str = "auto",
    has_tokenizer: bool = True,
) -> Iterator[Rig]:
    """A server of the tiny model with the adapters "alpha" and "beta"."""
    model_dir = write_model(directory / "model", chat_template=chat_template)
    if not has_tokenizer:
        (model_dir / "tokenizer.json").unlink()
    adapters_dir = directory / "adapters"
    for name in ("alpha", "beta"):
        write_adapter(adapters_dir / name)
    log = directory / "engine.log"
    log.touch()
    command = fake_engine_command(log, *engine_arguments, step_seconds=step_seconds)
    config = server_config(model_dir, adapters_dir, start_seconds=start_seconds)
    config = dataclasses.replace(
        config,
        engine=dataclasses.replace(config.engine, load_format=load_format),
        drain_seconds=drain_seconds,
        pinned_adapters=pinned_adapters,
    )
    progress: list[StartProgress] = []
    server = loop.run(_make_server(config, command, progress))
    loop.run(server.start())
    rig = Rig(server, loop, adapters_dir, model_dir, log, progress)
    try:
        yield rig
    finally:
        rig.close()


async def _make_server(config: ServerConfig, command: tuple[str, ...], progress: list[StartProgress]) -> Server:
    return Server(config, on_progress=progress.append, engine_command=command)
