"""``python -m segue.engine --channel-fd N``: one engine process, started by the front end with a socket it inherits."""

from __future__ import annotations

import argparse
import logging
import os
import resource
import select
import signal
import socket
import sys

from segue.cpu_lora.process import die_with_parent, set_process_name
from segue.engine.channel import Channel, ChannelClosedError
from segue.engine.messages import Shutdown, Start, StartFailed, ToEngine

_PROGRESS_SECONDS = 0.1


def main() -> int:
    """Serve until the front end ends; 1 when the engine could not start."""
    parser = argparse.ArgumentParser(prog="segue-engine")
    parser.add_argument("--channel-fd", type=int, required=True)
    arguments = parser.parse_args()
    os.set_inheritable(arguments.channel_fd, False)
    die_with_parent(os.getppid())
    set_process_name("segue-engine")
    _raise_descriptor_limit()
    # A terminal sends Ctrl-C to the whole group; the front end decides when the engine ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s segue-engine: %(message)s")
    channel: Channel[ToEngine] = Channel(socket.socket(fileno=arguments.channel_fd), ToEngine)
    try:
        return _run(channel)
    except ChannelClosedError:
        return 0
    finally:
        channel.close()


def _raise_descriptor_limit() -> None:
    """Every known adapter version holds its weights file open."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _run(channel: Channel[ToEngine]) -> int:
    start = _first_message(channel)
    if isinstance(start, Shutdown):
        return 0
    if not isinstance(start, Start):
        raise ValueError(f"the first message must be Start, is {type(start).__name__}")
    from segue.config import ConfigError
    from segue.engine.instance import EngineInstance
    from segue.engine.interpreter import settle_interpreter
    from segue.engine.loop import serve
    from segue.engine.progress import Throttle

    try:
        instance = EngineInstance.build(start.config, Throttle(channel.send, _PROGRESS_SECONDS))
    except ChannelClosedError:
        raise
    except ConfigError as error:
        channel.send(StartFailed(str(error)))
        return 1
    except (OSError, ValueError, MemoryError) as error:
        logging.exception("the engine cannot start")
        channel.send(StartFailed(f"{type(error).__name__}: {error}"))
        return 1
    with instance:
        settle_interpreter()
        channel.send(instance.ready())
        serve(instance, channel)
    return 0


def _first_message(channel: Channel[ToEngine]) -> ToEngine:
    while True:
        select.select([channel], [], [])
        messages = channel.receive()
        if messages:
            if len(messages) > 1:
                raise ValueError("messages were sent before the engine was ready")
            return messages[0]


if __name__ == "__main__":
    sys.exit(main())
