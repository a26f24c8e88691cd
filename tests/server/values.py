"""Values of requests that every server takes, and such as none takes, whatever its model."""

from __future__ import annotations

from typing import Any

from segue import SLO

NAN, INFINITY = float("nan"), float("inf")
NO_TOKEN = (1 << 32) - 1

# Each with the field that the refusal must name.
INVALID: list[tuple[str, dict[str, Any]]] = [
    ("model", {"model": "another"}),
    ("request_id", {"request_id": "x" * 129}),
    ("request_id", {"request_id": "né"}),
    ("sampling.temperature", {"temperature": -0.1}),
    ("sampling.temperature", {"temperature": 1.1e6}),
    ("sampling.top_p", {"top_p": 0.0}),
    ("sampling.top_p", {"top_p": 1.5}),
    ("sampling.min_p", {"min_p": -0.1}),
    ("sampling.min_p", {"min_p": 2.0}),
    ("sampling.presence_penalty", {"presence_penalty": 3.0}),
    ("sampling.presence_penalty", {"presence_penalty": -2.1}),
    ("sampling.frequency_penalty", {"frequency_penalty": 2.1}),
    ("sampling.repetition_penalty", {"repetition_penalty": 0.0}),
    ("sampling.repetition_penalty", {"repetition_penalty": -1.0}),
    ("sampling.repetition_penalty", {"repetition_penalty": 10.1}),
    *(
        (f"sampling.{field}", {field: value})
        for field in (
            "temperature",
            "top_p",
            "min_p",
            "presence_penalty",
            "frequency_penalty",
            "repetition_penalty",
        )
        for value in (NAN, INFINITY, -INFINITY)
    ),
    ("sampling.max_tokens", {"max_tokens": 0}),
    ("sampling.max_tokens", {"max_tokens": 1 << 31}),
    ("sampling.min_tokens", {"min_tokens": 9, "max_tokens": 8}),
    ("sampling.logprobs", {"logprobs": 21}),
    ("sampling.n", {"n": 0}),
    ("sampling.n", {"n": 129}),
    ("sampling.n", {"n": 1 << 20}),
    ("sampling.stop", {"stop": ["x"] * 17}),
    ("sampling.stop", {"stop": ["x", ""]}),
    ("sampling.stop", {"stop": ["x" * 257]}),
    ("sampling.stop_token_ids", {"stop_token_ids": [NO_TOKEN]}),
    ("sampling.stop_token_ids", {"stop_token_ids": [5] * 65}),
    ("sampling.logit_bias", {"logit_bias": {NO_TOKEN: 1.0}}),
    ("sampling.logit_bias", {"logit_bias": {5: 101.0}}),
    *(("sampling.logit_bias", {"logit_bias": {4: 0.0, 5: value}}) for value in (NAN, INFINITY, -INFINITY)),
    ("slo.ttft_ms", {"slo": SLO(ttft_ms=0)}),
    ("slo.tpot_ms", {"slo": SLO(tpot_ms=NAN)}),
    ("adapter.name", {"adapter": ""}),
]

# The ends of every range, for a model of at least 400 tokens and a context of at least 128.
ACCEPTED: list[dict[str, Any]] = [
    {"request_id": "x" * 128},
    {"temperature": 0.0},
    {"temperature": 1e-30},
    {"temperature": 1e6},
    {"top_p": 1e-30},
    {"top_p": 0.9},
    {"top_p": 1.0},
    {"top_k": 0},
    {"top_k": (1 << 32) - 1},
    {"min_p": 0.0},
    {"min_p": 1.0},
    {"seed": 0},
    {"seed": (1 << 64) - 1},
    {"max_tokens": 126},
    {"min_tokens": 8, "max_tokens": 8},
    {"stop": []},
    {"stop": ["x" * 256] * 16},
    {"stop": ["😀" * 256]},
    {"stop_token_ids": [399] * 64},
    {"presence_penalty": -2.0, "frequency_penalty": 2.0},
    {"presence_penalty": 2.0, "frequency_penalty": -2.0},
    {"repetition_penalty": 0.001},
    {"repetition_penalty": 10.0},
    {"logprobs": 0},
    {"logprobs": 20},
    {"logit_bias": {0: -100.0, 399: 100.0}},
    {"logit_bias": dict.fromkeys(range(400), 0.1)},
    {"n": 1},
    {"n": 128},
    {"priority": 0},
]
