"""Messages that travel together, over a socket that takes them at once and over one that does not."""

from __future__ import annotations

import select
import socket
from collections.abc import Iterator

import pytest

from segue.engine.channel import Channel, ChannelClosedError
from segue.engine.messages import Cancel, GetState, ToEngine

Pair = tuple[Channel[ToEngine], Channel[ToEngine]]


@pytest.fixture
def pair() -> Iterator[Pair]:
    ours, theirs = (Channel[ToEngine](end, ToEngine) for end in socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


def test_messages_sent_together_arrive_in_one_piece_and_in_order(pair: Pair) -> None:
    ours, theirs = pair
    ours.send(GetState(7))
    messages = [Cancel(number) for number in range(300)]
    ours.send_together(messages)
    assert not ours.has_unsent
    assert theirs.receive() == [GetState(7), *messages]


def test_more_than_the_socket_takes_arrives_in_order(pair: Pair) -> None:
    ours, theirs = pair
    messages = [Cancel(number) for number in range(50_000)]
    ours.send_together(messages)
    ours.send(GetState(7))
    assert ours.has_unsent
    received: list[ToEngine] = []
    while len(received) <= len(messages):
        select.select([theirs], [], [], 5)
        received += theirs.receive()
        ours.flush()
    assert received == [*messages, GetState(7)]


def test_a_peer_that_is_gone_is_told_of(pair: Pair) -> None:
    ours, theirs = pair
    theirs.close()
    with pytest.raises(ChannelClosedError):
        ours.send_together([Cancel(1), Cancel(2)])
