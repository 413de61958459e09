"""Objectives: one file for each pretext task, named by a recipe as `objective.use`.

A file here offers `Options`, a frozen keyword-only dataclass whose defaults are the paper's and
whose `__post_init__` refuses wrong values, and `class Objective(nn.Module)`:
    __init__(backbone, options, *, images, classes, labels, seed): `images` counts the rows listed,
        `classes` the values of the graph's output `label` (0: none), `labels` is the folder class
        of every row, int64 [images] on the CPU, or None. Keeps `self.backbone`, owns its heads.
    forward(<the outputs of the recipe's graph, by name>) -> (loss, metrics): a scalar to minimise
        and detached scalar tensors on the same device, never read here (.item() waits for it);
        `accuracy` of the pretext task and its `chance` level among them. A parameter with a
        default is an output that some graphs lack; `takes(options)`, beside the class, then names
        those that these options need.
    scores(image) -> [B, classes]: only of an objective that learns the folder's classes: train.py
        then tells its accuracy on the val split and leaves `self.head` as head.safetensors.
    finish_step(): called once after every optimizer step; forward may run several times before.
All parameters that require a gradient must get one at every call. With several processes,
loss and gradient (averaged, as DDP does) are those of one with the joined batch.
tests/test_objectives.py checks all.
"""
