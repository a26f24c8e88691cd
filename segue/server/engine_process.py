"""Starting the engine's process and making sure that nothing of it remains."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
from collections.abc import Sequence

from segue.engine.channel import Channel
from segue.engine.messages import ToFrontEnd

ENGINE_COMMAND = (sys.executable, "-m", "segue.engine")
_STDERR = 2


class EngineProcess:
    """A child process that leads its own process group, and this side's end of its socket.

    Closing the channel tells the engine to end. Create it on the thread of the event loop: the engine asks the kernel
    to be killed when the thread that created it ends.
    """

    def __init__(self, process: asyncio.subprocess.Process, channel: Channel[ToFrontEnd]) -> None:
        self._process = process
        self.channel = channel

    @property
    def pid(self) -> int:
        return self._process.pid

    @classmethod
    async def spawn(cls, command: Sequence[str]) -> EngineProcess:
        """Run ``command --channel-fd N``, where N is the engine's end of a socket pair. Raises OSError."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            with theirs:
                process = await asyncio.create_subprocess_exec(
                    *command,
                    "--channel-fd",
                    str(theirs.fileno()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=_STDERR,
                    pass_fds=(theirs.fileno(),),
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        return cls(process, Channel(ours, ToFrontEnd))

    async def end(self, stop_seconds: float) -> int:
        """Close the channel, wait ``stop_seconds`` for the engine, kill what is left of its group; its exit status."""
        self.channel.close()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), stop_seconds)
        # The group outlives its leader if a worker hangs; its number is not reused while it has a member.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        return await self._process.wait()
