"""The demo itself: start a real server on the built-in model, send it a burst, show the streams and what happened."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from rich.columns import Columns
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from segue.client import Client
from segue.demo.timeline import layer_line, span_seconds, verdict
from segue.errors import EngineUnavailableError, SegueError
from segue.server.spawn import SpawnError, spawned_server
from segue.types import Reply, ServerInfo, Tier

ASSETS = Path(__file__).parent / "assets"
DEFAULT_PROMPT = "Tell me about the fox."
DEFAULT_LINK_BYTES_PER_SECOND = 4e6
DEFAULT_CPU_WORKERS = 2
_START_SECONDS = 120.0
_LANDING_SECONDS = 60.0
_MIN_AXIS_COLUMNS = 24
_LABEL_COLUMNS = 56
_PANEL_COLUMNS = 58
# Where an adapter is that has to come to the device first; how much of it had been read is a matter of milliseconds.
_COLD = (Tier.DISK, Tier.HOST)


class DemoError(Exception):
    """The demo could not be shown; the message is for the person at the terminal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoOptions:
    """``link_bytes_per_second`` throttles the way to the device, so that a cold start lasts long enough to be seen."""

    prompt: str = DEFAULT_PROMPT
    max_tokens: int = 120
    link_bytes_per_second: float = DEFAULT_LINK_BYTES_PER_SECOND
    cpu_workers: int = DEFAULT_CPU_WORKERS
    hot: tuple[str, ...] = ("polite", "brief")


@dataclass(slots=True, kw_only=True)
class Stream:
    """One request of the burst, filled by its own thread."""

    title: str
    adapter: str | None
    text: str = ""
    first_seconds: float | None = None
    reply: Reply | None = None
    error: SegueError | None = None
    started: float = field(default_factory=time.monotonic)

    def follow(self, client: Client, options: DemoOptions) -> None:
        """Send the request and collect its stream."""
        self.started = time.monotonic()
        try:
            with client.generate(
                options.prompt, adapter=self.adapter, max_tokens=options.max_tokens, timeout=120, stream=True
            ) as stream:
                for chunk in stream:
                    if self.first_seconds is None:
                        self.first_seconds = time.monotonic() - self.started
                    self.text += chunk.text
                self.reply = stream.reply
        except SegueError as error:
            self.error = error

    def panel(self) -> Panel:
        """The stream so far, framed: yellow while it waits, green when it has ended."""
        state = "waiting" if self.first_seconds is None else f"first token after {self.first_seconds * 1e3:.0f} ms"
        body = Text(f"failed: {self.error.message}", "red") if self.error else Text(self.text.strip())
        style = "red" if self.error else "green" if self.reply else "yellow"
        return Panel(body, title=self.title, subtitle=state, border_style=style, width=_PANEL_COLUMNS)


def run_demo(console: Console, options: DemoOptions) -> None:
    """Show everything. Raises DemoError when the server does not come up or a request fails."""
    voices: dict[str, str] = json.loads((ASSETS / "adapters.json").read_text())
    console.rule("[bold]Segue: one base model, many adapters, no cold starts")
    with _server(options) as address, Client(address) as client:
        info = client.info()
        _introduce(console, client, info, voices, options)
        _warm_up(console, client, options)
        streams = [Stream(title="base model", adapter=None)]
        streams += [
            Stream(title=f"{name} ({'hot' if name in options.hot else 'cold'})", adapter=name) for name in voices
        ]
        _burst(console, client, streams, options)
        failed = [stream for stream in streams if stream.reply is None]
        if failed:
            raise DemoError(f"{failed[0].title}: {failed[0].error}")
        _explain(console, streams)
        _again(console, client, streams, options)


@contextmanager
def _server(options: DemoOptions) -> Iterator[str]:
    """A server on a free port of this machine, with its CPU workers ready; yields its address."""
    engine = {
        "model_dir": str(ASSETS / "model"),
        "device": "cpu",
        "copy_bytes_per_second": options.link_bytes_per_second,
        "cpu_workers": options.cpu_workers,
    }
    table = {"adapters_dir": str(ASSETS / "adapters"), "engine": engine}
    try:
        with spawned_server(table, start_seconds=_START_SECONDS) as address:
            _wait_for_workers(address)
            yield address
    except SpawnError as error:
        raise DemoError(str(error)) from error


def _wait_for_workers(address: str) -> None:
    deadline = time.monotonic() + _START_SECONDS
    with Client(address) as client:
        while time.monotonic() < deadline:
            try:
                info = client.info()
            except EngineUnavailableError:
                info = None
            if info is not None and info.cpu_workers_ready == info.cpu_workers:
                return
            time.sleep(0.1)
    raise DemoError(f"the CPU workers are not ready after {_START_SECONDS:.0f} s")


