"""A conversation of several turns with an adapter: each request carries the whole conversation."""

from __future__ import annotations

import argparse
from collections.abc import Iterator

from segue import Client, Message


def typed_turns() -> Iterator[str]:
    """What the user types, until an empty line."""
    while turn := input("> "):
        yield turn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="localhost:50051", metavar="HOST:PORT")
    parser.add_argument("--adapter", default="yoda")
    parser.add_argument("--type", action="store_true", help="type the turns yourself")
    arguments = parser.parse_args()

    turns = typed_turns() if arguments.type else iter(["Tell me about the fox.", "And the sea?"])
    messages: list[Message] = []
    with Client(arguments.server) as client:
        for turn in turns:
            messages.append(Message(role="user", content=turn))
            reply = client.generate(messages, adapter=arguments.adapter, max_tokens=48, temperature=0.0, timeout=60)
            messages.append(Message(role="assistant", content=reply.text))
            print(f"user: {turn}\n{arguments.adapter}: {reply.text.strip()}")


if __name__ == "__main__":
    main()
