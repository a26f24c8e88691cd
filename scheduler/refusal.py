"""Whether a request that would rather be refused than late is refused when it arrives, and when it may come again.

The prediction takes what is known: the cost model, the prompts that are before it, and the lengths that answers are
expected to have. It grows with everything that is before the request and with its own prompt. So of two requests that
arrive in the same state, the one with the tighter target, the longer prompt or the later place is never accepted where
the other is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from segue.scheduler.cost_model import CostProfile, StepLoad
from segue.scheduler.plan import AdmittedRequest, QueuedRequest, SchedulerLimits, pages_for
from segue.scheduler.policy import decode_load, prompt_load

# Whoever comes again sooner finds the state that it was refused in.
LEAST_RETRY_SECONDS = 0.1


@dataclass(frozen=True, slots=True, kw_only=True)
class Running:
    """An admitted request, and how many more tokens its answer is expected to have."""

    request: AdmittedRequest
    tokens_left: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineLoad:
    """What a new request finds: those that run, those that are to be admitted before it, and pages that it can have."""

    running: Sequence[Running] = ()
    before: Sequence[QueuedRequest] = ()
    room_pages: int


@dataclass(frozen=True, slots=True)
class Prediction:
    """Seconds to the first token from now, and for each token after it."""

    first_token_seconds: float
    token_seconds: float


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a request is refused. ``retry_after_seconds`` is None where coming again is no use."""

    message: str
    retry_after_seconds: float | None


def predict(
    request: QueuedRequest, load: EngineLoad, profile: CostProfile, limits: SchedulerLimits, *, copy_bytes: int = 0
) -> Prediction:
    """When the request would get its tokens. ``copy_bytes`` of its adapter are not on the device yet."""
    decoding = [item.request for item in load.running]
    decodes = decode_load(decoding)
    step_seconds = profile.decode_seconds(decodes)
    prompts = StepLoad()
    for running in load.running:
        count = running.request.tokens - running.request.computed_tokens
        if count > 1:
            prompts = prompts.joined(prompt_load(count, running.request.computed_tokens, running.request.level))
    for item in (*load.before, request):
        prompts = prompts.joined(prompt_load(item.tokens, 0, item.level))
    chunk_tokens = limits.chunk_tokens if decoding else limits.budget_tokens
    steps = -(-prompts.tokens // chunk_tokens)
    shared = profile.prompts_ride and bool(decoding)
    rows_seconds = profile.prefill_seconds(prompts) - profile.prefill.fixed_seconds
    prefill_seconds = rows_seconds + steps * (step_seconds + (0.0 if shared else profile.prefill.fixed_seconds))
    wait_seconds = _steps_until_room(request, load, limits) * step_seconds
    own_decode = prompt_load(1, request.tokens, request.level)
    return Prediction(
        wait_seconds + prefill_seconds + profile.copy_seconds(copy_bytes),
        profile.decode_seconds(decodes.joined(own_decode)),
    )


def refusal(
    request: QueuedRequest,
    load: EngineLoad,
    profile: CostProfile,
    limits: SchedulerLimits,
    *,
    now: float,
    arrival_seconds: float,
    copy_bytes: int = 0,
) -> Refusal | None:
    """Why this request, which arrived at ``arrival_seconds``, cannot have what it wants; None if it can."""
    level = request.level
    idle = predict(request, EngineLoad(room_pages=_pages(request, limits)), profile, limits)
    wanted_seconds = level.first_token_by_seconds - arrival_seconds
    for what, best, wanted in (
        ("the first token", idle.first_token_seconds, wanted_seconds),
        ("a token", idle.token_seconds, level.token_seconds),
    ):
        if best > wanted:
            message = f"{what} takes {1e3 * best:.3g} ms on an idle server, the target is {1e3 * wanted:.3g} ms"
            return Refusal(message, None)
    found = predict(request, load, profile, limits, copy_bytes=copy_bytes)
    late_seconds = now + found.first_token_seconds - level.first_token_by_seconds
    if late_seconds > 0:
        message = f"the first token would come {1e3 * late_seconds:.3g} ms after its target"
        return Refusal(message, max(LEAST_RETRY_SECONDS, late_seconds))
    if found.token_seconds > level.token_seconds:
        message = (
            f"a token would take {1e3 * found.token_seconds:.3g} ms beside the requests that run, the target is "
            f"{1e3 * level.token_seconds:.3g} ms"
        )
        first_end = min((item.tokens_left for item in load.running), default=0) * found.token_seconds
        return Refusal(message, max(LEAST_RETRY_SECONDS, first_end))
    return None


def _pages(request: QueuedRequest, limits: SchedulerLimits) -> int:
    return pages_for(request.tokens, limits.page_tokens) + 1


def _steps_until_room(request: QueuedRequest, load: EngineLoad, limits: SchedulerLimits) -> int:
    """Steps until enough running requests have ended that there is a place and pages for all up to this one."""
    places = len(load.before) + 1 - (limits.max_running - len(load.running))
    pages = sum(_pages(item, limits) for item in (*load.before, request)) - load.room_pages
    steps = 0
    for item in sorted(load.running, key=lambda each: each.tokens_left):
        if places <= 0 and pages <= 0:
            break
        steps = item.tokens_left
        places -= 1
        pages -= item.request.own_pages
    return steps