def _introduce(
    console: Console, client: Client, info: ServerInfo, voices: dict[str, str], options: DemoOptions
) -> None:
    console.print(
        f"A real server runs on this machine: {info.layers} layers, device {info.device}, {info.dtype}, "
        f"{info.cpu_workers} CPU workers, {info.pages} pages of {info.page_tokens} tokens."
    )
    console.print(
        f"The link to the device is throttled to [bold]{options.link_bytes_per_second / 1e6:.1f} MB/s[/bold], for "
        "adapter weights and for the rows that the CPU workers exchange alike.\n"
    )
    table = Table("adapter", "rank", "modules", "weights", "at this link", "what it does")
    for adapter in client.adapters.list():
        table.add_row(
            adapter.name,
            str(adapter.rank),
            " ".join(name.removesuffix("_proj") for name in adapter.target_modules),
            f"{adapter.weight_bytes / 1e6:.2f} MB",
            f"{2 * adapter.weight_bytes / options.link_bytes_per_second:.2f} s",
            voices.get(adapter.name, ""),
        )
    console.print(table)
    console.print(
        "Weights are stored in 16 bits and travel in the model's float32, hence twice the bytes.\n", style="dim"
    )


def _warm_up(console: Console, client: Client, options: DemoOptions) -> None:
    """One request for each hot adapter: afterwards its weights are on the device."""
    for name in options.hot:
        client.generate(options.prompt, adapter=name, max_tokens=4, timeout=60)
    _wait_for_landing(client, options.hot)
    console.print(f"Hot from earlier requests: [bold]{', '.join(options.hot)}[/bold]. All others are on disk.\n")


def _wait_for_landing(client: Client, names: Iterable[str]) -> None:
    deadline = time.monotonic() + _LANDING_SECONDS
    while time.monotonic() < deadline:
        tiers = {adapter.name: adapter.tier for adapter in client.adapters.list()}
        if all(tiers[name] is Tier.DEVICE for name in names):
            return
        time.sleep(0.05)
    raise DemoError(f"the adapters did not reach the device within {_LANDING_SECONDS:.0f} s")


def _burst(console: Console, client: Client, streams: list[Stream], options: DemoOptions) -> None:
    """All requests at once, shown side by side while they stream."""
    console.print(f'{len(streams)} requests at once: [bold]"{options.prompt}"[/bold]')
    threads = [threading.Thread(target=stream.follow, args=(client, options), daemon=True) for stream in streams]
    for thread in threads:
        thread.start()
    if console.is_terminal:
        with Live(_panels(streams), console=console, refresh_per_second=12, transient=True) as live:
            while any(thread.is_alive() for thread in threads):
                live.update(_panels(streams))
                time.sleep(0.05)
    for thread in threads:
        thread.join()
    console.print(_panels(streams))


def _panels(streams: list[Stream]) -> RenderableType:
    return Columns([stream.panel() for stream in streams], padding=(0, 0))


def _explain(console: Console, streams: list[Stream]) -> None:
    """A time line for each cold request, from the events in its reply alone."""
    cold = [(stream, stream.reply) for stream in streams if stream.reply and stream.reply.timing.tier in _COLD]
    console.rule("[bold]Where the cold requests spent their time")
    console.print(
        Text.assemble(
            ("C", "bold yellow"),
            " layer computed with the CPU workers' deltas   ",
            ("D", "bold green"),
            " with the device's own   ",
            ("▼", "cyan"),
            " its weights landed on the device\n",
        )
    )
    for stream, reply in cold:
        timing = reply.timing
        axis_seconds = span_seconds(timing)
        columns = max(_MIN_AXIS_COLUMNS, console.width - _LABEL_COLUMNS)
        lines = [layer_line(layer, axis_seconds, columns) for layer in timing.layers]
        lines.append(Text(f"           0{f'{axis_seconds * 1e3:.0f} ms':>{columns - 1}}", "dim"))
        note = f", then {timing.cpu_tokens} tokens decoded with CPU help" if timing.cpu_tokens else ""
        console.print(Group(Text(f"{stream.title}: {verdict(timing)}{note}", "bold"), *lines, Text()))


def _again(console: Console, client: Client, streams: list[Stream], options: DemoOptions) -> None:
    """The same requests once more, now that every adapter is on the device: the measure of what a cold start cost."""
    _wait_for_landing(client, [stream.adapter for stream in streams if stream.adapter is not None])
    warm = [Stream(title=stream.title, adapter=stream.adapter) for stream in streams]
    threads = [threading.Thread(target=stream.follow, args=(client, options), daemon=True) for stream in warm]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    table = Table(
        "request", "tier", "first token", "layers on CPU", "last layer landed", "same burst, all warm", "same text"
    )
    same = True
    for before, after in zip(streams, warm, strict=True):
        if before.reply is None or after.reply is None:
            raise DemoError(f"{after.title}: {after.error}")
        timing = before.reply.timing
        landed = [layer.landed_seconds for layer in timing.layers if layer.landed_seconds is not None]
        landing = "-"
        if timing.tier in _COLD:
            whole = len(landed) == len(timing.layers)
            landing = f"{max(landed) * 1e3:.0f} ms" if whole else "after the answer"
        equal = before.reply.token_ids == after.reply.token_ids
        same = same and equal
        table.add_row(
            before.title,
            timing.tier.value,
            f"{timing.ttft_seconds * 1e3:.0f} ms",
            f"{timing.cpu_layers} of {len(timing.layers)}" if timing.layers else "-",
            landing,
            f"{after.reply.timing.ttft_seconds * 1e3:.0f} ms",
            "yes" if equal else "NO",
        )
    console.rule("[bold]What a cold start cost")
    console.print(table)
    console.print(
        '"last layer landed": a server that loads an adapter before it runs begins the prefill only then. '
        "The rows of the CPU workers took their part of the link in this run.",
        style="dim",
    )
    if not same:
        raise DemoError("a warm answer differs from the cold one")
