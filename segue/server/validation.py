"""GenerateRequest to what is served, or to an error that names every field that is wrong."""

from __future__ import annotations

import math
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from segue.engine.sampling_params import SamplingParams
from segue.errors import FieldViolation, InvalidRequestError
from segue.server.limits import (
    MAX_ANSWERS,
    MAX_LOGIT_BIASES,
    MAX_LOGPROBS,
    MAX_REQUEST_ID_CHARACTERS,
    MAX_STOP_CHARACTERS,
    MAX_STOP_STRINGS,
    MAX_STOP_TOKENS,
    ModelLimits,
)
from segue.types import SLO, Message
from segue.v1 import generation_pb2 as pb


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatPrompt:
    """A conversation that a chat template turns into text."""

    messages: tuple[Message, ...]


_SEED_BITS = 64

Prompt = str | ChatPrompt | tuple[int, ...]
"""Text to tokenise, a conversation, or token ids."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GenerationRequest:
    """A request whose fields are sound. Its prompt's length in tokens is not known yet.

    ``sampling`` is that of the first of ``answers`` answers; its ``stop_token_ids`` have the model's own end tokens
    among them unless the request ignores them.
    """

    request_id: str
    prompt: Prompt
    adapter_name: str | None
    adapter_version: str | None
    max_tokens: int | None
    stop: tuple[str, ...]
    answers: int
    sampling: SamplingParams
    slo: SLO
    priority: int


class _Findings:
    """Collects what is wrong with a request."""

    def __init__(self) -> None:
        self._invalid: list[FieldViolation] = []

    def require(self, condition: bool, field: str, description: str) -> None:
        if not condition:
            self._invalid.append(FieldViolation(field=field, description=description))

    def raise_any(self) -> None:
        """Raises InvalidRequestError if anything is wrong."""
        if self._invalid:
            message = "; ".join(f"{violation.field}: {violation.description}" for violation in self._invalid)
            raise InvalidRequestError(message, violations=self._invalid)


def validate(
    request: pb.GenerateRequest, limits: ModelLimits, headers: Mapping[str, str] = MappingProxyType({})
) -> GenerationRequest:
    """Check everything that needs no tokenizer. ``headers`` are the call's metadata.

    Raises InvalidRequestError.
    """
    findings = _Findings()
    _check_request_id(request.request_id, findings)
    findings.require(request.model in ("", limits.name), "model", f"this server serves {limits.name!r}")
    prompt = _prompt(request, limits, findings)
    if request.HasField("adapter"):
        findings.require(bool(request.adapter.name), "adapter.name", "must not be empty")
    _check_sampling(request.sampling, limits, findings)
    slo = _service_level(request, headers, findings)
    findings.raise_any()
    sampling = request.sampling
    return GenerationRequest(
        request_id=request.request_id,
        prompt=prompt,
        adapter_name=request.adapter.name if request.HasField("adapter") else None,
        adapter_version=request.adapter.version if request.adapter.HasField("version") else None,
        max_tokens=sampling.max_tokens if sampling.HasField("max_tokens") else None,
        stop=tuple(dict.fromkeys(sampling.stop)),
        answers=sampling.n if sampling.HasField("n") else 1,
        sampling=_sampling_params(sampling, limits),
        slo=slo,
        priority=request.priority,
    )


def fit_max_tokens(request: GenerationRequest, prompt_tokens: int, limits: ModelLimits) -> int:
    """How many tokens may be generated after a prompt of this length. Raises InvalidRequestError."""
    context = limits.context_tokens
    if prompt_tokens == 0:
        raise InvalidRequestError.of("prompt", "must have at least one token")
    room = context - prompt_tokens
    if room < 1:
        raise InvalidRequestError.of(
            "prompt", f"has {prompt_tokens} tokens; with one of an answer it must fit the context of {context}"
        )
    max_tokens = request.max_tokens
    if max_tokens is None:
        max_tokens = min(limits.default_max_tokens, room)
    elif max_tokens > room:
        raise InvalidRequestError.of(
            "sampling.max_tokens",
            f"{max_tokens} after a prompt of {prompt_tokens} tokens do not fit the context of {context}",
        )
    if request.sampling.min_tokens > max_tokens:
        raise InvalidRequestError.of("sampling.min_tokens", f"must be at most max_tokens, {max_tokens}")
    return max_tokens


def _check_request_id(request_id: str, findings: _Findings) -> None:
    sound = len(request_id) <= MAX_REQUEST_ID_CHARACTERS and request_id.isascii() and request_id.isprintable()
    findings.require(sound, "request_id", f"must be at most {MAX_REQUEST_ID_CHARACTERS} printable ASCII characters")


def _prompt(request: pb.GenerateRequest, limits: ModelLimits, findings: _Findings) -> Prompt:
    match request.WhichOneof("prompt"):
        case "text":
            findings.require(bool(request.text), "text", "must not be empty")
            return request.text
        case "token_ids":
            token_ids = tuple(request.token_ids.ids)
            findings.require(bool(token_ids), "token_ids", "must not be empty")
            _check_token_ids(token_ids, "token_ids.ids", limits, findings)
            return token_ids
        case "chat":
            messages = tuple(Message(role=item.role, content=item.content) for item in request.chat.messages)
            findings.require(bool(messages), "chat.messages", "must not be empty")
            findings.require(all(message.role for message in messages), "chat.messages.role", "must not be empty")
            return ChatPrompt(messages=messages)
    findings.require(False, "prompt", "one of text, token_ids and chat must be set")
    return ""


def _check_token_ids(token_ids: tuple[int, ...], field: str, limits: ModelLimits, findings: _Findings) -> None:
    largest = max(token_ids, default=0)
    findings.require(
        largest < limits.vocab_size, field, f"{largest} is outside the vocabulary of {limits.vocab_size} tokens"
    )


def _check_sampling(sampling: pb.SamplingParams, limits: ModelLimits, findings: _Findings) -> None:
    """Absent scalars read as 0, so only those for which 0 is no sound value need a look at their presence."""

    def check_range(field: str, low: float, high: float, *, open_below: bool = False) -> None:
        value = getattr(sampling, field)
        inside = (low < value if open_below else low <= value) and value <= high
        if sampling.HasField(field):  # type: ignore[arg-type]
            bracket = "(" if open_below else "["
            findings.require(inside, f"sampling.{field}", f"must be in {bracket}{low:g}, {high:g}], is {value:g}")

    check_range("temperature", 0, 1e6)
    check_range("top_p", 0, 1, open_below=True)
    check_range("min_p", 0, 1)
    check_range("presence_penalty", -2, 2)
    check_range("frequency_penalty", -2, 2)
    check_range("repetition_penalty", 1e-3, 10)
    check_range("logprobs", 0, MAX_LOGPROBS)
    check_range("n", 1, MAX_ANSWERS)
    check_range("max_tokens", 1, limits.context_tokens)
    check_range("min_tokens", 0, limits.context_tokens)
    findings.require(len(sampling.stop) <= MAX_STOP_STRINGS, "sampling.stop", f"must be at most {MAX_STOP_STRINGS}")
    findings.require(limits.has_text or not sampling.stop, "sampling.stop", "the model has no tokenizer")
    findings.require(all(sampling.stop), "sampling.stop", "must not be empty strings")
    findings.require(
        all(len(stop) <= MAX_STOP_CHARACTERS for stop in sampling.stop),
        "sampling.stop",
        f"must be at most {MAX_STOP_CHARACTERS} characters each",
    )
    findings.require(
        len(sampling.stop_token_ids) <= MAX_STOP_TOKENS, "sampling.stop_token_ids", f"must be at most {MAX_STOP_TOKENS}"
    )
    _check_token_ids(tuple(sampling.stop_token_ids), "sampling.stop_token_ids", limits, findings)
    findings.require(
        len(sampling.logit_bias) <= MAX_LOGIT_BIASES, "sampling.logit_bias", f"must be at most {MAX_LOGIT_BIASES}"
    )
    _check_token_ids(tuple(sampling.logit_bias), "sampling.logit_bias", limits, findings)
    for token_id, bias in sampling.logit_bias.items():
        if not -100 <= bias <= 100:
            description = f"values must be in [-100, 100], that of token {token_id} is {bias:g}"
            findings.require(False, "sampling.logit_bias", description)
            break


def _sampling_params(sampling: pb.SamplingParams, limits: ModelLimits) -> SamplingParams:
    """Absent scalars read as 0, which is the default of all but the seed and those whose neutral value is 1."""
    stop_token_ids = tuple(sampling.stop_token_ids) + (() if sampling.ignore_eos else limits.eos_token_ids)
    return SamplingParams(
        seed=sampling.seed if sampling.HasField("seed") else secrets.randbits(_SEED_BITS),
        temperature=sampling.temperature,
        top_p=sampling.top_p if sampling.HasField("top_p") else 1.0,
        top_k=sampling.top_k,
        min_p=sampling.min_p,
        min_tokens=sampling.min_tokens,
        stop_token_ids=tuple(dict.fromkeys(stop_token_ids)),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty if sampling.HasField("repetition_penalty") else 1.0,
        logit_bias=dict(sampling.logit_bias),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
    )


def _service_level(request: pb.GenerateRequest, headers: Mapping[str, str], findings: _Findings) -> SLO:
    """The request's targets. What it leaves open is taken from its headers, so that a proxy can set it."""
    slo = request.slo
    targets: dict[str, float | None] = {}
    for field in ("ttft_ms", "tpot_ms"):
        header = f"x-slo-{field.replace('_', '-')}"
        if slo.HasField(field):
            targets[field] = _target(f"slo.{field}", getattr(slo, field), findings)
        elif header in headers:
            targets[field] = _target(header, headers[header], findings)
    findings.require(slo.on_miss in pb.OnMiss.values(), "slo.on_miss", f"{slo.on_miss} is no known value")
    return SLO(**targets, reject_on_miss=slo.on_miss == pb.ON_MISS_REJECT)


def _target(field: str, given: float | str, findings: _Findings) -> float | None:
    """Milliseconds greater than 0, or None and a finding."""
    try:
        value = float(given)
    except ValueError:
        value = math.nan
    sound = math.isfinite(value) and value > 0
    told = f"{given:g}" if isinstance(given, float) else repr(given)
    findings.require(sound, field, f"must be a number greater than 0, is {told}")
    return value if sound else None
