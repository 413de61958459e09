"""A finished run folder with random weights, for tests of what is done with one."""

from types import SimpleNamespace

import torch

from fastssl import backbone_file, trained
from fastssl.config import Part
from pipelines import evaluation

RECIPE = {
    "data": {"use": "pipelines.readers.folder", "root": "/home/me/secret/flowers/train"},
    "objective": {"use": "fastssl.objectives.rotation"},
    "optim": {"name": "sgd", "lr": 0.1, "lr_batch": 256},
    "train": {"batch": 64, "epochs": 4, "seed": 3, "out": "/home/me/secret/runs/one"},
    "probe": {"root": "~/secret/flowers", "neighbours": [20, 200]},
}


def a_run(folder, module, options, graph=evaluation, recipe=RECIPE, **sizes) -> trained.Trained:
    """A finished run with random weights, its statistics moved by a batch."""
    sizes = sizes or {"resize": 72, "crop": 64}
    torch.manual_seed(0)
    backbone = module.backbone(options).train()
    with torch.no_grad():
        backbone(torch.randint(0, 256, (4, 3, 64, 64), dtype=torch.uint8))
    as_run = SimpleNamespace(
        backbone=Part(module.__name__, module, options),
        evaluation=Part(graph.__name__, graph, graph.Options(**sizes)),
        values=recipe,
    )
    backbone_file.save_backbone(folder, backbone, as_run, step=160)  # pyright: ignore[reportArgumentType]
    return trained.load(str(folder))
