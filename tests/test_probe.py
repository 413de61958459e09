"""The kNN probe of a run: every image counted once, and folders that don't fit are named."""

import shutil
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator

from fastssl import labelled, probe, stopping
from fastssl.config import Part
from fastssl.head_probe import HeadProbe
from fastssl.loader import Options
from pipelines import evaluation, evaluation_patches
from pipelines.readers import folder
from tests import few_images, tiny_backbone


@pytest.fixture
def data(tmp_path, demo_images) -> Path:
    """train/ with 3 classes of 7 and val/ with 2 of them, 5 and 4 images: nothing divides."""
    return few_images.copy(demo_images, tmp_path)


def make(root: Path, **options) -> probe.Knn:
    return probe.Knn(
        root,
        probe.Options(**options),
        reader=folder,
        data=folder.Options(root="elsewhere", limit=2),  # training's limit is not the probe's
        graph=evaluation,
        evaluation=evaluation.Options(resize=36, crop=32),
        cache=root / "cache",
        loading=Options(threads=1),
        say=lambda _: None,
    )


def tiny() -> torch.nn.Module:
    torch.manual_seed(0)
    return tiny_backbone.backbone(tiny_backbone.Options())


@pytest.mark.parametrize("batch", [1, 4, 128])
def test_every_image_counts_once_whatever_the_batch_and_k_is_capped(data, batch):
    accelerator = Accelerator(cpu=True)
    backbone = tiny().train()
    found = make(data, batch=batch, neighbours=(3, 200)).accuracies(backbone, accelerator)

    assert found.keys() == {3, 200}
    for value in found.values():
        assert 9 * value == pytest.approx(round(9 * value), abs=1e-5)  # ninths: 9 images, each once
    assert found == pytest.approx(
        make(data, batch=7, neighbours=(3, 200)).accuracies(backbone, accelerator)
    )
    assert backbone.training


class Second(torch.nn.Module):
    """An objective to which every image is of the second class: 5 of the 9 in val are."""

    def scores(self, image: torch.Tensor) -> torch.Tensor:
        return torch.tensor([[0.0, 1.0, 0.0]]).expand(len(image), 3)


def head(root: Path, batch: int) -> HeadProbe:
    _, val, classes = labelled.splits(
        folder, folder.Options(root=str(root)), cache=None, say=lambda _: None
    )
    options = evaluation.Options(resize=36, crop=32)
    graph = Part("pipelines.evaluation", evaluation, options)
    loading = Options(threads=1)
    return HeadProbe(val, classes, graph, batch=batch, loading=loading, say=lambda _: None)


def head_accuracy(root: Path, batch: int) -> float:
    top1, top5 = head(root, batch).accuracies(Second(), Accelerator(cpu=True))

    assert top5 == 1
    return top1


@pytest.mark.parametrize("batch", [2, 128])
@pytest.mark.parametrize(("position", "right"), [(0, 4), (4, 4), (8, 5)])
def test_an_image_that_can_t_be_decoded_lets_none_count_twice(data, batch, position, right):
    file = sorted((data / "val").rglob("*.jpg"))[position]
    few_images.damage(file)
    accelerator = Accelerator(cpu=True)
    knn = make(data, batch=batch, neighbours=(3,)).accuracies(tiny(), accelerator)
    head = head_accuracy(data, batch)
    file.unlink()
    knn_without = make(data, batch=batch, neighbours=(3,)).accuracies(tiny(), accelerator)

    assert head == right / 8
    assert 8 * knn[3] == pytest.approx(round(8 * knn[3]), abs=1e-5)  # eighths: 8 images, each once
    assert 0 < knn[3] < 1
    assert knn == pytest.approx(knn_without)


def test_a_neighbour_that_can_t_be_decoded_lets_none_vote_twice(data):
    files = sorted((data / "train").rglob("*.jpg"))
    few_images.damage(files[8])
    few_images.damage(files[12])
    made = make(data, neighbours=(1,))
    features, labels, counted = made._features(
        made._train, tiny().eval(), Accelerator(cpu=True), lambda: False, is_shared=True
    )

    assert len(features) == len(torch.unique(features, dim=0)) == 19
    assert labels.tolist() == [0] * 7 + [1] * 5 + [2] * 7
    assert counted.all()


