"""Rows are dealt so that each counts once, whatever the number of processes and of rows in a pass."""

from __future__ import annotations

import itertools

import pytest

from align_pipeline.stages.dealing import Pass, Steps, deal, deal_to_judge

EVERY = list(itertools.product(range(1, 18), (1, 2, 3, 5), (1, 2, 3, 4)))


def counted(dealt: list[list[Pass]]) -> list[int]:
    return sorted(row for passes in dealt for one in passes if not one.idle for row in one.rows)


@pytest.mark.parametrize("judged", [False, True])
def test_every_row_counts_once_and_all_processes_make_the_same_passes(judged: bool) -> None:
    for count, size, ranks in EVERY:
        rows = range(100, 100 + count)
        dealt = [
            list(deal_to_judge(rows, size, rank, ranks, size)) if judged else deal(rows, size, rank, ranks)
            for rank in range(ranks)
        ]
        assert counted(dealt) == list(rows), (count, size, ranks)
        shapes = [[len(one.rows) for one in passes] for passes in dealt]
        assert all(shape == shapes[0] for shape in shapes), "TRL gathers numbers of every pass"
        assert max(shapes[0]) <= size


def test_one_process_takes_the_rows_in_their_order() -> None:
    assert [one.rows for one in deal([4, 2, 0, 1, 3], 2, 0, 1)] == [(4, 2), (0, 1), (3,)]


def test_what_two_processes_read_at_once_is_what_one_reads_in_a_pass_of_twice_the_rows() -> None:
    """KTO's mismatched answers lie in one such group."""
    one = [set(part.rows) for part in deal(range(12), 4, 0, 1)]
    two = [deal(range(12), 2, rank, 2) for rank in range(2)]
    assert [{*left.rows, *right.rows} for left, right in zip(*two, strict=True)] == one


def test_a_step_holds_the_same_rows_for_any_number_of_processes_and_each_epoch_has_an_order_of_its_own() -> None:
    def epoch(ranks: int, number: int) -> list[list[int]]:
        dealt = [Steps(21, 8, 2, rank, ranks, seed=3) for rank in range(ranks)]
        for steps in dealt:
            steps.set_epoch(number)
        assert {len(list(steps)) for steps in dealt} == {len(dealt[0])} == {3}
        return [counted(list(step)) for step in zip(*dealt, strict=True)]

    assert epoch(1, 0) == epoch(2, 0) == epoch(4, 0) != epoch(1, 1) == epoch(2, 1)
    assert sorted(itertools.chain(*epoch(2, 0))) == list(range(21))
