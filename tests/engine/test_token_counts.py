"""Counts of tokens, kept as a request grows, against counting afresh."""

from __future__ import annotations

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from segue.engine.token_counts import TokenCounts

tokens = st.lists(st.integers(0, 300), max_size=400)


def as_mapping(counts: TokenCounts) -> dict[int, float]:
    ids = counts.ids.tolist()
    assert len(set(ids)) == len(ids), "a token has two slots"
    return dict(zip(ids, counts.counts.tolist(), strict=True))


@given(prompt=tokens, generated=tokens)
def test_prompt_tokens_count_zero_and_generated_ones_as_often_as_they_came(
    prompt: list[int], generated: list[int]
) -> None:
    counts = TokenCounts(prompt)
    for token_id in generated:
        counts.add(token_id)
    expected = dict.fromkeys(prompt, 0.0) | {token_id: float(count) for token_id, count in Counter(generated).items()}
    assert as_mapping(counts) == expected
    assert as_mapping(TokenCounts(prompt, generated)) == expected
