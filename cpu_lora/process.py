"""What a helper process asks of the kernel: die with its parent, carry a name."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_NAME = 15


def _prctl(option: int, argument: object) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(option, argument, 0, 0, 0) != 0:
        error = ctypes.get_errno()
        raise OSError(error, os.strerror(error))


def die_with_parent(parent_pid: int) -> None:
    """SIGKILL this process when the thread that started it ends. Ends it at once if ``parent_pid`` has already gone."""
    _prctl(_PR_SET_PDEATHSIG, ctypes.c_ulong(signal.SIGKILL))
    if os.getppid() != parent_pid:
        os._exit(1)


def set_process_name(name: str) -> None:
    """Show ``name`` (15 bytes at most) in ps and top."""
    _prctl(_PR_SET_NAME, ctypes.c_char_p(name.encode()[:15]))
