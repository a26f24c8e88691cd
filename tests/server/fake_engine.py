"""FakeEngine: a process that speaks the engine's protocol and answers with its prompt's tokens in reverse order.

Answer i of a request leaves the first i of them out. The first token of a prompt may be a Command. Every message it
gets is written to its log as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import os
import select
import socket
import time
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path

import msgspec

from segue.engine.channel import Channel, ChannelClosedError
from segue.engine.lora.manifest import AdapterManifest
from segue.engine.messages import (
    Cancel,
    CloseVersion,
    DeviceTime,
    Evict,
    Failed,
    Finished,
    GetState,
    NewTokens,
    OpenVersion,
    Preload,
    Ready,
    Shutdown,
    Start,
    StartFailed,
    StartProgress,
    State,
    StepOutput,
    Submit,
    ToEngine,
    VersionFailed,
    VersionState,
)
from segue.types import FinishReason, LayerTiming, LoraSource, Tier, Timing, TokenLogprob

VOCAB_SIZE = 400
CONTEXT_TOKENS = 128
PAGES = 64
CACHED_TOKENS = 1
TOO_WIDE_TO_PIN = 32
NEVER_LANDS_RANK = 13
LOADING = tuple(StartProgress("load weights", done, 2000, "bytes") for done in (0, 500, 2000))


class Command(IntEnum):
    """Token ids that the test tokenizer does not have."""

    SILENT = 390
    DIE = 391
    OVERLOADED = 392
    UNFORESEEN = 393
    REJECT_VERSION = 394
    GARBAGE = 395
    IGNORE_SHUTDOWN = 396
    OVERLOADED_FROM_THE_THIRD = 397


@dataclass
class _Running:
    submit: Submit
    produced: int = 0

    def next_token(self) -> int:
        prompt = self.submit.prompt_token_ids
        return prompt[-1 - (self.produced + self.submit.sampling.sample) % len(prompt)]


@dataclass
class FakeEngine:
    """Produces one token of every running request each ``step_seconds``."""

    channel: Channel[ToEngine]
    log: Path
    step_seconds: float
    running: dict[int, _Running] = field(default_factory=dict)
    versions: dict[int, AdapterManifest] = field(default_factory=dict)
    tiers: dict[int, Tier] = field(default_factory=dict)
    steps: int = 0
    dropped: set[int] = field(default_factory=set)
    unreported: list[VersionFailed] = field(default_factory=list)
    ignores_shutdown: bool = False

    def serve(self) -> None:
        next_step = time.monotonic()
        while True:
            wait_seconds = max(0.0, next_step - time.monotonic()) if self.running else None
            readable, _, _ = select.select([self.channel], [], [], wait_seconds)
            if readable:
                try:
                    messages = self.channel.receive()
                except ChannelClosedError:
                    messages = [Shutdown()]
                for message in messages:
                    if isinstance(message, Shutdown):
                        self.note(message)
                        while self.ignores_shutdown:
                            time.sleep(1)
                        return
                    self.take(message)
                for failure in self.unreported:
                    self.channel.send(failure)
                self.unreported.clear()
            if time.monotonic() >= next_step:
                self.step()
                next_step = time.monotonic() + self.step_seconds

    def note(self, message: ToEngine, **more: object) -> None:
        line = {"message": type(message).__name__, **msgspec.to_builtins(message), **more}
        with self.log.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def take(self, message: ToEngine) -> None:
        more = {}
        if isinstance(message, OpenVersion):
            descriptor = self.channel.take_descriptor()
            more["descriptor_bytes"] = os.fstat(descriptor).st_size
            os.close(descriptor)
        # Before anything is answered, so that whoever has the answer finds the message in the log.
        self.note(message, **more)
        match message:
            case OpenVersion(manifest, pinned):
                assert manifest.version_id not in self.versions
                self.versions[manifest.version_id] = manifest
                if pinned and manifest.max_rank >= TOO_WIDE_TO_PIN:
                    self.unreported.append(VersionFailed(manifest.version_id, "the pinned adapters do not fit"))
                    self.dropped.add(manifest.version_id)
                elif pinned and manifest.max_rank != NEVER_LANDS_RANK:
                    self.tiers[manifest.version_id] = Tier.DEVICE
            case Submit():
                self.submit(message)
            case Cancel(number):
                running = self.running.pop(number, None)
                if running is not None:
                    finished = self.finished(FinishReason.CANCELLED, running)
                    self.channel.send(StepOutput(finished=[finished]))
            case CloseVersion(version_id):
                del self.versions[version_id]
            case Evict(version_id):
                self.tiers.pop(version_id, None)
            case Preload(version_id):
                self.tiers[version_id] = Tier.DEVICE
            case GetState(number):
                self.channel.send(self.state(number))

    def submit(self, submit: Submit) -> None:
        number, version_id = submit.number, submit.adapter_version_id
        assert version_id is None or version_id in self.versions
        match submit.prompt_token_ids[0]:
            case Command.SILENT:
                return
            case Command.DIE:
                os._exit(9)
            case Command.OVERLOADED:
                self.channel.send(StepOutput(failed=[Failed(number, "OVERLOADED", "the queue is full")]))
            case Command.OVERLOADED_FROM_THE_THIRD if submit.sampling.sample >= 2:
                self.channel.send(StepOutput(failed=[Failed(number, "OVERLOADED", "the queue is full")]))
            case Command.UNFORESEEN:
                self.channel.send(StepOutput(failed=[Failed(number, "BUG", "secret detail")]))
            case Command.REJECT_VERSION:
                assert version_id is not None
                self.channel.send(VersionFailed(version_id, "layer 0 q_proj has NaN"))
                failed = Failed(number, "ADAPTER_REJECTED", "layer 0 q_proj has NaN")
                self.channel.send(StepOutput(failed=[failed]))
            case Command.GARBAGE:
                self.channel.send({"not": "a message"})
            case Command.IGNORE_SHUTDOWN:
                self.ignores_shutdown = True
            case _:
                self.running[number] = _Running(submit)
                if version_id is not None:
                    self.tiers[version_id] = Tier.DEVICE

    def step(self) -> None:
        output = StepOutput()
        self.steps += 1
        for number, running in list(self.running.items()):
            token = running.next_token()
            running.produced += 1
            logprobs = []
            if running.submit.sampling.logprobs is not None:
                logprobs = [TokenLogprob(token_id=token, logprob=-0.5, top={token: -0.5, 1: -2.0})]
            output.tokens.append(NewTokens(number, [token], logprobs))
            stopped = token in running.submit.sampling.stop_token_ids
            if stopped or running.produced == running.submit.max_tokens:
                del self.running[number]
                reason = FinishReason.STOP if stopped else FinishReason.LENGTH
                output.finished.append(self.finished(reason, running))
        if output.tokens:
            self.channel.send(output)

    def finished(self, reason: FinishReason, running: _Running) -> Finished:
        layers = (
            LayerTiming(layer=0, source=LoraSource.CPU, start_seconds=0.1, end_seconds=0.2, landed_seconds=None),
            LayerTiming(layer=1, source=LoraSource.DEVICE, start_seconds=0.2, end_seconds=0.3, landed_seconds=0.15),
        )
        timing = Timing(
            tier=Tier.DISK,
            queue_seconds=0.05,
            ttft_seconds=0.4,
            tpot_seconds=None if running.produced < 2 else 0.01,
            total_seconds=0.5,
            cpu_layers=1,
            layers=layers,
            prefill_attempts=2,
            cpu_tokens=3,
        )
        prompt_tokens = len(running.submit.prompt_token_ids)
        return Finished(running.submit.number, reason, prompt_tokens, running.produced, CACHED_TOKENS, timing)

    def state(self, number: int) -> State:
        users = [running.submit.adapter_version_id for running in self.running.values()]
        return State(
            number=number,
            waiting=1,
            running=len(self.running),
            prefills=2,
            free_pages=PAGES - 14,
            adapter_pages=3,
            kv_pages=5,
            cached_pages=6,
            host_free_bytes=1000,
            cpu_workers_ready=2,
            worker_restarts=4,
            steps=self.steps,
            versions=[
                VersionState(version_id, self.tiers.get(version_id, Tier.DISK), users.count(version_id))
                for version_id in self.versions.keys() - self.dropped
            ],
            device_time=DeviceTime(7, 2.5, 0.25),
        )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--log", type=Path, required=True)
    parser.add_argument("--step-seconds", type=float, required=True)
    parser.add_argument("--start", choices=("ready", "failed", "silent", "exit"), default="ready")
    parser.add_argument("--channel-fd", type=int, required=True)
    arguments = parser.parse_args()
    channel: Channel[ToEngine] = Channel(socket.socket(fileno=arguments.channel_fd), ToEngine)
    engine = FakeEngine(channel, arguments.log, arguments.step_seconds)
    select.select([channel], [], [])
    (start,) = channel.receive()
    assert isinstance(start, Start)
    engine.note(start, pid=os.getpid())
    match arguments.start:
        case "failed":
            channel.send(StartFailed("model.safetensors is truncated"))
        case "silent":
            select.select([channel], [], [])
        case "ready":
            channel.send_together(LOADING[:2])
            # In one piece: whoever reads the last report must not lose what comes with it.
            channel.send_together((LOADING[2], _ready(start)))
            engine.serve()


def _ready(start: Start) -> Ready:
    return Ready(
        model=start.config.model_dir,
        device=start.config.device,
        dtype=start.config.dtype,
        layers=2,
        vocab_size=VOCAB_SIZE,
        context_tokens=CONTEXT_TOKENS,
        page_tokens=16,
        pages=PAGES,
        cpu_workers=2,
    )


if __name__ == "__main__":
    main()
