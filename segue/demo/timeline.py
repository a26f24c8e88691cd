"""Draws a request's time line from the events that the server recorded and sent with the reply."""

from __future__ import annotations

from rich.text import Text

from segue.types import LayerTiming, LoraSource, Timing

_SOURCE_STYLES = {LoraSource.CPU: "bold yellow", LoraSource.DEVICE: "bold green"}
_SOURCE_MARKS = {LoraSource.CPU: "C", LoraSource.DEVICE: "D"}
_LANDED_MARK = "▼"


def span_seconds(timing: Timing) -> float:
    """The length of an axis from a request's arrival that all events of its first prefill fit on."""
    events = [timing.ttft_seconds, *(layer.end_seconds for layer in timing.layers)]
    events += [layer.landed_seconds for layer in timing.layers if layer.landed_seconds is not None]
    return max(events)


def layer_line(layer: LayerTiming, axis_seconds: float, columns: int) -> Text:
    """One layer's row: C or D from its start to its end, and a mark where its weights landed on the device.

    Every layer shows at least one letter, however short it ran.
    """
    cells = [("·", "dim")] * columns

    def column(seconds: float) -> int:
        return min(columns - 1, max(0, int(seconds / axis_seconds * columns)))

    if layer.landed_seconds is not None:
        cells[column(layer.landed_seconds)] = (_LANDED_MARK, "cyan")
    first, last = column(layer.start_seconds), column(layer.end_seconds)
    for position in range(first, last + 1):
        cells[position] = (_SOURCE_MARKS.get(layer.source, "?"), _SOURCE_STYLES.get(layer.source, ""))
    line = Text(f"  layer {layer.layer:2d} ")
    for mark, style in cells:
        line.append(mark, style)
    landed = "not landed" if layer.landed_seconds is None else f"landed {layer.landed_seconds * 1e3:6.0f} ms"
    line.append(f"  {layer.source.value:6s} ends {layer.end_seconds * 1e3:6.0f} ms, {landed}", "dim")
    return line


def verdict(timing: Timing) -> str:
    """One sentence on what the events say about this cold start."""
    landed = [layer.landed_seconds for layer in timing.layers]
    if not timing.layers:
        return "base model: no adapter was needed"
    handover = timing.handover_layer
    if timing.cpu_layers == 0:
        how = "every layer had landed when the prefill reached it"
    elif handover is None:
        how = f"all {timing.cpu_layers} layers of the prefill ran on the CPU"
    else:
        how = f"{timing.cpu_layers} layers on the CPU, hand-over to the device at layer {handover}"
    first = f"first token after {timing.ttft_seconds * 1e3:.0f} ms"
    known = [seconds for seconds in landed if seconds is not None]
    if timing.cpu_layers and len(known) == len(landed):
        only = "only " if max(known) > timing.ttft_seconds else ""
        return f"{how}; {first}; the whole adapter had landed {only}after {max(known) * 1e3:.0f} ms"
    return f"{how}; {first}"
