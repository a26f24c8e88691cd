"""A CPU LoRA worker process: forked by the zygote, it serves its shares until it is killed."""

from __future__ import annotations

import os

from segue.cpu_lora.atomics import publish
from segue.cpu_lora.kernels import Scratch
from segue.cpu_lora.layout import LINE_BYTES, WORKER_PID, WORKER_READY
from segue.cpu_lora.memory import SharedMemory
from segue.cpu_lora.process import set_process_name
from segue.cpu_lora.serve import present_requests, serve_while_armed


def run_worker(memory: SharedMemory, worker: int, generation: int, core: int, wake_fd: int) -> None:
    """Serve as ``worker``, never returning unless the wake file is gone.

    Args:
        memory: the mapping shared with the engine.
        worker: index of this worker.
        generation: which life of this worker this is; shares of another life are ignored.
        core: core to run on, or -1 for any.
        wake_fd: eventfd that the engine writes when it arms the workers.
    """
    set_process_name(f"segue-worker-{worker}")
    if core >= 0:
        os.sched_setaffinity(0, {core})
    geometry = memory.layout.geometry()
    words = memory.words
    scratch = Scratch.allocate()
    seen = present_requests(words, geometry)
    own = geometry.worker_word + worker * (LINE_BYTES // 4)
    publish(words, own + WORKER_PID, os.getpid())
    publish(words, own + WORKER_READY, generation)
    while True:
        serve_while_armed(
            words,
            memory.longs,
            memory.doubles,
            memory.floats,
            memory.halves,
            geometry,
            worker,
            generation,
            core < 0,
            seen,
            scratch,
        )
        # Arming sets the word before it writes here, so a wake-up between the look at the word and this read is kept.
        os.eventfd_read(wake_fd)
