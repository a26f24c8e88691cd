"""The engine process's loop: messages in, one step, what it brought out; and sleep when nothing can go on."""

from __future__ import annotations

import os
import select

from segue.engine.channel import Channel, ChannelClosedError
from segue.engine.core import Engine
from segue.engine.instance import EngineInstance
from segue.engine.messages import (
    Cancel,
    CloseVersion,
    Evict,
    GetState,
    OpenVersion,
    Preload,
    Shutdown,
    StepOutput,
    Submit,
    ToEngine,
)

_JOB_WAIT_SECONDS = 0.0005
_DEVICE_WAIT_SECONDS = 150e-6
_RETRY_MILLISECONDS = 1
_IDLE_MILLISECONDS = 1000


def serve(instance: EngineInstance, channel: Channel[ToEngine]) -> None:
    """Serve until the front end says Shutdown or is gone."""
    poller = select.poll()
    poller.register(instance.wake_fd, select.POLLIN)
    while True:
        try:
            for message in channel.receive():
                if isinstance(message, Shutdown):
                    return
                _take(instance, channel, message)
            output, failures = instance.engine.step()
            for failure in failures:
                channel.send(failure)
            if output != StepOutput():
                channel.send(output)
            channel.flush()
        except ChannelClosedError:
            return
        if instance.engine.must_look_again or not instance.engine.can_go_on:
            _sleep(instance, channel, poller)


def _take(instance: EngineInstance, channel: Channel[ToEngine], message: ToEngine) -> None:
    engine = instance.engine
    match message:
        case Submit():
            engine.submit(message)
        case Cancel():
            engine.cancel(message.number)
        case OpenVersion():
            engine.open_version(message.manifest, channel.take_descriptor(), pinned=message.pinned)
        case CloseVersion():
            engine.versions.close(message.version_id)
        case Evict():
            engine.versions.evict(message.version_id)
        case Preload():
            engine.versions.preload(message.version_id)
        case GetState():
            channel.send(instance.state(message.number))
        case _:
            raise ValueError(f"{type(message).__name__} is not expected here")


def _sleep(instance: EngineInstance, channel: Channel[ToEngine], poller: select.poll) -> None:
    poller.register(channel.fileno(), select.POLLIN | (select.POLLOUT if channel.has_unsent else 0))
    wait_for_work(instance, poller, _IDLE_MILLISECONDS)


def wait_for_work(instance: EngineInstance, poller: select.poll, idle_milliseconds: int) -> None:
    """Sleep until a landing, a worker's reply or change of state, or what else ``poller`` watches besides ``wake_fd``;
    only for a moment if the device is waited for, which wakes nobody. With nothing to do ``idle_milliseconds`` at most.
    """
    engine: Engine = instance.engine
    jobs = [job for job in (item.job for item in engine.passes) if job is not None]
    if jobs and instance.bridge.wait(jobs, _JOB_WAIT_SECONDS):
        return
    if jobs:
        timeout = 0
    elif engine.must_look_again:
        engine.await_device(_DEVICE_WAIT_SECONDS)
        timeout = 0
    elif engine.passes or instance.bridge.orphans:
        timeout = _RETRY_MILLISECONDS
    else:
        timeout = idle_milliseconds
    for fileno, _ in poller.poll(timeout):
        if fileno == instance.wake_fd:
            os.eventfd_read(instance.wake_fd)
