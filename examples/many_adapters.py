"""One prompt to every adapter of the server at once, with a bounded number of requests in flight."""

from __future__ import annotations

import argparse
import asyncio

from segue import AsyncClient, Reply


async def ask_all(server: str, prompt: str, in_flight: int) -> None:
    slots = asyncio.Semaphore(in_flight)
    async with AsyncClient(server) as client:

        async def ask(adapter: str) -> tuple[str, Reply]:
            async with slots:
                reply = await client.generate(prompt, adapter=adapter, max_tokens=24, temperature=0.0, timeout=60)
            return adapter, reply

        names = [info.name for info in await client.adapters.list(timeout=20) if not info.problem]
        for answer in asyncio.as_completed([ask(name) for name in names]):
            adapter, reply = await answer
            timing = reply.timing
            print(f"{adapter:8} TTFT {timing.ttft_seconds * 1e3:7.1f} ms from {timing.tier.value:6} {reply.text!r}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="localhost:50051", metavar="HOST:PORT")
    parser.add_argument("--in-flight", type=int, default=4, help="the most requests at once")
    parser.add_argument("prompt", nargs="?", default="Tell me about the fox.")
    arguments = parser.parse_args()
    asyncio.run(ask_all(arguments.server, arguments.prompt, arguments.in_flight))


if __name__ == "__main__":
    main()
