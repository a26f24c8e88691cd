"""The engine's side of the zygote: start it, ask it for workers, receive their pidfds."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from segue.cpu_lora.zygote import FORK_REPLY, FORK_REQUEST

# The zygote must stay single-threaded, or forking it would not be safe.
_ONE_THREAD = dict.fromkeys(("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


@dataclass(frozen=True, slots=True, kw_only=True)
class Forked:
    """A fork's outcome. ``pidfd`` belongs to the receiver; both are -1 when the fork failed."""

    worker: int
    generation: int
    pid: int
    pidfd: int


class ZygoteProcess:
    """A running zygote.

    It dies with the thread that makes this object (PR_SET_PDEATHSIG follows the parent thread), so that must be one
    that lives as long as the zygote is wanted.
    """

    def __init__(self, memory_fd: int, wake_fds: Sequence[int]) -> None:
        self._control, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        command = [sys.executable, "-m", "segue.cpu_lora.zygote", "--parent-pid", str(os.getpid())]
        command += ["--control-fd", str(theirs.fileno()), "--memory-fd", str(memory_fd)]
        command += ["--wake-fds", *map(str, wake_fds)]
        try:
            # Its own session: a terminal's interrupt must not reach the workers while the engine still drains.
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                pass_fds=(theirs.fileno(), memory_fd, *wake_fds),
                env=os.environ | _ONE_THREAD,
                start_new_session=True,
            )
        except BaseException:
            self._control.close()
            raise
        finally:
            theirs.close()

    @property
    def pid(self) -> int:
        """Process id of the zygote."""
        return self._process.pid

    def fileno(self) -> int:
        """The control socket: readable when a fork is done or the zygote has gone."""
        return self._control.fileno()

    def request_fork(self, worker: int, generation: int, core: int) -> None:
        """Ask for a worker; the answer comes by ``receive``. Raises OSError when the zygote has gone."""
        self._control.send(FORK_REQUEST.pack(worker, generation, core), socket.MSG_NOSIGNAL | socket.MSG_DONTWAIT)

    def receive(self) -> Forked | None:
        """The outcome of one fork request; None when the zygote has gone. Blocks: call it when readable."""
        try:
            message, fds, _, _ = socket.recv_fds(self._control, FORK_REPLY.size, 1)
        except ConnectionError:
            return None
        if not message:
            return None
        worker, generation, pid = FORK_REPLY.unpack(message)
        return Forked(worker=worker, generation=generation, pid=pid, pidfd=fds[0] if fds else -1)

    def close(self) -> None:
        """Kill and reap the zygote; its workers are killed by the kernel."""
        self._control.close()
        self._process.kill()
        self._process.wait()
