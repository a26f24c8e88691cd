"""How a part of a layer comes from its file into the host store: every value of it is finite when it is there."""

from __future__ import annotations

import os

import torch
from torch import Tensor

from segue.engine.lora.file_runs import RUN_LONGS, ReadRuns, Target
from segue.engine.lora.host_plan import HostPlan, PlannedTensor
from segue.engine.lora.read_parts import ReadPart
from segue.engine.lora.transfer import ReadJob, WeightsError

FILE_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


def file_dtype(dtype: torch.dtype) -> str:
    """The name by which safetensors calls a dtype."""
    return next(name for name, known in FILE_DTYPES.items() if known is dtype)


class PartReader:
    """Reads into ``host``, the host store as uint8 [bytes], in ``dtype``; used from one thread."""

    def __init__(self, host: Tensor, dtype: torch.dtype, read_runs: ReadRuns) -> None:
        self._host = host
        self._dtype = dtype
        self._target = Target.of(host, dtype)
        self._read_runs = read_runs
        self._scratch = torch.empty(0, dtype=torch.uint8)

    def read(self, job: ReadJob, part: ReadPart) -> None:
        """Raises WeightsError and OSError."""
        if part.converted is not None:
            self._convert(job, part, part.converted)
            return
        done = self._read_runs(self._target, job.descriptor, part.runs, job.copy_offset)
        if done < part.size_bytes:
            self._read_rest(job, part, done)

    def _read_rest(self, job: ReadJob, part: ReadPart, done: int) -> None:
        """Go on where the fast way ended: a read brought less than it might, nothing, or what is not finite."""
        for index in range(0, len(part.runs), RUN_LONGS):
            file_offset, start, size = part.runs[index : index + RUN_LONGS].tolist()
            if done >= size:
                done -= size
                continue
            begin = job.copy_offset + start
            buffer = self._target.octets.data[begin + done : begin + size]
            _read_all(job, buffer, file_offset + done)
            self._check(job, begin, size)
            done = 0

    def _convert(self, job: ReadJob, part: ReadPart, tensor: PlannedTensor) -> None:
        size = tensor.span.nbytes
        if self._scratch.numel() < size:
            self._scratch = torch.empty(size, dtype=torch.uint8)
        done = self._read_runs(Target.of(self._scratch, None), job.descriptor, part.runs, 0)
        _read_all(job, self._scratch.numpy().data[done:size], tensor.span.file_offset + done)
        begin = job.copy_offset + tensor.host_start
        place = self._host[begin : begin + tensor.host_bytes].view(self._dtype)
        place.copy_(self._scratch[:size].view(FILE_DTYPES[tensor.span.dtype]))
        self._check(job, begin, tensor.host_bytes)

    def _check(self, job: ReadJob, begin: int, size: int) -> None:
        """Raise WeightsError for these bytes of the host store if one of their values is not finite."""
        place = self._target.not_finite(begin, size)
        if place is not None:
            label = tensor_at(job.plan, place - job.copy_offset).label
            name = str(self._dtype).removeprefix("torch.")
            raise WeightsError(f"{label} holds NaN or infinite values in {name}")


def _read_all(job: ReadJob, buffer: memoryview, offset: int) -> None:
    done = 0
    while done < len(buffer):
        count = os.preadv(job.descriptor, [buffer[done:]], offset + done)
        if count == 0:
            label = _tensor_in_file(job.plan, offset + done).label
            raise WeightsError(f"the weights file is truncated: it ends within {label}")
        done += count


def tensor_at(plan: HostPlan, place: int) -> PlannedTensor:
    """The matrix that has this byte of the host copy."""
    return next(
        tensor for tensor in plan.tensors() if tensor.host_start <= place < tensor.host_start + tensor.host_bytes
    )


def _tensor_in_file(plan: HostPlan, offset: int) -> PlannedTensor:
    return next(tensor for tensor in plan.tensors() if 0 <= offset - tensor.span.file_offset < tensor.span.nbytes)
