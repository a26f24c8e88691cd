"""``segue generate``: one answer as it is made, or several."""

from __future__ import annotations

from typing import Annotated

import typer

from segue.cli.common import DEFAULT_SERVER, ServerOption, one_line_errors
from segue.client import Client, GenerateStream
from segue.types import Message, Reply, Tier


def register(app: typer.Typer) -> None:
    app.command(name="generate")(generate)


def generate(
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    adapter: Annotated[str | None, typer.Option(help="The adapter; without it the base model answers.")] = None,
    chat: Annotated[bool, typer.Option("--chat", help="Send the text as a user's chat message.")] = False,
    max_tokens: Annotated[int | None, typer.Option(help="The most tokens of the answer.")] = None,
    temperature: Annotated[float | None, typer.Option(help="0 takes the most likely token.")] = None,
    top_p: Annotated[float | None, typer.Option(help="Draw from the likeliest tokens that add up to this.")] = None,
    top_k: Annotated[int | None, typer.Option(help="Draw from so many of the likeliest tokens.")] = None,
    min_p: Annotated[float | None, typer.Option(help="Drop tokens below this fraction of the likeliest one.")] = None,
    seed: Annotated[int | None, typer.Option(help="Makes the draws repeatable.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given more than once.")] = None,
    n: Annotated[int | None, typer.Option("--n", help="How many answers to generate.")] = None,
    presence_penalty: Annotated[float | None, typer.Option(help="Taken off tokens that the answer has.")] = None,
    frequency_penalty: Annotated[float | None, typer.Option(help="Taken off for each time it has them.")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="Divides tokens of prompt and answer.")] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Go on after the model's end token.")] = False,
    timeout: Annotated[float | None, typer.Option(help="The most seconds to wait for the whole answer.")] = None,
    timing: Annotated[bool, typer.Option(help="Tell where the time went, on standard error.")] = True,
    server: ServerOption = DEFAULT_SERVER,
) -> None:
    """Generate an answer and print it as it is made; several answers are printed at the end."""
    with (
        one_line_errors(),
        Client(server) as client,
        client.generate(
            [Message(role="user", content=prompt)] if chat else prompt,
            adapter=adapter,
            max_tokens=max_tokens,
            temperature=temperature,
            top_p=top_p,
            top_k=top_k,
            min_p=min_p,
            seed=seed,
            stop=stop,
            n=n,
            presence_penalty=presence_penalty,
            frequency_penalty=frequency_penalty,
            repetition_penalty=repetition_penalty,
            ignore_eos=ignore_eos or None,
            timeout=timeout,
            stream=True,
        ) as stream,
    ):
        print_answers(stream, several=n is not None and n > 1)
        if timing:
            for reply in (stream.reply, *stream.reply.alternatives):
                typer.echo(describe(reply), err=True)


def print_answers(stream: GenerateStream, *, several: bool) -> None:
    """One answer as it is made, several under headings once they are whole."""
    for chunk in stream:
        if not several:
            typer.echo(chunk.text, nl=False)
    if not several:
        typer.echo()
        return
    for index, reply in enumerate((stream.reply, *stream.reply.alternatives)):
        typer.echo(f"== answer {index} ==")
        typer.echo(reply.text)


def describe(reply: Reply) -> str:
    """One line on how an answer was served."""
    timing = reply.timing
    usage = reply.usage
    parts = [f"{usage.completion_tokens} tokens", f"first after {timing.ttft_seconds * 1e3:.1f} ms"]
    if timing.tpot_seconds is not None:
        parts.append(f"then {timing.tpot_seconds * 1e3:.1f} ms each")
    if usage.cached_prompt_tokens:
        parts.append(f"{usage.cached_prompt_tokens} of {usage.prompt_tokens} prompt tokens from the prefix cache")
    if timing.tier is not Tier.NONE:
        parts.append(f"adapter version {reply.adapter_version} from {timing.tier.value}")
    if timing.cpu_layers:
        parts.append(f"{timing.cpu_layers} of {len(timing.layers)} layers on the CPU")
    return ", ".join(parts)
