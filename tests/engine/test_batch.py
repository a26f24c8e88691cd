"""Building a batch from plain integers."""

from __future__ import annotations

import pytest

from segue.engine.batch import SequenceInput, build_batch


def test_rows_positions_and_slots() -> None:
    batch = build_batch(
        [
            SequenceInput(token_ids=[50, 51, 52], context_tokens=3, pages=[9, 2, 7], logit_tokens=1),
            SequenceInput(token_ids=[60], context_tokens=0, pages=[4], logit_tokens=0),
            SequenceInput(token_ids=[70, 71], context_tokens=8, pages=[5, 3, 1], logit_tokens=2),
        ],
        page_tokens=4,
    )
    assert batch.token_ids.tolist() == [50, 51, 52, 60, 70, 71]
    assert batch.positions.tolist() == [3, 4, 5, 0, 8, 9]
    assert batch.slot_pages.tolist() == [9, 2, 2, 4, 1, 1]
    assert batch.slot_offsets.tolist() == [3, 0, 1, 0, 0, 1]
    assert batch.logit_rows is not None
    assert batch.logit_rows.tolist() == [2, 4, 5]
    spans = [(rows.row_start, rows.row_stop, rows.context_tokens, rows.total_tokens) for rows in batch.sequences]
    assert spans == [(0, 3, 3, 6), (3, 4, 0, 1), (4, 6, 8, 10)]
    assert [rows.page_table.tolist() for rows in batch.sequences] == [[9, 2, 7], [4], [5, 3, 1]]


@pytest.mark.parametrize(
    ("sequence", "problem"),
    [
        (SequenceInput(token_ids=[], context_tokens=0, pages=[1]), "0 tokens"),
        (SequenceInput(token_ids=[1], context_tokens=-1, pages=[1]), "context of -1"),
        (SequenceInput(token_ids=[1, 2], context_tokens=3, pages=[1]), "1 pages of 4 tokens cannot hold"),
        (SequenceInput(token_ids=[1], context_tokens=0, pages=[1], logit_tokens=2), "logits of 2 of 1"),
    ],
)
def test_impossible_sequences_are_refused(sequence: SequenceInput, problem: str) -> None:
    sound = SequenceInput(token_ids=[1], context_tokens=0, pages=[0])
    with pytest.raises(ValueError, match=f"sequence 1: .*{problem}"):
        build_batch([sound, sequence], page_tokens=4)


def test_empty_batch_is_refused() -> None:
    with pytest.raises(ValueError, match="at least one"):
        build_batch([], page_tokens=4)
