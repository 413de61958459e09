"""Logistic regression: against scikit-learn, by two processes, in blocks; SGD against loops."""

import json
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sklearn.linear_model import LogisticRegression
from torch import nn

from fastssl.linear import logistic, logistic_sgd
from fastssl.linear.protocols import K19, PROTOCOLS, Options, Sgd
from tests import shared_probe
from tests.shared_probe import CLASSES, SGD, fit, head_for, problem, rows, train_by_sgd


def objective(weight, bias, features, labels, l2: float) -> float:
    """Written down again: the mean cross-entropy + l2 / 2 |W|^2."""
    scores = np.asarray(features) @ np.asarray(weight).T + np.asarray(bias)
    losses = np.log(np.exp(scores).sum(axis=1)) - scores[np.arange(len(labels)), labels]
    return float(losses.mean() + l2 / 2 * (np.asarray(weight) ** 2).sum())


@pytest.mark.parametrize("l2", [0.3, 0.02, 0.001])
def test_lbfgs_finds_the_weights_of_scikit_learn(l2):
    features, labels = problem()
    ours = fit(features, labels, l2=l2)
    theirs = LogisticRegression(C=1 / (len(labels) * l2), tol=1e-10, max_iter=5000)
    theirs.fit(features, labels)

    # A bias more for every class changes no probability: both are compared around their mean.
    assert ours.weight.numpy() == pytest.approx(theirs.coef_, abs=1e-5)
    intercepts = np.asarray(theirs.intercept_)
    biases = (ours.bias - ours.bias.mean()).numpy()
    assert biases == pytest.approx(intercepts - intercepts.mean(), abs=1e-5)
    val, val_labels = problem(seed=1)
    found = logistic.predict(rows(val, val_labels), logistic.scores_of(ours, None))
    assert found.classes.tolist() == np.asarray(theirs.predict(val)).tolist()
    assert ours.gradient <= 1e-7


def test_the_objective_is_mean_cross_entropy_and_half_l2_with_free_biases():
    features, labels = problem()
    found = fit(features, labels, l2=0.05)

    assert found.objective == pytest.approx(
        objective(found.weight, found.bias, features, labels, 0.05), rel=1e-12
    )
    # Where classes are all that counts, biases alone reach the frequencies, whatever l2.
    blank = fit(np.zeros((203, 3)), labels, l2=1e3)
    shares = np.bincount(labels) / len(labels)
    assert blank.bias.softmax(dim=0).numpy() == pytest.approx(shares, abs=1e-7)


@pytest.mark.parametrize("memory", [0.0, 1e9], ids=["from the file", "kept"])
@pytest.mark.parametrize("block", [1, 13, 202, 203])
def test_blocks_of_a_mapped_file_change_nothing(tmp_path, block, memory):
    features, labels = problem()
    np.save(tmp_path / "features.npy", features)
    mapped = np.load(tmp_path / "features.npy", mmap_mode="r")
    found = fit(mapped, labels, updates=20, block=block, memory=memory)
    whole = fit(features, labels, updates=20)

    assert found.weight.numpy() == pytest.approx(whole.weight.numpy(), abs=1e-10)
    assert found.passes == whole.passes


def test_float16_features_are_computed_with_in_float32():
    features, labels = problem()
    half = features.astype(np.float16)
    found = fit(half, labels, tolerance=1e-5)

    assert found.weight.numpy() == pytest.approx(
        fit(half.astype(np.float64), labels).weight.numpy(), abs=1e-4
    )


def test_updates_are_bounded_and_passes_are_counted():
    features, labels = problem()
    found = fit(features, labels, updates=3, tolerance=0.0)

    assert found.updates == 3
    assert 3 <= found.passes <= 3 * 2 + 2
    assert found.objective > fit(features, labels).objective


