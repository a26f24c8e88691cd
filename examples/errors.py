"""What errors look like, and how to handle them."""

from __future__ import annotations

import argparse

from segue import (
    AdapterNotFoundError,
    Client,
    DeadlineExceededError,
    EngineUnavailableError,
    InvalidRequestError,
    RetryPolicy,
    SegueError,
)


def invalid(client: Client) -> None:
    """Each field that is wrong is named."""
    try:
        client.generate("Hello", max_tokens=0, temperature=-1.0)
    except InvalidRequestError as error:
        for violation in error.violations:
            print(f"invalid: {violation.field}: {violation.description}")


def unknown_adapter(client: Client) -> None:
    try:
        client.generate("Hello", adapter="nobody")
    except AdapterNotFoundError as error:
        print(f"unknown adapter: {error}; there are {', '.join(info.name for info in client.adapters.list())}")


def too_slow(client: Client) -> None:
    """The timeout bounds the whole answer; what came before it is there all the same."""
    text = ""
    try:
        with client.generate(
            "Tell me about the sea.", max_tokens=2000, ignore_eos=True, temperature=0.0, timeout=0.25, stream=True
        ) as stream:
            for chunk in stream:
                text += chunk.text
    except DeadlineExceededError:
        print(f"too slow: {len(text)} characters had come")


def unreachable() -> None:
    """A request is sent again before it fails; the error of the attempt before is the cause of the last one."""
    policy = RetryPolicy(attempts=3, initial_backoff_seconds=0.1)
    with Client("localhost:1", retry=policy) as client:
        try:
            client.generate("Hello", timeout=5)
        except EngineUnavailableError as error:
            print(f"unreachable: {type(error).__name__}, after {type(error.__cause__).__name__}")


def anything(client: Client) -> None:
    """Every error is a SegueError with a stable reason, and the id under which the server's log knows the request."""
    try:
        client.generate("Hello", model="another-model", request_id="errors-example")
    except SegueError as error:
        print(f"any error: {error.code.name} {error.reason} of request {error.request_id}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--server", default="localhost:50051", metavar="HOST:PORT")
    arguments = parser.parse_args()
    with Client(arguments.server) as client:
        invalid(client)
        unknown_adapter(client)
        too_slow(client)
        anything(client)
    unreachable()


if __name__ == "__main__":
    main()
