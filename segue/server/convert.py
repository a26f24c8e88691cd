"""Segue's values as protobuf messages."""

from __future__ import annotations

from segue.engine.messages import Finished
from segue.types import AdapterInfo, Chunk, Tier, Timing
from segue.v1 import adapters_pb2, generation_pb2


def tier_to_proto(tier: Tier) -> generation_pb2.Tier.ValueType:
    """The names are the same but for the prefix."""
    return generation_pb2.Tier.Value(f"TIER_{tier.name}")


def chunk_to_proto(chunk: Chunk) -> generation_pb2.GenerateResponse:
    """More of an answer."""
    message = generation_pb2.Chunk(index=chunk.index, text=chunk.text, token_ids=chunk.token_ids)
    for item in chunk.logprobs:
        added = message.logprobs.add(token_id=item.token_id, logprob=item.logprob)
        for token_id, logprob in item.top.items():
            added.top.add(token_id=token_id, logprob=logprob)
    return generation_pb2.GenerateResponse(chunk=message)


def finished_to_proto(index: int, finished: Finished) -> generation_pb2.GenerateResponse:
    """The end of an answer."""
    return generation_pb2.GenerateResponse(
        finished=generation_pb2.Finished(
            index=index,
            finish_reason=generation_pb2.FinishReason.Value(f"FINISH_REASON_{finished.reason.name}"),
            usage=generation_pb2.Usage(
                prompt_tokens=finished.prompt_tokens,
                completion_tokens=finished.completion_tokens,
                cached_prompt_tokens=finished.cached_prompt_tokens,
            ),
            timing=_timing_to_proto(finished.timing),
        )
    )


def adapter_to_proto(info: AdapterInfo) -> adapters_pb2.Adapter:
    return adapters_pb2.Adapter(
        name=info.name,
        version=info.version,
        tier=tier_to_proto(info.tier),
        rank=info.rank,
        target_modules=info.target_modules,
        weight_bytes=info.weight_bytes,
        users=info.users,
        problem=info.problem,
        pinned=info.pinned,
    )


def _timing_to_proto(timing: Timing) -> generation_pb2.Timing:
    return generation_pb2.Timing(
        tier=tier_to_proto(timing.tier),
        queue_seconds=timing.queue_seconds,
        ttft_seconds=timing.ttft_seconds,
        tpot_seconds=timing.tpot_seconds,
        total_seconds=timing.total_seconds,
        cpu_layers=timing.cpu_layers,
        layers=[
            generation_pb2.LayerTiming(
                layer=layer.layer,
                source=generation_pb2.LoraSource.Value(f"LORA_SOURCE_{layer.source.name}"),
                start_seconds=layer.start_seconds,
                end_seconds=layer.end_seconds,
                landed_seconds=layer.landed_seconds,
            )
            for layer in timing.layers
        ],
        prefill_attempts=timing.prefill_attempts,
        cpu_tokens=timing.cpu_tokens,
    )