def test_standardised_features_have_mean_0_and_deviation_1_and_constants_stay_finite():
    features, labels = problem()
    features = features * np.array([1, 10, 100, 1e-3, 1, 1, 0]) + 5
    part = rows(features, labels, block=50)
    standard = logistic.standard_of(part)

    assert standard.mean.numpy() == pytest.approx(features.mean(axis=0))
    assert standard.std.numpy()[:-1] == pytest.approx(features.std(axis=0)[:-1])
    assert standard.std[-1] == 1
    found = logistic.fit(
        part, classes=CLASSES, l2=0.02, updates=800, tolerance=1e-9, standard=standard
    )
    scaled = (features - features.mean(axis=0)) / np.where(
        features.std(axis=0) > 1e-9, features.std(axis=0), 1
    )
    assert found.weight.numpy() == pytest.approx(fit(scaled, labels).weight.numpy(), abs=1e-6)
    assert (
        logistic.predict(part, logistic.scores_of(found, standard)).classes
        == logistic.predict(
            rows(scaled, labels), logistic.scores_of(fit(scaled, labels), None)
        ).classes
    ).all()


@pytest.mark.parametrize("count", [1, 7, 203])
@pytest.mark.parametrize("block", [1, 5, 1000])
def test_n_images_give_n_predictions(count, block):
    features, labels = problem(count)
    weight = np.random.default_rng(3).normal(size=(9, 7))
    found = logistic.predict(
        rows(features, labels, block=block), lambda x: x @ torch.from_numpy(weight).T
    )
    order = np.argsort(-(features @ weight.T), axis=1)

    assert found.classes.shape == found.in_five.shape == (count,)
    assert found.classes.tolist() == order[:, 0].tolist()
    assert found.in_five.tolist() == (order[:, :5] == labels[:, None]).any(axis=1).tolist()


def test_fewer_than_five_classes_are_all_among_the_five_likeliest():
    features, labels = problem(9)
    found = logistic.predict(rows(features, labels), lambda x: x[:, :CLASSES])

    assert found.in_five.all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_a_feature_that_is_no_number_is_named(bad):
    features, labels = problem()
    features[150, 3] = bad
    with pytest.raises(ValueError, match="pool: the features of row 150 are NaN or infinite"):
        fit(features, labels, block=40)
    for memory in (1e9, 4000.0):
        with pytest.raises(ValueError, match="row 150 are NaN or infinite"):
            train_by_sgd(features, labels, replace(SGD, epochs=1), memory=memory)


def test_one_class_labels_of_another_type_or_number_are_refused():
    features, labels = problem()
    with pytest.raises(ValueError, match="at least 2 classes"):
        logistic.fit(rows(features, labels * 0), classes=1, l2=1.0, updates=1, tolerance=0.0)
    with pytest.raises(ValueError, match="labels are int32, not int64"):
        rows(features, labels.astype(np.int32))
    with pytest.raises(ValueError, match="203 features for 202 labels"):
        rows(features, labels[1:])


# By SGD.


