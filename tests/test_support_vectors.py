"""SVMs: average precision by hand and by scikit-learn, VISSL's choice of C, worker processes."""

import sys

import numpy as np
import pytest
from sklearn.metrics import average_precision_score
from sklearn.model_selection import cross_val_score
from sklearn.svm import LinearSVC

from fastssl import support_vectors
from fastssl.support_vectors import Settings

COSTS = (0.01, 1.0, 10.0)
Images = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]  # and labels: train, test


@pytest.fixture
def problem() -> Images:
    """60 + 50 images of 12 features, weakly told apart; ignored (0) ones among them."""
    random = np.random.default_rng(3)
    labels = random.choice([1, -1, -1, 0], size=110).astype(np.int8)
    features = random.normal(size=(110, 12)).astype(np.float32)
    features[:, 0] += 0.8 * (labels == 1)
    return features[:60], labels[:60], features[60:], labels[60:]


def slow_interpolated(positive, scores):
    """For each positive: the best precision of any threshold that finds at least as many."""
    total, area = positive.sum(), 0.0
    for found in range(1, total + 1):
        best = 0.0
        for threshold in scores:
            taken = scores >= threshold
            if positive[taken].sum() >= found:
                best = max(best, positive[taken].sum() / taken.sum())
        area += best / total
    return area


def plain_svm(cost):
    return LinearSVC(
        C=cost,
        class_weight={1: 2, -1: 1},
        dual=True,  # pyright: ignore[reportArgumentType]  # the stubs know the newer "auto" alone
        tol=1e-4,
        max_iter=2000,
        random_state=0,
    )


def test_interpolated_precision_of_five_images_by_hand():
    positive = np.array([True, False, True, False, True])
    scores = np.array([5.0, 4.0, 3.0, 2.0, 1.0])

    # precision at the positives: 1, 2/3, 3/5; none is raised by a later one
    assert support_vectors.interpolated_precision(positive, scores) == pytest.approx(34 / 45)
    # at 1/2, 2/3 the first is raised to 2/3
    late = np.array([False, True, True])
    assert support_vectors.interpolated_precision(late, np.array([3.0, 2, 1])) == pytest.approx(
        2 / 3
    )
    assert average_precision_score(late, [3, 2, 1]) == pytest.approx((1 / 2 + 2 / 3) / 2)


def test_equal_scores_count_together():
    positive = np.array([True, False, False, True])

    assert support_vectors.interpolated_precision(positive, np.zeros(4)) == 0.5
    assert np.isnan(support_vectors.interpolated_precision(np.zeros(2, bool), np.zeros(2)))


@pytest.mark.parametrize("ties", [True, False])
def test_interpolated_precision_is_that_of_its_definition(ties):
    random = np.random.default_rng(int(ties))
    for _ in range(20):
        positive = random.random(25) < 0.4
        scores = random.integers(0, 8, 25) if ties else random.random(25)

        ours = support_vectors.interpolated_precision(positive, scores)
        assert ours == pytest.approx(slow_interpolated(positive, scores), abs=1e-12)
        assert ours >= average_precision_score(positive, scores) - 1e-12


def test_a_class_is_fitted_as_a_plain_loop_over_scikit_learn_does(problem: Images):
    train, train_labels, test, test_labels = problem
    fitted = support_vectors.fit_class(*problem, Settings(costs=COSTS))

    x = train.astype(float) / (np.linalg.norm(train.astype(float), axis=1, keepdims=True) + 1e-5)
    z = test.astype(float) / (np.linalg.norm(test.astype(float), axis=1, keepdims=True) + 1e-5)
    y = np.where(train_labels == 1, 1, -1)
    means = [
        cross_val_score(plain_svm(cost), x, y, cv=3, scoring="average_precision").mean()
        for cost in COSTS
    ]
    chosen = COSTS[int(np.argmax(means))]
    scores = plain_svm(chosen).fit(x, y).decision_function(z)
    kept = test_labels != 0
    assert fitted.cost == chosen
    assert fitted.cross_validated == pytest.approx(means)
    np.testing.assert_allclose(fitted.scores, scores, rtol=1e-5)
    plain = average_precision_score(test_labels[kept] == 1, scores[kept])
    assert fitted.average_precision == pytest.approx(plain)
    assert fitted.interpolated == pytest.approx(
        slow_interpolated(test_labels[kept] == 1, scores[kept])
    )
    assert (fitted.fits, fitted.unfinished) == (10, 0)


