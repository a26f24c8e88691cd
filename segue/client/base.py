"""What both clients share: all but waiting."""

from __future__ import annotations

import random as random_module
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any, Generic, Literal, TypeVar, Unpack, overload

import grpc

from segue.client.answer import GenerateJob
from segue.client.requests import GenerateOptions, Prompt
from segue.client.retry import DEFAULT_RETRY, Attempts, RetryPolicy
from segue.client.rpcs import Rpcs

_CHANNEL_OPTIONS = (
    ("grpc.max_receive_message_length", -1),
    # RetryPolicy alone decides what is sent again, so that an attempt is one RPC.
    ("grpc.enable_retries", 0),
    # By default gRPC waits a second and more between two connections, and what is sent meanwhile fails without trying.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 2000),
)

_Whole = TypeVar("_Whole")
_Stream = TypeVar("_Stream")
_Slept = TypeVar("_Slept")


class BaseClient(ABC, Generic[_Whole, _Stream, _Slept]):
    """A client whose ``generate`` gives a ``_Whole`` or a ``_Stream``, and whose ``sleep`` a ``_Slept``."""

    def __init__(
        self,
        target: str,
        *,
        credentials: grpc.ChannelCredentials | None = None,
        channel_options: Sequence[tuple[str, Any]] = (),
        retry: RetryPolicy = DEFAULT_RETRY,
        sleep: Callable[[float], _Slept] | None = None,
        clock: Callable[[], float] = time.monotonic,
        random: Callable[[], float] = random_module.random,
    ) -> None:
        """``target`` is ``host:port``. Without ``credentials`` the connection is plain text.

        ``retry`` says how often a call that failed is made again; see RetryPolicy. gRPC's own retries are off, and no
        call waits for a connection: while the server cannot be reached, each attempt fails at once. ``sleep``,
        ``clock`` and ``random`` are what pauses are made and timed with; tests put their own in place of
        time.sleep or asyncio.sleep, time.monotonic and random.random.
        """
        options = (*_CHANNEL_OPTIONS, *channel_options)
        module = self._grpc_module()
        if credentials is None:
            self._channel = module.insecure_channel(target, options)
        else:
            self._channel = module.secure_channel(target, credentials, options)
        self._rpcs = Rpcs(self._channel)
        self._retry = retry
        self._sleep: Callable[[float], _Slept] = sleep or self._default_sleep
        self._clock = clock
        self._random = random

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: Literal[False] = False,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> _Whole: ...

    @overload
    def generate(
        self,
        prompt: Prompt,
        *,
        stream: Literal[True],
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> _Stream: ...

    def generate(
        self,
        prompt: Prompt,
        *,
        stream: bool = False,
        timeout: float | None = None,
        **options: Unpack[GenerateOptions],
    ) -> _Whole | _Stream:
        """Generate an answer: the whole of it, or with ``stream=True`` piece by piece.

        ``prompt`` is text, token ids or chat messages. ``timeout`` bounds the whole answer in seconds, with all
        attempts and the pauses between them. A stream is sent at once. A request that failed is sent again as the
        client's RetryPolicy says, but only if no chunk has come: a server that had accepted it and died then counts.
        Raises InvalidRequestError for values that cannot be sent, TypeError for unknown options.
        """
        job = GenerateJob(prompt, options, self._attempts(timeout))
        return self._stream(job) if stream else self._whole(job)

    def _attempts(self, timeout: float | None) -> Attempts:
        return Attempts(self._retry, timeout, random=self._random, clock=self._clock)

    @staticmethod
    @abstractmethod
    def _grpc_module() -> Any:
        """grpc or grpc.aio."""

    @staticmethod
    @abstractmethod
    def _default_sleep(seconds: float, /) -> _Slept: ...

    @abstractmethod
    def _stream(self, job: GenerateJob) -> _Stream: ...

    @abstractmethod
    def _whole(self, job: GenerateJob) -> _Whole: ...