@pytest.mark.parametrize("memory", [1e9, 60 * 7 * 8.0], ids=["resident", "windows"])
def test_sgd_reaches_the_objective_of_lbfgs_and_of_scikit_learn(memory):
    features, labels = problem()
    l2 = 0.02
    sgd = replace(SGD, epochs=140, batch=100, weight_decay=l2, milestones=(60.0, 90.0, 120.0))
    head, _ = train_by_sgd(features, labels, sgd, memory=memory)
    weight, bias = head.last.weight.detach().numpy(), head.last.bias.detach().numpy()
    best = fit(features, labels, l2=l2)
    theirs = LogisticRegression(C=1 / (len(labels) * l2), tol=1e-10, max_iter=5000)
    theirs.fit(features, labels)

    reached = objective(weight, bias, features, labels, l2)
    assert best.objective <= reached <= best.objective * 1.002
    val, val_labels = problem(seed=1)
    found = logistic.predict(rows(val, val_labels), lambda x: head(x).detach())
    assert (found.classes == theirs.predict(val)).mean() > 0.98


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"hidden": 11},
        {"batchnorm": True, "nesterov": True, "weight_decay": 0.01, "decay_bias": True},
        {"milestones": (2.0, 3.0), "gamma": 0.2, "weight_decay": 0.01},
    ],
    ids=["linear", "mlp", "goyal", "milestones"],
)
def test_training_is_that_of_a_hand_written_loop(changes):
    features, labels = problem(90)
    sgd = replace(SGD, **changes)
    head, _ = train_by_sgd(features, labels, sgd)

    start = head_for(sgd)
    layers = [layer for layer in (start.hidden, start.last) if layer is not None]
    norm = [nn.BatchNorm1d(7, affine=False, dtype=torch.float64)] if sgd.batchnorm else []
    middle = [nn.ReLU()] if sgd.hidden else []
    network = nn.Sequential(*norm, *layers[:-1], *middle, layers[-1])
    decayed = [each for each in network.parameters() if each.ndim == 2 or sgd.decay_bias]
    free = [each for each in network.parameters() if each.ndim == 1 and not sgd.decay_bias]
    groups = [{"params": decayed, "weight_decay": sgd.weight_decay}, {"params": free}]
    optimizer = torch.optim.SGD(
        [group for group in groups if group["params"]],
        lr=sgd.lr * sgd.batch / 256,
        momentum=0.9,
        nesterov=sgd.nesterov,
    )
    schedule = torch.optim.lr_scheduler.MultiStepLR(
        optimizer, [int(each) for each in sgd.milestones], sgd.gamma
    )
    for epoch in range(sgd.epochs):
        plan = logistic_sgd.positions(90, seed=0, epoch=epoch, batch=20, window=1000)
        for batch in plan:
            optimizer.zero_grad()
            scores = network(torch.from_numpy(features[batch]))
            F.cross_entropy(scores, torch.from_numpy(labels[batch])).backward()
            optimizer.step()
        schedule.step()

    assert not head.training
    val = torch.from_numpy(problem(31, seed=1)[0])
    expected = network.eval()(val).detach().numpy()
    assert head(val).detach().numpy() == pytest.approx(expected, abs=1e-9)


def test_dropout_zeroes_its_part_of_the_hidden_layer_in_training_only():
    sgd = replace(SGD, hidden=400, dropout=0.25)
    head = head_for(sgd)
    with torch.no_grad():
        head.last.weight.fill_(1.0)
        head.last.bias.zero_()
        assert head.hidden is not None
        head.hidden.weight.zero_()
        head.hidden.bias.fill_(1.0)
    x = torch.zeros(50, 7, dtype=torch.float64)
    kept = head(x)[:, 0] * 0.75 / 400

    assert kept.mean().item() == pytest.approx(0.75, abs=0.01)
    assert kept.std().item() > 0.01  # each image its own
    assert (head.eval()(x) == 400).all()


