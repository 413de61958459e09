"""The order plan: every image once, equal steps on every rank, a pure function of numbers."""

import numpy as np
import pytest

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
