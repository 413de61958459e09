"""What has no classifier says why, and what to do."""

import json

import pytest
from torch import nn

from fastssl import classifier
from fastssl.backbones import resnet
from fastssl.config import RecipeError
from tests.finished_run import RECIPE, a_run

SUPERVISED = {"objective": {"use": "fastssl.objectives.supervised", "label_smoothing": 0.0}}


@pytest.mark.parametrize(
    ("recipe", "message"),
    [
        (RECIPE, r"no head.safetensors: fastssl.objectives.rotation learns no classes; .*finetune"),
        (SUPERVISED, r"no head.safetensors, and .*supervised leaves one: copy it from the run fol"),
        (None, r"backbone.json has no recipe; fastssl/finetune.py train.weights=.*run adds a head"),
        ({"objective": {"use": "nowhere.at_all"}}, r"there is no module nowhere.at_all: install"),
    ],
)
def test_a_run_without_a_head_is_told_by_what_it_learns(tmp_path, recipe, message):
    a_run(tmp_path / "run", resnet, resnet.Options(name="resnet10", width=8), recipe=recipe)
    with pytest.raises(RecipeError, match=message):
        classifier.load(tmp_path / "run")


def test_an_objective_of_another_version_is_named(tmp_path):
    a_run(tmp_path / "run", resnet, resnet.Options(name="resnet10", width=8), recipe=SUPERVISED)
    classifier.save_head(tmp_path / "run", nn.Linear(64, 2), ["a", "b"])
    path = tmp_path / "run" / "backbone.json"
    card = json.loads(path.read_text())
    card["recipe"]["objective"]["temperature"] = 1
    path.write_text(json.dumps(card))
    with pytest.raises(RecipeError, match=r"of its recipe can't be made again: .*temperature"):
        classifier.load(tmp_path / "run")
