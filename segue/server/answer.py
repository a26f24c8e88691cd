"""One answer of a request: from the engine's tokens to chunks of text."""

from __future__ import annotations

import msgspec

from segue.engine.messages import Finished
from segue.engine.sampling_params import SamplingParams
from segue.server.detokenize import Detokenizer
from segue.server.engine_request import EngineRequest, Progress
from segue.server.stop_strings import StopMatcher
from segue.types import Chunk, FinishReason, TokenLogprob


class Answer:
    """Takes what arrives for one EngineRequest and ends it when its text meets a stop string."""

    def __init__(
        self,
        index: int,
        engine_request: EngineRequest,
        sampling: SamplingParams,
        detokenizer: Detokenizer,
        stop_matcher: StopMatcher | None,
    ) -> None:
        self._index = index
        self._engine_request = engine_request
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        self._min_tokens = sampling.min_tokens
        self._detokenizer = detokenizer
        self._stop_matcher = stop_matcher
        self._tokens = 0
        self._finished: Finished | None = None

    @property
    def finished(self) -> Finished | None:
        """How the answer ended, once it has: with the reason and the tokens that its chunks have told of."""
        return self._finished

    def advance(self, progress: Progress) -> Chunk | None:
        """The answer's next chunk, if ``progress`` brings one. What comes after a stop string is dropped."""
        text, count = self._take_tokens(progress.token_ids)
        if progress.finished is not None:
            text += self._flush()
            reason = FinishReason.STOP if self._is_stopped else progress.finished.reason
            self._finished = msgspec.structs.replace(progress.finished, reason=reason, completion_tokens=self._tokens)
        if not count and not text:
            return None
        logprobs: list[TokenLogprob] = progress.logprobs[:count]
        return Chunk(
            text=text, token_ids=tuple(progress.token_ids[:count]), index=self._index, logprobs=tuple(logprobs)
        )

    @property
    def _is_stopped(self) -> bool:
        return self._stop_matcher is not None and self._stop_matcher.stopped

    def _take_tokens(self, token_ids: list[int]) -> tuple[str, int]:
        """The text that is certain now, and how many of the tokens belong to the answer."""
        if self._stop_matcher is None:
            self._tokens += len(token_ids)
            return self._decode(token_ids), len(token_ids)
        text = ""
        # One by one, because the answer's last token is the one that decides that there is a stop string.
        for place, token_id in enumerate(token_ids):
            if self._is_stopped:
                return text, place
            self._tokens += 1
            text += self._stop_matcher.push(self._decode([token_id]), exempt=self._tokens <= self._min_tokens)
            if self._stop_matcher.stopped:
                self._engine_request.end_early()
        return text, len(token_ids)

    def _decode(self, token_ids: list[int]) -> str:
        """A stop token ends the answer and is no part of its text."""
        return self._detokenizer.push([token_id for token_id in token_ids if token_id not in self._stop_token_ids])

    def _flush(self) -> str:
        rest = self._detokenizer.flush()
        if self._stop_matcher is None:
            return rest
        return self._stop_matcher.push(rest, exempt=self._tokens <= self._min_tokens) + self._stop_matcher.flush()
