"""One streamed answer, and where its time went."""

from __future__ import annotations

import argparse

from segue import Client


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="localhost:50051", metavar="HOST:PORT")
    parser.add_argument("--adapter", default="pirate")
    parser.add_argument("prompt", nargs="?", default="Tell me about the sea.")
    arguments = parser.parse_args()

    with (
        Client(arguments.server) as client,
        client.generate(
            arguments.prompt, adapter=arguments.adapter, max_tokens=32, temperature=0.0, timeout=60, stream=True
        ) as stream,
    ):
        for chunk in stream:
            print(chunk.text, end="", flush=True)
    reply = stream.reply
    print(f"\n{reply.usage.completion_tokens} tokens, ended by {reply.finish_reason.value}")
    print(f"adapter from {reply.timing.tier.value}, first token after {reply.timing.ttft_seconds * 1e3:.1f} ms")


if __name__ == "__main__":
    main()
