"""kNN: votes against a slow version and scikit-learn's, in blocks, and as a command."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier

from fastssl.evaluations import knn
from fastssl.neighbours import nearest, votes

CPU = torch.device("cpu")


def slow_knn(train, labels, val, neighbours: int, temperature: float, classes: int) -> list[int]:
    predicted = []
    for one in val.tolist():
        similar = [sum(a * b for a, b in zip(one, row, strict=True)) for row in train.tolist()]
        nearest = sorted(range(len(similar)), key=lambda row: -similar[row])[:neighbours]
        votes = [0.0] * classes
        for row in nearest:
            votes[int(labels[row])] += math.exp(similar[row] / temperature)
        predicted.append(votes.index(max(votes)))
    return predicted


def blocks(train, labels, size: int):
    return zip(train.split(size), labels.split(size), strict=True)


def slow_top5(train, labels, val, val_labels, neighbours: int, temperature: float) -> float:
    hits = 0
    for one, true in zip(val, val_labels, strict=True):
        similar = [one @ row / np.linalg.norm(one) / np.linalg.norm(row) for row in train]
        votes = {}
        for row in sorted(range(len(similar)), key=lambda row: -similar[row])[:neighbours]:
            label = int(labels[row])
            votes[label] = votes.get(label, 0.0) + math.exp(similar[row] / temperature)
        hits += int(true) in sorted(votes, key=lambda label: -votes[label])[:5]
    return hits / len(val)


@pytest.mark.parametrize("neighbours", [1, 5, 37])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
@pytest.mark.parametrize(("size", "rows"), [(37, 1024), (4, 3), (1, 1)])
def test_votes_are_those_of_a_slow_version(neighbours, temperature, size, rows):
    generator = torch.Generator().manual_seed(neighbours)
    train = F.normalize(torch.randn(37, 6, generator=generator, dtype=torch.float64), dim=1)
    val = F.normalize(torch.randn(11, 6, generator=generator, dtype=torch.float64), dim=1)
    labels = torch.randint(0, 4, (37,), generator=generator)
    found = nearest(blocks(train, labels, size), val, 37, rows=rows)
    given = votes(*found, neighbours=[1, 5, 37], temperature=temperature, classes=4)
    predicted = given[neighbours].argmax(dim=1)

    assert predicted.tolist() == slow_knn(train, labels, val, neighbours, temperature, 4)


def test_near_neighbours_outvote_many_far_ones_at_a_low_temperature_only():
    train = F.normalize(torch.tensor([[1.0, 0.0], [0.9, 0.5], [0.9, 0.5]]), dim=1)
    labels, val = torch.tensor([0, 1, 1]), torch.tensor([[1.0, 0.0]])
    found = nearest([(train, labels)], val, 3)
    predicted = [
        votes(*found, neighbours=[3], temperature=temperature, classes=2)[3].argmax().item()
        for temperature in (0.07, 10.0)
    ]

    assert predicted == [0, 1]


def problem(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Features of overlapping classes and their labels: train, then val."""
    draw = np.random.default_rng(seed)
    centres = draw.normal(size=(7, 5))
    labels, of_val = draw.integers(0, 7, 203), draw.integers(0, 7, 41)
    train = (centres[labels] + draw.normal(size=(203, 5))).astype(np.float32)
    val = (centres[of_val] + draw.normal(size=(41, 5))).astype(np.float32)
    return train, labels, val, of_val


def sweep(neighbours, temperatures):
    return knn.sweep(
        *problem(), neighbours=neighbours, temperatures=temperatures, classes=7, device=CPU
    )


def test_a_sweep_is_scikit_learn_s_classifier_for_each_k_and_temperature():
    train, labels, val, of_val = problem()
    found = sweep([11, 1, 40], [0.07, 0.5])
    for (count, temperature), (accuracy, _) in found.items():
        classifier = KNeighborsClassifier(
            count,
            metric="cosine",
            weights=lambda distance, t=temperature: np.exp(-distance / t),  # pyright: ignore[reportArgumentType]  # sklearn has no types
        )

        assert accuracy == pytest.approx(classifier.fit(train, labels).score(val, of_val))
    assert found.keys() == {(k, t) for k in (1, 11, 40) for t in (0.07, 0.5)}


def test_blocks_of_any_size_change_nothing(monkeypatch):
    whole = sweep([3, 20], [0.1])
    monkeypatch.setattr(knn, "_MOST", 10)
    monkeypatch.setattr(knn, "_VAL", 5 * 7)
    monkeypatch.setattr(knn, "_VOTES", 4)

    assert sweep([3, 20], [0.1]) == whole


def test_a_class_without_a_vote_is_not_among_the_five():
    top1, top5 = sweep([1], [0.07])[1, 0.07]
    more = sweep([203], [0.5])[203, 0.5]

    assert top1 == top5  # one neighbour, one class
    assert more[1] > more[0]


def test_the_five_with_most_votes_are_those_of_a_slow_version():
    # Narrow classes of far neighbours: the fifth and the sixth differ by their votes.
    found = sweep([7, 60, 203], [0.07, 0.5])
    slow = {pair: slow_top5(*problem(), *pair) for pair in found}

    assert {pair: top5 for pair, (_, top5) in found.items()} == pytest.approx(slow)
    assert len({*slow.values()}) > 2


def test_float16_and_read_only_features_are_taken():
    train, labels, val, of_val = problem()
    half = train.astype(np.float16)
    half.flags.writeable = False
    found = knn.sweep(
        half, labels, val, of_val, neighbours=[5], temperatures=[0.07], classes=7, device=CPU
    )

    assert found[5, 0.07][0] == pytest.approx(sweep([5], [0.07])[5, 0.07][0], abs=0.05)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"neighbours": ()}, r"neighbours \(\[\]\) must be positive"),
        ({"neighbours": (3, 0)}, r"neighbours \(\[3, 0\]\)"),
        ({"temperature": (0.07, 0.0)}, r"temperature \(\[0.07, 0.0\]\) must be numbers above 0"),
        ({"temperature": ()}, r"temperature \(\[\]\)"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        knn.Options(**options)
