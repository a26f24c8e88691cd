"""Building requests and reading answers: shared by every client, whatever carries the messages."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from enum import Enum
from typing import Any, Protocol, TypedDict, TypeVar

from segue.errors import InternalError, InvalidRequestError
from segue.types import (
    SLO,
    AdapterInfo,
    Chunk,
    FinishReason,
    LayerTiming,
    LoraSource,
    Message,
    Reply,
    ServerInfo,
    Tier,
    Timing,
    TokenLogprob,
    Usage,
)
from segue.v1 import adapters_pb2, generation_pb2, server_pb2

Prompt = str | Sequence[int] | Sequence[Message | Mapping[str, str]]
"""Text, token ids, or chat messages: ``Message`` or mappings with "role" and "content"."""

_Enum = TypeVar("_Enum", bound=Enum)


class GenerateOptions(TypedDict, total=False):
    """What a request may say besides its prompt. None and absent leave the server's default.

    ``adapter`` names the adapter, and ``adapter_version`` one version of it; without an adapter the base model
    answers. ``request_id`` names the request for Abort; without one a fresh id is made. The sampling values are those
    of SamplingParams in generation.proto.
    """

    adapter: str | None
    adapter_version: str | None
    model: str | None
    request_id: str | None
    slo: SLO | None
    priority: int | None
    temperature: float | None
    top_p: float | None
    top_k: int | None
    min_p: float | None
    seed: int | None
    max_tokens: int | None
    min_tokens: int | None
    stop: Sequence[str] | None
    stop_token_ids: Sequence[int] | None
    ignore_eos: bool | None
    presence_penalty: float | None
    frequency_penalty: float | None
    repetition_penalty: float | None
    logprobs: int | None
    logit_bias: Mapping[int, float] | None
    n: int | None


_SAMPLING_SCALARS = (
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "max_tokens",
    "min_tokens",
    "ignore_eos",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
    "logprobs",
    "n",
)


def build_generate_request(prompt: Prompt, options: GenerateOptions) -> generation_pb2.GenerateRequest:
    """The request for one attempt: without a ``request_id`` of the caller's it gets a fresh one.

    Raises InvalidRequestError for values that the protocol cannot carry, TypeError for unknown options.
    """
    unknown = options.keys() - GenerateOptions.__annotations__.keys()
    if unknown:
        raise TypeError(f"unknown option: {', '.join(sorted(unknown))}")
    request = generation_pb2.GenerateRequest(request_id=options.get("request_id") or uuid.uuid4().hex)
    _set_prompt(request, prompt)
    if (model := options.get("model")) is not None:
        _assign(request, "model", model, "model")
    if (adapter := options.get("adapter")) is not None:
        _assign(request.adapter, "name", adapter, "adapter.name")
        request.adapter.SetInParent()
    if (version := options.get("adapter_version")) is not None:
        _assign(request.adapter, "version", version, "adapter.version")
    if (priority := options.get("priority")) is not None:
        _assign(request, "priority", priority, "priority")
    if (slo := options.get("slo")) is not None:
        _set_slo(request.slo, slo)
    sampling = _sampling(options)
    if sampling.ListFields():
        request.sampling.CopyFrom(sampling)
    return request


def _set_prompt(request: generation_pb2.GenerateRequest, prompt: Prompt) -> None:
    if isinstance(prompt, str):
        _assign(request, "text", prompt, "text")
    elif prompt and isinstance(prompt[0], Message | Mapping):
        for item in prompt:
            request.chat.messages.append(_chat_message(item))
    else:
        request.token_ids.SetInParent()
        _extend(request.token_ids.ids, prompt, "token_ids.ids")


def _chat_message(item: object) -> generation_pb2.ChatMessage:
    message = generation_pb2.ChatMessage()
    for field in ("role", "content"):
        value = item.get(field) if isinstance(item, Mapping) else getattr(item, field, None)
        _assign(message, field, value, f"chat.messages.{field}")
    return message


def _set_slo(message: generation_pb2.Slo, slo: SLO) -> None:
    for field in ("ttft_ms", "tpot_ms"):
        if (value := getattr(slo, field)) is not None:
            _assign(message, field, value, f"slo.{field}")
    if slo.reject_on_miss:
        message.on_miss = generation_pb2.ON_MISS_REJECT


def _sampling(options: GenerateOptions) -> generation_pb2.SamplingParams:
    message = generation_pb2.SamplingParams()
    values: Mapping[str, Any] = options
    for field in _SAMPLING_SCALARS:
        if (value := values.get(field)) is not None:
            _assign(message, field, value, f"sampling.{field}")
    _extend(message.stop, options.get("stop") or (), "sampling.stop")
    _extend(message.stop_token_ids, options.get("stop_token_ids") or (), "sampling.stop_token_ids")
    for token_id, bias in (options.get("logit_bias") or {}).items():
        try:
            message.logit_bias[token_id] = bias
        except (TypeError, ValueError) as error:
            raise InvalidRequestError.of("sampling.logit_bias", f"cannot hold {token_id!r}: {bias!r}") from error
    return message


class _Extendable(Protocol):
    def extend(self, values: Any, /) -> None: ...


def _assign(message: Any, attribute: str, value: object, field: str) -> None:
    try:
        setattr(message, attribute, value)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError.of(field, f"cannot be {value!r}") from error


def _extend(target: _Extendable, values: object, field: str) -> None:
    try:
        if isinstance(values, str):
            raise TypeError("a text is no list")
        target.extend(values)
    except (TypeError, ValueError) as error:
        raise InvalidRequestError.of(field, f"cannot be {values!r}") from error


class ReplyBuilder:
    """Puts a stream of responses together: each becomes a Chunk on arrival, and at the end all of them a Reply."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self.adapter_version = ""
        self._chunks: dict[int, list[Chunk]] = {}
        self._finished: dict[int, generation_pb2.Finished] = {}

    def add(self, response: generation_pb2.GenerateResponse) -> Chunk | None:
        """The chunk that a response brings, if any. An answer's last chunk has its ``finish_reason`` and no tokens."""
        match response.WhichOneof("event"):
            case "started":
                self.request_id = response.started.request_id
                self.adapter_version = response.started.adapter_version
                return None
            case "chunk":
                chunk = _chunk(response.chunk)
                self._chunks.setdefault(chunk.index, []).append(chunk)
                return chunk
            case "finished":
                finished = response.finished
                self._finished[finished.index] = finished
                reason = _enum(FinishReason, generation_pb2.FinishReason, "FINISH_REASON", finished.finish_reason)
                return Chunk(text="", token_ids=(), index=finished.index, finish_reason=reason)
        return None

    def reply(self) -> Reply:
        """The whole answer. Raises InternalError if the stream ended before it did."""
        if 0 not in self._finished:
            raise InternalError("the server ended the stream before the answer", request_id=self.request_id)
        others = tuple(self._answer(index, ()) for index in sorted(self._finished) if index != 0)
        return self._answer(0, others)

    def _answer(self, index: int, alternatives: tuple[Reply, ...]) -> Reply:
        finished = self._finished[index]
        chunks = self._chunks.get(index, ())
        return Reply(
            text="".join(chunk.text for chunk in chunks),
            token_ids=tuple(token_id for chunk in chunks for token_id in chunk.token_ids),
            finish_reason=_enum(FinishReason, generation_pb2.FinishReason, "FINISH_REASON", finished.finish_reason),
            usage=Usage(
                prompt_tokens=finished.usage.prompt_tokens,
                completion_tokens=finished.usage.completion_tokens,
                cached_prompt_tokens=finished.usage.cached_prompt_tokens,
            ),
            timing=_timing(finished.timing),
            request_id=self.request_id,
            adapter_version=self.adapter_version,
            logprobs=tuple(logprob for chunk in chunks for logprob in chunk.logprobs),
            alternatives=alternatives,
        )


