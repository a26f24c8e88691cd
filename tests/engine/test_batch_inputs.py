"""The integers of a batch as kernels read them: every row finds its token, its page and its sequence."""

from __future__ import annotations

import random

import pytest
import torch

from segue.engine.cuda.batch_inputs import BatchInputs, BatchMemory
from segue.engine.cuda.batch_shapes import BatchShape, batch_shapes, workspace_bytes
from segue.engine.forward_pass import RequestRows
from segue.engine.messages import Submit
from segue.engine.pending import PendingToken
from segue.engine.request import Request
from segue.engine.sampling_params import SamplingParams

PAGE_TOKENS = 4
PADDING_PAGE = 99


def request(number: int, tokens: int, pages: list[int]) -> Request:
    made = Request.of(
        Submit(
            number=number,
            prompt_token_ids=[1000 * number + place for place in range(tokens)],
            max_tokens=8,
            arrival_seconds=0.0,
            sampling=SamplingParams(seed=0),
        )
    )
    made.pages = pages
    return made


def inputs(shape: BatchShape) -> BatchInputs:
    memory = BatchMemory(BatchShape(40, 20), 64, torch.device("cpu"))
    return BatchInputs(shape, memory, PAGE_TOKENS, PADDING_PAGE)


@pytest.mark.parametrize("seed", range(20))
def test_rows_are_found_again(seed: int) -> None:
    generator = random.Random(seed)
    made = inputs(BatchShape(24, 9))
    for _ in range(3):
        rows = []
        for number in range(1, generator.randint(1, 8) + 1):
            count = generator.choice([1, 1, 1, 2, 3])
            start = generator.randrange(0, 9)
            pages = [
                10 * number + place for place in range(-(-(start + count) // PAGE_TOKENS) + generator.randrange(2))
            ]
            rows.append(RequestRows(request(number, start + count, pages), start, count))
        made.fill(rows)
        at = made.on_device
        row = 0
        for sequence, item in enumerate(rows):
            assert at.row_indptr[sequence : sequence + 2].tolist() == [row, row + item.count]
            table = at.indices[int(at.indptr[sequence]) : int(at.indptr[sequence + 1])].tolist()
            total = item.start + item.count
            assert table == item.request.pages[: -(-total // PAGE_TOKENS)]
            assert (len(table) - 1) * PAGE_TOKENS + int(at.last_page_tokens[sequence]) == total
            assert int(made.total_tokens[sequence]) == total
            for place in range(item.count):
                assert int(at.token_ids[row]) == item.request.token_ids[item.start + place]
                assert int(at.positions[row]) == item.start + place
                page, offset = divmod(item.start + place, PAGE_TOKENS)
                assert int(at.slots[row]) == item.request.pages[page] * PAGE_TOKENS + offset
                row += 1
            assert int(at.logit_rows[sequence]) == row - 1
        unused = slice(len(rows), None)
        assert at.row_indptr[len(rows) :].tolist() == [row] * (9 - len(rows) + 1)
        assert set(at.slots[row:].tolist()) == {PADDING_PAGE * PAGE_TOKENS}
        assert set(at.positions[row:].tolist()) == {0}
        for sequence in range(len(rows), 9):
            assert at.indices[int(at.indptr[sequence]) : int(at.indptr[sequence + 1])].tolist() == [PADDING_PAGE]
        assert set(at.last_page_tokens[unused].tolist()) == {1}


def test_a_full_shape_and_none_at_all() -> None:
    made = inputs(BatchShape(3, 3, decodes=True))
    made.fill([RequestRows(request(number, 5, [number, number + 10]), 4, 1) for number in (1, 2, 3)])
    assert made.on_device.slots.tolist() == [page * PAGE_TOKENS for page in (11, 12, 13)]
    assert made.on_device.logit_rows.tolist() == [0, 1, 2]
    made.fill([])
    assert made.on_device.row_indptr.tolist() == [0, 0, 0, 0]
    assert made.on_device.indptr.tolist() == [0, 1, 2, 3]


def test_a_token_under_way_is_taken_from_the_device() -> None:
    made = inputs(BatchShape(4, 4, decodes=True))
    known, unknown = request(1, 5, [1, 2]), request(2, 5, [3, 4])
    unknown.ahead_tokens, unknown.pending_token = 1, PendingToken(torch.tensor([7, 8]), 1)
    made.fill([RequestRows(known, 4, 1), RequestRows(unknown, 5, 1)])
    assert made.on_device.token_ids[:2].tolist() == [1004, 8]
    assert made.host.positions[:2].tolist() == [4, 5]


def bad_batches() -> dict[str, list[RequestRows]]:
    good = RequestRows(request(1, 5, [1, 2]), 4, 1)
    return {
        "sequences": [good] * 4,
        "rows": [good, RequestRows(request(2, 6, [3, 4]), 2, 4)],
        "pages": [good, RequestRows(request(2, 9, [3, 4]), 8, 1), good],
        "tokens": [RequestRows(request(2, 3, [3, 4]), 2, 3)],
        "more pages than the memory has": [RequestRows(request(2, 2000, [*range(500)]), 1999, 1)],
    }


@pytest.mark.parametrize("name", bad_batches())
def test_a_batch_that_does_not_fit_is_refused(name: str) -> None:
    made = inputs(BatchShape(4, 3))
    with pytest.raises(ValueError, match="rows:"):
        made.fill(bad_batches()[name])
    made.fill([RequestRows(request(1, 5, [1, 2]), 4, 1)])
    assert made.on_device.slots.tolist() == [2 * PAGE_TOKENS, *[PADDING_PAGE * PAGE_TOKENS] * 3]


def test_what_a_shape_holds() -> None:
    shape = BatchShape(16, 12)
    assert shape.holds(16, 11)
    assert shape.holds(16, 12)
    assert shape.holds(9, 1)
    assert not shape.holds(15, 12), "the row that is not used has no sequence"
    assert not shape.holds(17, 1)
    decode = BatchShape(4, 4, decodes=True)
    assert decode.holds(4, 4)
    assert decode.holds(3, 3)
    assert not decode.holds(4, 3), "one row for each sequence"


@pytest.mark.parametrize(("max_rows", "max_sequences"), [(640, 128), (512, 64), (48, 16), (192, 64)])
def test_every_batch_has_a_shape(max_rows: int, max_sequences: int) -> None:
    shapes = batch_shapes(max_rows, max_sequences)
    assert len(shapes) < 60, "each of them is recorded several times"
    for sequences in range(1, max_sequences + 1):
        decodes = next(shape for shape in shapes if shape.holds(sequences, sequences))
        assert decodes.rows <= max(sequences + 1, 1.5 * sequences) or decodes.rows - sequences <= 16
        for rows in range(sequences + 1, max_rows + 1):
            if 3 * rows // 4 > sequences:
                assert any(shape.holds(rows, sequences) for shape in shapes), (rows, sequences)


def test_the_workspace_is_what_a_plan_takes() -> None:
    """By hand for 128 wide heads on 132 multiprocessors: query heads x parts x rows of a part x 129 floats."""
    small, mixed = BatchShape(128, 128), BatchShape(256, 129)
    assert workspace_bytes(small, 32, 8, 128, 132) == 32 * (128 * 4 // 16 + 127) * 16 * 129 * 4 + 1024
    assert workspace_bytes(mixed, 32, 8, 128, 132) == 32 * (256 * 4 // 128 + 128) * 128 * 129 * 4 + 1024
    assert workspace_bytes(BatchShape(1, 1, decodes=True), 32, 8, 128, 132) == 32 * 33 * 16 * 129 * 4 + 1024
