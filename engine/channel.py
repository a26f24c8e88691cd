"""One end of the socket pair between front end and engine: length-prefixed msgpack frames and file descriptors."""

from __future__ import annotations

import array
import os
import socket
import struct
from collections import deque
from collections.abc import Iterable
from typing import Any, Generic, TypeVar

import msgspec

_HEADER = struct.Struct("<I")
_RECEIVE_BYTES = 1 << 16
_MAX_DESCRIPTORS = 16

_Message = TypeVar("_Message")


class ChannelClosedError(ConnectionError):
    """The other process has closed its end or has died."""


class Channel(Generic[_Message]):
    """A non-blocking end. ``send`` queues, ``flush`` writes what the socket takes, ``receive`` returns whole messages.

    File descriptors keep the order of the messages they were sent with: the receiver of a message that carries one
    calls ``take_descriptor`` once for it. Not safe for use by two threads at once.
    """

    def __init__(self, sock: socket.socket, receives: Any) -> None:
        """``receives`` is the union of message types that may come in."""
        sock.setblocking(False)
        self._socket = sock
        self._encoder = msgspec.msgpack.Encoder()
        self._decoder: msgspec.msgpack.Decoder[_Message] = msgspec.msgpack.Decoder(receives)
        self._outgoing: deque[tuple[memoryview, int | None]] = deque()
        self._incoming = bytearray()
        self._descriptors: deque[int] = deque()
        self._closed_by_peer = False

    def fileno(self) -> int:
        return self._socket.fileno()

    @property
    def has_unsent(self) -> bool:
        """Whether ``flush`` has more to write when the socket becomes writable."""
        return bool(self._outgoing)

    def send(self, message: Any, descriptor: int | None = None) -> None:
        """Queue a message and try to write it. ``descriptor`` is duplicated and travels with it.

        Raises ChannelClosedError when the peer is gone.
        """
        frame = self._frame(message)
        copy = None if descriptor is None else os.dup(descriptor)
        self._outgoing.append((memoryview(frame), copy))
        self.flush()

    def send_together(self, messages: Iterable[Any]) -> None:
        """Queue messages in one piece: unless they are too long for the socket, the peer receives all of them at once.

        Raises ChannelClosedError when the peer is gone.
        """
        self._outgoing.append((memoryview(b"".join(map(self._frame, messages))), None))
        self.flush()

    def flush(self) -> None:
        """Write queued frames until the socket would block. Raises ChannelClosedError when the peer is gone."""
        while self._outgoing:
            frame, descriptor = self._outgoing[0]
            try:
                if descriptor is None:
                    written = self._socket.send(frame, socket.MSG_NOSIGNAL)
                else:
                    written = socket.send_fds(self._socket, [frame], [descriptor], socket.MSG_NOSIGNAL)
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError) as error:
                raise ChannelClosedError("the peer process is gone") from error
            if descriptor is not None:
                os.close(descriptor)
            if written == len(frame):
                self._outgoing.popleft()
            else:
                self._outgoing[0] = (frame[written:], None)

    def receive(self) -> list[_Message]:
        """All whole messages that have arrived, without waiting.

        Raises ChannelClosedError when the peer is gone and nothing whole is left.
        """
        self._read_available()
        messages = []
        start = 0
        while len(self._incoming) - start >= _HEADER.size:
            (length,) = _HEADER.unpack_from(self._incoming, start)
            stop = start + _HEADER.size + length
            if len(self._incoming) < stop:
                break
            messages.append(self._decoder.decode(self._incoming[start + _HEADER.size : stop]))
            start = stop
        del self._incoming[:start]
        if self._closed_by_peer and not messages:
            raise ChannelClosedError("the peer process is gone")
        return messages

    def take_descriptor(self) -> int:
        """The next file descriptor that came with a message; the caller owns it."""
        return self._descriptors.popleft()

    def close(self) -> None:
        """Close the socket and every descriptor that nobody took."""
        for _, descriptor in self._outgoing:
            if descriptor is not None:
                os.close(descriptor)
        for descriptor in self._descriptors:
            os.close(descriptor)
        self._outgoing.clear()
        self._descriptors.clear()
        self._socket.close()

    def _frame(self, message: Any) -> bytes:
        body = self._encoder.encode(message)
        return _HEADER.pack(len(body)) + body

    def _read_available(self) -> None:
        ancillary_bytes = socket.CMSG_SPACE(_MAX_DESCRIPTORS * array.array("i").itemsize)
        while not self._closed_by_peer:
            try:
                data, ancillary, _, _ = self._socket.recvmsg(_RECEIVE_BYTES, ancillary_bytes, socket.MSG_CMSG_CLOEXEC)
            except BlockingIOError:
                return
            except ConnectionResetError:
                data, ancillary = b"", []
            for level, kind, payload in ancillary:
                if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                    descriptors = array.array("i")
                    descriptors.frombytes(payload[: len(payload) - len(payload) % descriptors.itemsize])
                    self._descriptors.extend(descriptors)
            if not data:
                self._closed_by_peer = True
            self._incoming += data
