"""What a checkpoint of some processes means to another number of them."""

import numpy as np
import pytest
import torch

from fastssl import regrouping

SAVED = {"processes": 4, "train.accumulate": 2, "train.batch": 64}


@pytest.mark.parametrize("before", [1, 2, 3, 4, 6, 12])
@pytest.mark.parametrize("world", [1, 2, 3, 4, 6, 12])
def test_a_step_planned_for_other_processes_keeps_its_images(before, world):
    whole = np.arange(5 * 12).reshape(5, 12)
    planned = np.split(whole, before, axis=1)
    pieces = []
    for rank in range(world):
        plans = [planned[other] for other in regrouping.sources(before, rank, world)]
        pieces.append(regrouping.piece(plans, before, rank, world))
        assert len(plans) <= -(-before // world) + 1  # no more than it needs is planned

    assert [piece.shape for piece in pieces] == [(5, 12 // world)] * world
    np.testing.assert_array_equal(np.concatenate(pieces, axis=1), whole)


def test_the_same_processes_keep_their_own_plan():
    assert [list(regrouping.sources(3, rank, 3)) for rank in range(3)] == [[0], [1], [2]]


@pytest.mark.parametrize(
    ("here", "free"),
    [
        ((4, 2), ("processes", "train.accumulate")),  # the same
        ((2, 4), ("processes", "train.accumulate")),  # a pass stays as large
        ((8, 1), ("processes", "train.accumulate")),
        ((2, 2), ("processes",)),
        ((4, 1), ("processes",)),  # batch normalisation would see other passes, for no need
    ],
)
def test_processes_may_differ_and_parts_only_if_a_pass_stays_as_large(here, free):
    now = {**SAVED, "processes": here[0], "train.accumulate": here[1]}

    assert regrouping.may_differ(SAVED, now) == free
    assert regrouping.is_regrouped(SAVED, now) == (here != (4, 2))


def test_the_line_for_the_user_names_processes_and_images_of_a_pass():
    line = regrouping.told(SAVED, {**SAVED, "processes": 2})

    assert line.startswith("processes: 4 before, 2 now; a pass has 16 images in place of 8: each")
    assert "random augmentation begins anew" in line
    same = regrouping.told(SAVED, {**SAVED, "processes": 2, "train.accumulate": 4})
    assert same.startswith("processes: 4 before, 2 now: each image is still seen once an epoch")


def test_skip_lists_of_all_processes_are_joined():
    ranks = [{"loader": {"skipped": some}} for some in ({3: "a"}, {}, {7: "b", 1: "c"})]

    assert regrouping.skipped(ranks) == {3: "a", 7: "b", 1: "c"}


@pytest.mark.parametrize("parts_now", [1, 2, 3])
def test_losses_since_the_last_line_are_joined_to_means_of_a_step(parts_now):
    def saved(*losses: float) -> dict:
        lines = [(torch.tensor(float(x)), {"std": torch.tensor(10.0 * x)}) for x in losses]
        return {"recent": lines}

    # two processes, two parts a step, three steps
    ranks = [saved(1, 2, 5, 5, 0, 1), saved(3, 6, 5, 5, 2, 1)]
    joined = regrouping.recent(ranks, parts=2, parts_now=parts_now)

    assert [loss.item() for loss, _ in joined] == sorted([3, 5, 1] * parts_now, key=[3, 5, 1].index)
    assert [values["std"].item() for _, values in joined] == [
        10 * loss.item() for loss, _ in joined
    ]


def test_where_nothing_was_logged_since_nothing_is_joined():
    assert regrouping.recent([{"recent": []}, {"recent": []}], parts=2, parts_now=1) == []
