"""``segue generate``: one answer, as it is made."""

from __future__ import annotations

from typing import Annotated

import typer

from segue.cli.common import DEFAULT_SERVER, ServerOption, one_line_errors
from segue.client import Client
from segue.types import Message, Reply, Tier


def register(app: typer.Typer) -> None:
    app.command(name="generate")(generate)


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    adapter: Annotated[str | None, typer.Option(help="The adapter; without it the base model answers.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the text as a user's chat message.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens of the answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False,
    timeout: Annotated[float | None, typer.Option(help="The most seconds to wait for the whole answer.")] = None,
    timing: Annotated[bool, typer.Option(help="Tell where the time went, on standard error.")] = True,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Generate an answer and print it as it is made."""
    with (
        one_line_errors(),
        Client(server) as client,
        client.generate(
            [Message(role="user", content=prompt)] if chat else prompt,
            adapter=adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            ignore_eos=ignore_eos or None,
            timeout=timeout,
            stream=True,
        ) as stream,
    ):
        for chunk in stream:
            typer.echo(chunk.text, nl=False)
        typer.echo()
        if timing:
            typer.echo(describe(stream.reply), err=True)


def describe(reply: Reply) -> str:
    """One line on how a request was served."""
    timing = reply.timing
    parts = [f"{reply.usage.completion_tokens} tokens", f"first after {timing.ttft_seconds * 1e3:.1f} ms"]
    if timing.tpot_seconds is not None:
        parts.append(f"then {timing.tpot_seconds * 1e3:.1f} ms each")
    if timing.tier is not Tier.NONE:
        parts.append(f"adapter version {reply.adapter_version} from {timing.tier.value}")
    if timing.cpu_layers:
        parts.append(f"{timing.cpu_layers} of {len(timing.layers)} layers on the CPU")
    return ", ".join(parts)
