"""The zygote: a small process that has loaded the compiled kernels and forks CPU LoRA workers on request.

It holds nothing of CUDA, gRPC or torch and runs one thread, so forking it is safe and takes milliseconds. It ends when
its control socket closes or the thread that started it ends, and its workers end with it.
"""

from __future__ import annotations

import argparse
import gc
import os
import select
import signal
import socket
import struct
import sys
import traceback

from segue.cpu_lora.memory import SharedMemory
from segue.cpu_lora.process import die_with_parent, set_process_name

# Fork worker `worker` as generation `generation` on core `core` (-1: any).
FORK_REQUEST = struct.Struct("=IIi")
# Worker, generation, process id (-1: the fork failed); a pidfd of the process comes with it.
FORK_REPLY = struct.Struct("=IIi")


def _reap_children() -> None:
    while True:
        try:
            pid, _ = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return


class Zygote:
    """Serves fork requests on ``control`` until its other end closes."""

    def __init__(self, control: socket.socket, memory: SharedMemory, wake_fds: list[int]) -> None:
        self._control = control
        self._memory = memory
        self._wake_fds = wake_fds
        # A handler is needed for the signal to reach the wake-up descriptor; children are reaped in the loop alone, so
        # that none vanishes between its fork and the opening of its pidfd.
        self._signal_read, self._signal_write = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(self._signal_write)
        signal.signal(signal.SIGCHLD, lambda _number, _frame: None)

    def serve(self) -> None:
        """Fork and reap until the control socket closes."""
        poller = select.poll()
        poller.register(self._control, select.POLLIN)
        poller.register(self._signal_read, select.POLLIN)
        while True:
            ready = {fd for fd, _ in poller.poll()}
            if self._signal_read in ready:
                os.read(self._signal_read, 4096)
                _reap_children()
            if self._control.fileno() in ready:
                request = self._control.recv(FORK_REQUEST.size)
                if not request:
                    return
                self._fork(*FORK_REQUEST.unpack(request))

    def _fork(self, worker: int, generation: int, core: int) -> None:
        zygote_pid = os.getpid()
        try:
            pid = os.fork()
        except OSError as error:
            print(f"segue-zygote: cannot fork worker {worker}: {error}", file=sys.stderr)  # noqa: T201
            self._control.send(FORK_REPLY.pack(worker, generation, -1))
            return
        if pid == 0:
            self._become_worker(zygote_pid, worker, generation, core)
        pidfd = os.pidfd_open(pid)
        try:
            socket.send_fds(self._control, [FORK_REPLY.pack(worker, generation, pid)], [pidfd])
        finally:
            os.close(pidfd)

    def _become_worker(self, zygote_pid: int, worker: int, generation: int, core: int) -> None:
        """In the forked child: never returns."""
        try:
            die_with_parent(zygote_pid)
            signal.set_wakeup_fd(-1)
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            self._control.close()
            for fd in (self._signal_read, self._signal_write):
                os.close(fd)
            # Only here: the kernels were compiled when the zygote imported them.
            from segue.cpu_lora.worker import run_worker

            run_worker(self._memory, worker, generation, core, self._wake_fds[worker])
        except BaseException:  # noqa: BLE001 (nothing may unwind into the zygote's frames)
            traceback.print_exc()
        finally:
            os._exit(1)


def main(arguments: list[str] | None = None) -> None:
    """Entry point of ``python -m segue.cpu_lora.zygote``; its arguments are inherited descriptors."""
    parser = argparse.ArgumentParser(prog="segue-zygote")
    parser.add_argument("--parent-pid", type=int, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--memory-fd", type=int, required=True)
    parser.add_argument("--wake-fds", type=int, nargs="*", default=[])
    options = parser.parse_args(arguments)
    die_with_parent(options.parent_pid)
    set_process_name("segue-zygote")
    control = socket.socket(fileno=options.control_fd)
    memory = SharedMemory.attach(options.memory_fd)
    import segue.cpu_lora.worker  # noqa: F401 (compiles or loads the kernels before the first fork)

    gc.freeze()
    Zygote(control, memory, options.wake_fds).serve()


if __name__ == "__main__":
    main()
