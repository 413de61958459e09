"""Objectives: one file for each pretext task, named by a recipe as `objective.use`.

A file here offers `Options`, a frozen keyword-only dataclass whose defaults are the paper's and
whose `__post_init__` refuses wrong values, and `class Objective(nn.Module)`:
    __init__(backbone, options, *, images, classes, seed): `images` counts the rows listed,
        `classes` the labelled classes (0: none). Keeps `self.backbone` and owns its heads.
    forward(<the outputs of the recipe's graph, by name>) -> (loss, metrics): a scalar to minimise
        and detached scalar tensors on the same device, never read here (.item() waits for it).
    finish_step(): called once after every optimizer step; forward may run several times before.
All parameters that require a gradient must get one at every call. tests/test_pirl.py checks all.
"""