def _chunk(chunk: generation_pb2.Chunk) -> Chunk:
    logprobs = tuple(
        TokenLogprob(
            token_id=item.token_id,
            logprob=item.logprob,
            top={top.token_id: top.logprob for top in item.top},
        )
        for item in chunk.logprobs
    )
    return Chunk(text=chunk.text, token_ids=tuple(chunk.token_ids), index=chunk.index, logprobs=logprobs)


def _timing(timing: generation_pb2.Timing) -> Timing:
    return Timing(
        tier=_enum(Tier, generation_pb2.Tier, "TIER", timing.tier),
        queue_seconds=timing.queue_seconds,
        ttft_seconds=timing.ttft_seconds,
        tpot_seconds=timing.tpot_seconds if timing.HasField("tpot_seconds") else None,
        total_seconds=timing.total_seconds,
        cpu_layers=timing.cpu_layers,
        layers=tuple(
            LayerTiming(
                layer=layer.layer,
                source=_enum(LoraSource, generation_pb2.LoraSource, "LORA_SOURCE", layer.source),
                start_seconds=layer.start_seconds,
                end_seconds=layer.end_seconds,
                landed_seconds=layer.landed_seconds if layer.HasField("landed_seconds") else None,
            )
            for layer in timing.layers
        ),
        prefill_attempts=timing.prefill_attempts,
        cpu_tokens=timing.cpu_tokens,
    )


def adapter_info(adapter: adapters_pb2.Adapter) -> AdapterInfo:
    """An adapter as the server describes it."""
    return AdapterInfo(
        name=adapter.name,
        version=adapter.version,
        tier=_enum(Tier, generation_pb2.Tier, "TIER", adapter.tier),
        rank=adapter.rank,
        target_modules=tuple(adapter.target_modules),
        weight_bytes=adapter.weight_bytes,
        users=adapter.users,
        problem=adapter.problem,
        pinned=adapter.pinned,
    )


def server_info(info: server_pb2.GetInfoResponse) -> ServerInfo:
    """A server as it describes itself."""
    return ServerInfo(
        model=info.model,
        device=info.device,
        dtype=info.dtype,
        version=info.version,
        layers=info.layers,
        vocab_size=info.vocab_size,
        context_tokens=info.context_tokens,
        page_tokens=info.page_tokens,
        pages=info.pages,
        cpu_workers=info.cpu_workers,
        cpu_workers_ready=info.cpu_workers_ready,
        max_lora_rank=info.max_lora_rank,
        copy_bytes_per_second=info.copy_bytes_per_second if info.HasField("copy_bytes_per_second") else None,
    )


def _enum(cls: type[_Enum], proto: Any, prefix: str, value: int) -> _Enum:
    """A protobuf enum's value by its name. Raises InternalError for one that this version does not know."""
    name = proto.Name(value).removeprefix(f"{prefix}_") if value in proto.values() else ""
    if name not in cls.__members__:
        raise InternalError(f"the server speaks a newer protocol: {prefix} {value} is not known")
    return cls[name]
