"""What passes bring: KV that is right from now on, tokens, and requests that end; and what is said of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from segue.engine.costs import EngineCosts
from segue.engine.forward_pass import PassResult, RequestRows
from segue.engine.kv import KvPages
from segue.engine.lora.store import AdapterStore
from segue.engine.messages import Failed, Finished, NewTokens, StepOutput
from segue.engine.request import Request, RequestState
from segue.engine.requests import RequestTable
from segue.engine.sampling import SampledToken
from segue.engine.timeline import LayerRecord
from segue.engine.versions import AdapterVersions
from segue.errors import AdapterRejectedError, InternalError, SegueError
from segue.types import FinishReason


class Outcomes:
    """Applies results to their requests, and ends requests: each when nothing under way uses its pages any more."""

    def __init__(
        self,
        *,
        requests: RequestTable,
        kv: KvPages,
        store: AdapterStore,
        versions: AdapterVersions,
        costs: EngineCosts,
        clock: Callable[[], float],
    ) -> None:
        self._requests = requests
        self._kv = kv
        self._store = store
        self._versions = versions
        self._costs = costs
        self._clock = clock
        self._output = StepOutput()
        self.progressed = False
        """Whether anything was applied or given back since this was set to False."""

    def take_output(self) -> StepOutput:
        """What there is to say since the last call."""
        output, self._output = self._output, StepOutput()
        return output

    def refuse(self, number: int, error: SegueError) -> None:
        """A request that never was one of the engine's."""
        self._output.failed.append(Failed.of(number, error))

    def take(self, result: PassResult, chosen: Sequence[tuple[Request, SampledToken | None]]) -> None:
        """A pass or a batch has ended, with these tokens; None where none can be chosen."""
        for rows in result.rows:
            if rows.request.state is RequestState.ADMITTED:
                self._commit(rows, result.records)
        for request, token in chosen:
            if request.state is RequestState.ADMITTED:
                self._take_token(request, token)
        for rows in result.rows:
            self.settle(rows.request)
        self.progressed = True

    def settle(self, request: Request) -> None:
        """Something that used the request's pages has ended."""
        if request.state is RequestState.ENDING and not (request.in_pass or request.flights):
            self._release(request)

    def finish(self, request: Request, reason: FinishReason) -> None:
        """The request ends with what it has."""
        if reason is not FinishReason.CANCELLED:
            self._costs.observe_answer(request.generated_tokens, request.submit.max_tokens)
        landed = () if request.version_id is None else self._store.landed_seconds(request.version_id)
        self._output.finished.append(
            Finished(
                number=request.number,
                reason=reason,
                prompt_tokens=len(request.submit.prompt_token_ids),
                completion_tokens=request.generated_tokens,
                cached_prompt_tokens=request.cached_prompt_tokens,
                timing=request.timeline.timing(landed, request.generated_tokens, self._clock()),
            )
        )
        self._end(request)

    def fail(self, request: Request, error: SegueError) -> None:
        """The request ends with an error."""
        self._output.failed.append(Failed.of(request.number, error))
        self._end(request)

    def _commit(self, rows: RequestRows, records: Mapping[int, list[LayerRecord]]) -> None:
        request = rows.request
        own_records = records.get(request.version_id) if request.version_id is not None else None
        request.timeline.record_pass(own_records or [])
        request.computed_tokens = rows.start + rows.count
        if not request.in_pass:
            # Sharing may exchange pages for equal ones, and a pass under way goes on with those it began with.
            self._kv.commit(request)

    def _take_token(self, request: Request, token: SampledToken | None) -> None:
        if token is not None:
            self._append(request, token)
        elif request.version_id is None:
            self.fail(request, InternalError("the model's output is not finite"))
        else:
            # The model alone gives usable logits: the adapter's weights overflow.
            self.fail(request, AdapterRejectedError("the model's output with this adapter is not finite"))

    def _append(self, request: Request, token: SampledToken) -> None:
        if request.timeline.first_token_seconds is None:
            request.timeline.first_token_seconds = self._clock()
        request.append(token.token_id)
        self._requests.waiting.shares.charge(request.level.tenant, answer_tokens=1)
        logprobs = [] if token.logprob is None else [token.logprob]
        self._output.tokens.append(NewTokens(request.number, [token.token_id], logprobs))
        if token.token_id in request.submit.sampling.stop_token_ids:
            self.finish(request, FinishReason.STOP)
        elif request.generated_tokens >= request.submit.max_tokens:
            self.finish(request, FinishReason.LENGTH)

    def _end(self, request: Request) -> None:
        if request.in_pass or request.flights:
            request.move_to(RequestState.ENDING)
        else:
            self._release(request)

    def _release(self, request: Request) -> None:
        self._kv.release(request)
        self._requests.end(request)
        if request.version_id is not None:
            self._store.release(request.version_id)
            self._versions.settle()
        self.progressed = True