@pytest.mark.parametrize("window", [1000, 203, 100, 40])
@pytest.mark.parametrize("batch", [1, 20, 203])
def test_an_epoch_has_every_row_once_and_the_last_batch_is_filled_from_its_start(batch, window):
    plan = logistic_sgd.positions(203, seed=0, epoch=3, batch=batch, window=window)
    flat = plan.ravel()

    assert plan.shape == (-(-203 // batch), batch)
    assert sorted(flat[:203]) == list(range(203))
    assert flat[203:].tolist() == flat[: len(flat) - 203].tolist()
    other = logistic_sgd.positions(203, seed=0, epoch=4, batch=batch, window=window)
    assert other.ravel()[:203].tolist() != flat[:203].tolist()


def test_a_window_mixes_rows_of_the_whole_listing():
    plan = logistic_sgd.positions(64 * 200, seed=0, epoch=0, batch=64 * 20, window=64 * 20)

    for batch in plan:  # of 10 classes in order of the listing
        assert len(np.unique(batch // (64 * 20))) >= 5


def test_batches_that_cannot_be_made_are_refused():
    features, labels = problem()
    with pytest.raises(ValueError, match=r"batch \(512\) is more than the 203 .*linear.batch=128"):
        train_by_sgd(features, labels, replace(K19, augment="none"))


def test_a_rate_that_is_too_high_is_told_and_not_a_traceback():
    features, labels = problem()
    with pytest.raises(ValueError, match=r"loss is (nan|inf).*give a lower linear.lr"):
        train_by_sgd(features * 1e6, labels, replace(SGD, lr=1e30, weight_decay=1.0, epochs=3))


# Two processes.


def test_two_processes_find_what_one_does(checkout, environ):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run(
        [*launcher, "-m", "tests.shared_probe"],
        env=environ,
        cwd=checkout,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    two, one = json.loads(done.stdout.splitlines()[-1]), shared_probe.work()

    assert two.keys() == one.keys()
    assert two["predicted"] == one["predicted"]
    assert two["in_five"] == one["in_five"]
    for key in ("weight", "objective", "std", "losses", "scores", "windows"):
        assert np.array(two[key]) == pytest.approx(np.array(one[key]), abs=1e-8), key


# Options.


def sgd_of(**options) -> Sgd:
    made = Options(**options).sgd()
    assert made is not None
    return made


def test_protocols_are_the_papers():
    def told(name: str) -> tuple:
        sgd = sgd_of(protocol=name)
        return sgd.epochs, sgd.batch, sgd.lr, sgd.milestones, sgd.weight_decay, sgd.augment

    assert told("goyal") == (28, 256, 0.01, (8, 16, 24), 5e-4, "crop")
    assert told("vissl") == told("goyal")
    assert told("pirl") == (28, 256, 0.01, (28 / 3, 56 / 3), 1e-4, "crop")
    assert told("k19") == (70, 512, 0.1, (30, 50), 0, "random_crop")
    assert told("k19_long") == (520, 2048, 0.1, (480, 500), 0, "random_crop")
    assert told("mlp") == (180, 512, 0.01, (60, 120), 0, "none")
    assert (sgd_of(protocol="mlp").hidden, sgd_of(protocol="mlp").dropout) == (1000, 0.5)
    assert Options().sgd() is None
    trained_by_sgd = {name for name, preset in PROTOCOLS.items() if preset is not None}
    assert trained_by_sgd == {"goyal", "vissl", "pirl", "k19", "k19_long", "mlp"}


def test_milestones_follow_another_number_of_epochs_unless_they_are_given():
    whole = sgd_of(protocol="goyal")
    places = sgd_of(protocol="goyal", epochs=14)

    assert places == replace(whole, epochs=14, milestones=(4, 8, 12))
    assert sgd_of(protocol="goyal", epochs=14, milestones=(3.0,)).milestones == (3,)
    linear = sgd_of(protocol="mlp", hidden=0)
    assert linear == replace(sgd_of(protocol="mlp"), hidden=0, dropout=0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 3}, r"epochs \(3\) is not read with protocol lbfgs: give a protocol .*k19"),
        ({"hidden": 1000, "dropout": 0.5}, r"hidden \(1000\) is not read .*mlp"),
        ({"seeds": (0, 1)}, r"seeds \(\(0, 1\)\) is not read with protocol lbfgs"),
        ({"protocol": "k19", "l2": 0.1}, r"l2 \(0.1\) is not read with protocol k19: leave it out"),
        ({"protocol": "k19", "dropout": 0.5}, r"dropout \(0.5\) is not read without a hidden"),
        ({"protocol": "k19", "decay_bias": True}, "decay_bias is not read when weight_decay is 0"),
        ({"protocol": "k19", "milestones": (30.0, 70.0)}, r"milestones .*before the end of 70"),
        ({"protocol": "k19", "milestones": (30.0, 20.0)}, r"milestones .*must ascend"),
        ({"protocol": "k19", "lr": 0.0}, r"lr \(0.0\) must be above 0"),
        ({"protocol": "k19", "epochs": 0, "milestones": ()}, r"epochs \(0\) and batch"),
        ({"protocol": "goyal", "batch": 1}, "batchnorm needs a batch of at least 2"),
        ({"protocol": "goyal", "momentum": 0.0}, r"momentum \(0.0\) must be above 0 when nesterov"),
        ({"protocol": "k19", "seeds": (1, 1)}, r"seeds \(\[1, 1\]\) must be different"),
        ({"protocol": "k19", "standardize": True}, "standardize .*needs cached features"),
        ({"updates": 0}, r"updates \(0\) must be at least 1"),
        ({"l2": -1.0}, r"l2 \(-1.0\) must be at least 0"),
        ({"memory_gb": 0.0}, r"memory_gb \(0.0\) must be above 0"),
    ],
)
def test_options_that_cannot_be_or_are_not_read_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Options(**options)
