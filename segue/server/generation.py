"""GenerationService: from a request to the engine, and from the engine's tokens to a stream of text."""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Sequence
from concurrent.futures import Executor
from dataclasses import dataclass
from typing import Any, TypeVar

import grpc.aio
import msgspec

from segue.engine.lora.catalog import OpenedVersion
from segue.engine.messages import Submit
from segue.server.adapter_tokenizer import AdapterTokenizers
from segue.server.adapters import AdapterDirectory
from segue.server.answer import Answer
from segue.server.caller import caller, deadline_seconds, headers_of, tenant
from segue.server.convert import chunk_to_proto, finished_to_proto
from segue.server.engine_client import EngineClient
from segue.server.engine_request import EngineRequests
from segue.server.limits import ModelLimits
from segue.server.registry import RequestRegistry
from segue.server.stop_strings import StopMatcher
from segue.server.tokenizer import ModelTokenizer, NoTokenizer
from segue.server.validation import ChatPrompt, GenerationRequest, fit_max_tokens, validate
from segue.v1 import generation_pb2 as pb
from segue.v1 import generation_pb2_grpc

_Context = grpc.aio.ServicerContext[Any, Any]
_Result = TypeVar("_Result")


@dataclass(frozen=True, slots=True, kw_only=True)
class _Account:
    """On whose account a call is served, and until when."""

    tenant: str
    deadline_seconds: float | None


class GenerationService(generation_pb2_grpc.GenerationServiceServicer):
    """Serves one base model. Used on one event loop; tokenisation and look-ups run on ``executor``."""

    def __init__(
        self,
        *,
        limits: ModelLimits,
        engine: EngineClient,
        directory: AdapterDirectory,
        tokenizer: ModelTokenizer | NoTokenizer,
        adapter_tokenizers: AdapterTokenizers,
        executor: Executor,
    ) -> None:
        self._limits = limits
        self._engine = engine
        self._directory = directory
        self._tokenizer = tokenizer
        self._adapter_tokenizers = adapter_tokenizers
        self._executor = executor
        self._registry = RequestRegistry()

    async def Generate(  # noqa: N802
        self, request: pb.GenerateRequest, context: _Context
    ) -> AsyncGenerator[pb.GenerateResponse, None]:
        arrival_seconds = time.monotonic()
        # An error reports the request's id too, also when it was made here.
        request.request_id = request.request_id or uuid.uuid4().hex
        headers = headers_of(context)
        checked = validate(request, self._limits, headers)
        account = _Account(tenant=tenant(context, headers), deadline_seconds=deadline_seconds(context))
        with self._registry.enter(caller(context), checked.request_id) as live:
            async with self._version(checked) as opened:
                prompt = await self._tokens(checked, opened)
                engine_requests = self._submit(checked, opened, prompt, arrival_seconds, account)
                try:
                    live.attach(engine_requests)
                    if opened is not None:
                        # The engine is loading the adapter meanwhile.
                        await self._run(self._adapter_tokenizers.check_vocabulary, opened)
                    version = "" if opened is None else opened.manifest.version
                    yield pb.GenerateResponse(
                        started=pb.Started(request_id=checked.request_id, adapter_version=version)
                    )
                    async for response in self._answers(engine_requests, checked):
                        yield response
                finally:
                    engine_requests.cancel()

    async def Abort(self, request: pb.AbortRequest, context: _Context) -> pb.AbortResponse:  # noqa: N802
        self._registry.abort(caller(context), request.request_id)
        return pb.AbortResponse()

    @contextlib.asynccontextmanager
    async def _version(self, checked: GenerationRequest) -> AsyncIterator[OpenedVersion | None]:
        """Hold the adapter's version while the request runs."""
        if checked.adapter_name is None:
            yield None
            return
        opened = await self._directory.lookup(checked.adapter_name, checked.adapter_version)
        try:
            yield opened
        finally:
            self._directory.release(opened)

    async def _tokens(self, checked: GenerationRequest, opened: OpenedVersion | None) -> Sequence[int]:
        prompt = checked.prompt
        if isinstance(prompt, str):
            return await self._run(self._tokenizer.encode, prompt)
        if isinstance(prompt, ChatPrompt):
            return await self._run(self._encode_chat, prompt, opened)
        return prompt

    def _encode_chat(self, prompt: ChatPrompt, opened: OpenedVersion | None) -> list[int]:
        template = None if opened is None else self._adapter_tokenizers.chat_template(opened)
        return self._tokenizer.encode_chat(prompt.messages, template)

    def _submit(
        self,
        checked: GenerationRequest,
        opened: OpenedVersion | None,
        prompt: Sequence[int],
        arrival_seconds: float,
        account: _Account,
    ) -> EngineRequests:
        max_tokens = fit_max_tokens(checked, len(prompt), self._limits)
        life = self._engine.life
        version_id = None if opened is None else self._directory.hand_over(opened, life)
        token_ids = list(prompt)
        submits = [
            Submit(
                number=life.next_number(),
                prompt_token_ids=token_ids,
                max_tokens=max_tokens,
                arrival_seconds=arrival_seconds,
                adapter_version_id=version_id,
                sampling=msgspec.structs.replace(checked.sampling, sample=index),
                tenant=account.tenant,
                priority=checked.priority,
                ttft_seconds=_seconds(checked.slo.ttft_ms),
                tpot_seconds=_seconds(checked.slo.tpot_ms),
                reject_on_miss=checked.slo.reject_on_miss,
                deadline_seconds=account.deadline_seconds,
            )
            for index in range(checked.answers)
        ]
        return life.submit(submits)

    async def _answers(
        self, engine_requests: EngineRequests, checked: GenerationRequest
    ) -> AsyncIterator[pb.GenerateResponse]:
        """All answers, each as it goes on: what has come of every one is sent before more is read."""
        answers = [
            Answer(
                index,
                engine_request,
                checked.sampling,
                self._tokenizer.detokenizer(),
                StopMatcher(checked.stop) if checked.stop else None,
            )
            for index, engine_request in enumerate(engine_requests)
        ]
        unfinished = len(answers)
        while unfinished:
            for index, progress in await engine_requests.read():
                chunk = answers[index].advance(progress)
                if chunk is not None:
                    yield chunk_to_proto(chunk)
                finished = answers[index].finished
                if finished is not None:
                    unfinished -= 1
                    yield finished_to_proto(index, finished)

    async def _run(self, function: Callable[..., _Result], *arguments: Any) -> _Result:
        return await asyncio.get_running_loop().run_in_executor(self._executor, function, *arguments)


def _seconds(milliseconds: float | None) -> float | None:
    return None if milliseconds is None else milliseconds / 1e3