def test_ignored_images_are_negatives_to_learn_from_and_no_test_images(problem: Images):
    train, train_labels, test, test_labels = problem
    assert (train_labels == 0).any()
    assert (test_labels == 0).any()
    settings = Settings(costs=(1.0,))
    fitted = support_vectors.fit_class(*problem, settings)
    as_negatives = np.where(train_labels == 0, -1, train_labels)
    kept = test_labels != 0
    same = support_vectors.fit_class(train, as_negatives, test[kept], test_labels[kept], settings)

    assert same.interpolated == fitted.interpolated
    np.testing.assert_array_equal(same.scores, fitted.scores[kept])


def test_a_class_without_test_images_has_scores_and_no_precision(problem: Images):
    train, train_labels, test, test_labels = problem
    absent = np.full_like(test_labels, -1)
    fitted = support_vectors.fit_class(train, train_labels, test, absent, Settings(costs=(1.0,)))
    there = support_vectors.fit_class(*problem, Settings(costs=(1.0,)))

    assert np.isnan([fitted.interpolated, fitted.average_precision]).all()
    np.testing.assert_array_equal(fitted.scores, there.scores)


def test_of_one_cost_nothing_is_chosen(problem: Images):
    fitted = support_vectors.fit_class(*problem, Settings(costs=(1.0,)))

    assert (fitted.cost, fitted.cross_validated, fitted.fits) == (1.0, (), 1)


def test_fits_that_stop_early_are_counted_and_raise_no_warning(problem: Images):
    fitted = support_vectors.fit_class(*problem, Settings(costs=(1.0, 1000.0), max_iter=1))

    assert fitted.unfinished == fitted.fits == 7


def test_few_shots_are_fitted_as_a_plain_loop_does(problem: Images):
    train, train_labels, test, test_labels = problem
    draws = [
        support_vectors.draw(train_labels, positives=4, negatives=12, seed=(0, 4, each))
        for each in range(2)
    ]
    areas, unfinished = support_vectors.fit_few(
        train, train_labels, test, test_labels, Settings(costs=COSTS), draws
    )

    assert areas.shape == (2, 3)
    assert unfinished == 0
    kept = test_labels != 0
    for rows, row in zip(draws, areas, strict=True):
        assert [(train_labels[rows] == value).sum() for value in (1, 0, -1)] == [4, 0, 12]
        for cost, area in zip(COSTS, row, strict=True):
            x = support_vectors.unit(train[rows])
            scores = (
                plain_svm(cost)
                .fit(x, train_labels[rows])
                .decision_function(support_vectors.unit(test))
            )
            wanted = slow_interpolated(test_labels[kept] == 1, scores[kept])
            assert area == pytest.approx(wanted)


def test_draws_differ_by_seed_and_repeat_with_it():
    labels = np.array([1] * 30 + [-1] * 30)
    one, two, again = (
        support_vectors.draw(labels, positives=5, negatives=9, seed=(0, each)) for each in (1, 2, 1)
    )

    assert one.tolist() == again.tolist() != two.tolist()
    assert len(np.unique(one)) == 14
    assert len(support_vectors.draw(labels, positives=5, negatives=99, seed=(0,))) == 35
    with pytest.raises(ValueError, match="30 positive images, 31 are wanted"):
        support_vectors.draw(labels, positives=31, negatives=1, seed=(0,))


def test_worker_processes_give_what_one_process_gives_in_order(problem: Images):
    settings = Settings(costs=COSTS)
    calls = [(*problem, settings), (problem[0], -problem[1], *problem[2:], settings)]
    said = []
    alone = support_vectors.over_cores(
        support_vectors.fit_class, calls, workers=1, done=lambda _: None
    )
    both = support_vectors.over_cores(support_vectors.fit_class, calls, workers=2, done=said.append)

    assert said == [1, 2]
    for here, there in zip(alone, both, strict=True):
        assert (here.cost, here.interpolated) == (there.cost, there.interpolated)
        np.testing.assert_allclose(here.scores, there.scores, rtol=1e-5)


def test_as_many_svms_at_once_as_memory_allows():
    assert support_vectors.workers_for(100, 100, asked=1, processes_here=1) == 1
    with pytest.raises(ValueError, match=r"1,000,000,000 images x 2,048 features needs 61440"):
        support_vectors.workers_for(10**9, 2048, asked=None, processes_here=1)


def test_without_scikit_learn_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sklearn.svm", None)

    with pytest.raises(ValueError, match=r"pip install 'fastssl\[evaluate\]'"):
        support_vectors.require()