def test_a_class_keeps_its_number_when_val_lacks_the_first(data):
    # The training images themselves as val, without the first class: each is its own neighbour.
    shutil.rmtree(data / "val")
    shutil.copytree(data / "train", data / "val")
    shutil.rmtree(sorted((data / "val").iterdir())[0])
    found = make(data, neighbours=(1,)).accuracies(tiny(), Accelerator(cpu=True))

    assert found == {1: 1.0}


def test_only_so_many_training_images_are_used_evenly_spaced(data):
    limited = make(data, images=3, neighbours=(1, 200))
    found = limited.accuracies(tiny(), Accelerator(cpu=True))

    assert found.keys() == {1, 200}
    assert all(0 <= value <= 1 for value in found.values())


def test_a_probe_changes_nothing_in_the_network_or_the_random_state(data):
    backbone = tiny().train()
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    state = torch.get_rng_state()
    make(data).accuracies(backbone, Accelerator(cpu=True))

    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in backbone.state_dict().items())


@pytest.mark.parametrize("asked", [1, 2, 5, 8, 9])  # batches: 6 of train, and 3 of val
def test_a_probe_is_given_up_at_the_batch_at_which_it_is_asked_to(data, asked):
    left = asked

    def stop() -> bool:
        nonlocal left
        left -= 1
        return left == 0

    backbone = tiny().train()
    with pytest.raises(stopping.Stopped):
        make(data, batch=4).accuracies(backbone, Accelerator(cpu=True), stop)

    assert left == 0
    assert backbone.training
    if asked <= 3:
        left, second = asked, Second().train()
        with pytest.raises(stopping.Stopped):
            head(data, batch=4).accuracies(second, Accelerator(cpu=True), stop)
        assert left == 0
        assert second.training


@pytest.mark.parametrize("how", ["joint", "global"])
def test_patches_are_standardised_as_the_objective_does_it(data, how):
    # The training images themselves as val: each is its own neighbour.
    shutil.rmtree(data / "val")
    shutil.copytree(data / "train", data / "val")
    probes = probe.Knn(
        data,
        probe.Options(neighbours=(1,)),
        reader=folder,
        data=folder.Options(root="elsewhere"),
        graph=evaluation_patches,
        evaluation=evaluation_patches.Options(resize=36, crop=36),
        cache=data / "cache",
        loading=Options(threads=1),
        say=lambda _: None,
        standardize=how,
    )
    taken = []

    class Spy(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = torch.nn.Linear(1, 1)  # pixels get the type of the first parameter

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            taken.append(x)
            return x.float().flatten(1)

    found = probes.accuracies(Spy(), Accelerator(cpu=True))

    assert found == {1: 1.0}
    assert taken[0].shape == (9 * 21, 3, 12, 12)
    if how == "joint":
        assert taken[0].mean((1, 2, 3)).abs().max() < 1e-4
    else:
        assert taken[0].dtype == torch.uint8


def test_folders_that_do_not_fit_are_named(data, tmp_path):
    with pytest.raises(ValueError, match=r"probe.root \(.*nowhere\): there is no folder"):
        make(tmp_path / "nowhere")
    stranger = data / "val" / "stranger"
    stranger.mkdir()
    shutil.copy(next((data / "train").glob("*/*.jpg")), stranger)
    with pytest.raises(ValueError, match="lacks: stranger"):
        make(data)
    shutil.copy(next((data / "train").glob("*/*.jpg")), data / "train")
    with pytest.raises(ValueError, match="train has no class folders"):
        make(data)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"every_epochs": -1}, r"every_epochs \(-1\) must be at least 0"),
        ({"neighbours": ()}, r"neighbours \(\[\]\) must be positive"),
        ({"temperature": 0.0}, r"temperature \(0.0\) must be above 0"),
        ({"temperature": 1e-320}, r"temperature \(1e-320\) must be above 0, 0.0001 at least"),
        ({"batch": 0}, r"batch \(0\) must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        probe.Options(**options)


def test_the_folder_around_train_is_probed_where_it_has_a_val(data):
    inferred = probe.folder_of(probe.Options(), folder.Options(root=str(data / "train")))
    named = probe.folder_of(probe.Options(root="/x"), folder.Options(root=str(data / "train")))
    none = probe.folder_of(probe.Options(), folder.Options(root=str(data / "val")))

    assert (inferred, named, none) == (str(data), "/x", None)
