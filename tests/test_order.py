"""The order plan: every image once, equal steps on every rank, a pure function of numbers."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastssl import order

# (images, world, batch), the awkward ones: DALI's own policies lose or repeat images on them.
SETTINGS = [
    (100, 4, 8),
    (81, 4, 5),
    (26, 4, 6),
    (7, 1, 7),
    (8, 1, 7),
    (1, 1, 4),
    (5, 3, 4),
    (301, 2, 16),
]


@pytest.mark.parametrize(("count", "world", "batch"), SETTINGS)
@pytest.mark.parametrize("epoch", [0, 1, 17])
def test_every_image_is_seen_once_and_the_rest_is_fill_at_the_tail(count, world, batch, epoch):
    ranks = [order.shuffled(count, 3, epoch, rank, world, batch) for rank in range(world)]
    steps = order.steps_per_epoch(count, world, batch)

    assert {plan.shape for plan in ranks} == {(steps, batch)}
    side_by_side = np.stack(ranks, axis=1).reshape(-1)
    assert sorted(side_by_side[:count]) == list(range(count))
    assert len(side_by_side) - count < world * batch
    assert set(side_by_side) == set(range(count))


@pytest.mark.parametrize(("count", "world", "batch"), SETTINGS)
def test_processes_with_a_part_of_the_batch_see_what_one_with_the_whole_sees(count, world, batch):
    whole = order.shuffled(count, 5, 2, 0, 1, world * batch)
    parts = [order.shuffled(count, 5, 2, rank, world, batch) for rank in range(world)]

    np.testing.assert_array_equal(np.concatenate(parts, axis=1), whole)


def test_seed_and_epoch_each_change_the_order_and_the_same_repeat_it():
    plan = order.shuffled(500, 1, 0, 0, 1, 50)

    np.testing.assert_array_equal(plan, order.shuffled(500, 1, 0, 0, 1, 50))
    for other in (order.shuffled(500, 2, 0, 0, 1, 50), order.shuffled(500, 1, 1, 0, 1, 50)):
        assert (plan != other).mean() > 0.9


def test_every_image_comes_at_every_place_over_the_epochs():
    first = [order.shuffled(10, 0, epoch, 0, 1, 10)[0, 0] for epoch in range(400)]

    counts = np.bincount(first, minlength=10)
    assert counts.min() > 15  # 40 expected
    assert counts.max() < 75


@pytest.mark.parametrize(("count", "world", "batch"), SETTINGS)
def test_a_probe_sees_the_listing_in_order(count, world, batch):
    parts = [order.in_order(count, rank, world, batch) for rank in range(world)]

    listed = np.stack(parts, axis=1).reshape(-1)
    assert list(listed[:count]) == list(range(count))


def test_asking_for_an_epoch_s_order_again_copies_nothing():
    once, again = (order.shuffled(301, 3, 0, rank, 2, 16) for rank in (0, 0))

    assert np.shares_memory(once, again)
    assert not once.flags.writeable


# -- by chunks ------------------------------------------------------------------------------------


def ends_of(sizes) -> np.ndarray:
    return np.cumsum(np.array(sizes, np.int64))


def chunk_of(ends: np.ndarray, positions: np.ndarray) -> np.ndarray:
    return np.searchsorted(ends, positions, side="right")


# Sizes of chunks, ranks, batch, window: also fewer chunks than ranks, and one for all.
sizes = st.lists(st.integers(1, 40), min_size=1, max_size=30)
settings_by_chunks = st.tuples(sizes, st.integers(1, 9), st.integers(1, 12), st.integers(1, 40))


@given(settings_by_chunks, st.integers(0, 5), st.integers(0, 5))
@settings(max_examples=300, deadline=None)
def test_by_chunks_every_image_is_seen_once_and_then_the_first_ones_again(setting, seed, epoch):
    lengths, world, batch, window = setting
    ends = ends_of(lengths)
    count = int(ends[-1])
    steps = order.steps_per_epoch(count, world, batch)
    plans = [
        order.by_chunks(ends, seed, epoch, rank, world, batch, window) for rank in range(world)
    ]
    seen = np.bincount(np.concatenate([plan.reshape(-1) for plan in plans]), minlength=count)
    places = steps * world * batch

    assert {(plan.shape, plan.dtype) for plan in plans} == {((steps, batch), np.dtype(np.int64))}
    assert len(seen) == count
    assert set(seen) <= {places // count, -(-places // count)}
    # Those seen once more are the first of the epoch's order: whole chunks but for the last of
    # them, in the order of an epoch with nothing filled in.
    again = np.flatnonzero(seen > places // count)
    assert len(again) == places % count
    laid = order.by_chunks(ends, seed, epoch, 0, 1, count, 1)[0]
    its_chunks = chunk_of(ends, laid)
    first = list(dict.fromkeys(its_chunks[: len(again)]))
    assert list(dict.fromkeys(chunk_of(ends, again))) == sorted(first)


@given(settings_by_chunks)
@settings(max_examples=200, deadline=None)
def test_by_chunks_a_rank_reads_a_window_s_chunks_whole_before_the_next_window_s(setting):
    lengths, world, batch, window = setting
    ends = ends_of(lengths)
    count = int(ends[-1])
    # An oracle: chunks in the order that one rank with windows of one chunk sees them in.
    laid = order.by_chunks(ends, 3, 1, 0, 1, count, 1)[0]
    in_turn = [
        np.sort(laid[chunk_of(ends, laid) == c]) for c in dict.fromkeys(chunk_of(ends, laid))
    ]
    side_by_side = np.concatenate(in_turn)
    own = order.steps_per_epoch(count, world, batch) * batch
    for rank in range(world):
        plan = order.by_chunks(ends, 3, 1, rank, world, batch, window).reshape(-1)
        piece = np.resize(side_by_side, world * own)[rank * own : (rank + 1) * own]
        # where another chunk begins, or the same one anew: it was cut, or is filled in again
        begins = [
            i
            for i in range(1, own)
            if piece[i] != piece[i - 1] + 1 or piece[i] in ends  # a neighbour in the listing
        ]
        cuts = [0, *begins[window - 1 :: window], own]
        for begin, end in pairwise(cuts):
            assert sorted(plan[begin:end]) == sorted(piece[begin:end])


def test_by_chunks_ranks_read_chunks_of_their_own_but_for_those_at_the_cuts():
    ends = ends_of([30] * 200)
    for world in (2, 3, 8):
        read = [
            set(chunk_of(ends, order.by_chunks(ends, 0, 4, rank, world, 16, 10)).reshape(-1))
            for rank in range(world)
        ]

        # 200 chunks, one more a cut, and those that the filled-in images come from
        assert sum(map(len, read)) <= 200 + (world - 1) + -(-16 * world // 30) + 1


def test_by_chunks_fewer_chunks_than_ranks_are_cut_finer():
    plans = [order.by_chunks(ends_of([64]), 0, 0, rank, 8, 4, 5) for rank in range(8)]

    assert sorted(np.concatenate(plans).reshape(-1)) == list(range(64))
    assert {plan.shape for plan in plans} == {(2, 4)}


def test_by_chunks_a_window_of_all_chunks_lets_any_image_come_anywhere():
    ends = ends_of([2] * 5)
    first = [order.by_chunks(ends, 0, epoch, 0, 1, 10, 5)[0, 0] for epoch in range(400)]
    pairs = [
        bool(abs(np.diff(np.argsort(order.by_chunks(ends, 0, epoch, 0, 1, 10, 5)[0])[:2])) == 1)
        for epoch in range(400)
    ]

    counts = np.bincount(first, minlength=10)
    assert counts.min() > 15  # 40 expected
    assert counts.max() < 75
    assert 40 < sum(pairs) < 125  # two of ten are neighbours in a fifth of all orders: 80 expected


def test_by_chunks_seed_epoch_and_rank_change_the_order_within_windows_and_the_same_repeat_it():
    ends = ends_of([50] * 20)
    plan = order.by_chunks(ends, 1, 0, 0, 1, 50, 4)

    np.testing.assert_array_equal(plan, order.by_chunks(ends.copy(), 1, 0, 0, 1, 50, 4))
    for other in (
        order.by_chunks(ends, 2, 0, 0, 1, 50, 4),
        order.by_chunks(ends, 1, 1, 0, 1, 50, 4),
    ):
        assert (plan != other).mean() > 0.9
    # Of one chunk, all ranks' windows would be shuffled alike were rank not in the stream.
    one = ends_of([400])
    here, there = (order.by_chunks(one, 1, 0, rank, 2, 50, 1).reshape(-1) for rank in (0, 1))
    assert (here != there - 200).mean() > 0.9


def test_by_chunks_asking_for_an_epoch_s_order_again_copies_nothing_and_another_list_is_another():
    ends = ends_of([50] * 4)
    once, again = (order.by_chunks(ends, 3, 0, 0, 2, 16, 2) for _ in range(2))
    other = order.by_chunks(ends_of([20] * 10), 3, 0, 0, 2, 16, 2)

    assert np.shares_memory(once, again)
    assert not once.flags.writeable
    assert (once != other).any()
