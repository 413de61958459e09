r"""Fine-tunes a trained backbone on a labelled folder: train.py, begun from a RUN's weights.

    accelerate launch fastssl/finetune.py recipes/finetune.yaml train.weights=RUN \
        data.root=PATH/train [section.key=value ...]

RUN is a run folder, a .safetensors, torchvision:NAME, ... (fastssl/trained.py). The backbone and
the preparation of images for evaluation are the RUN's own, in place of the recipe's; of a
.safetensors without a backbone.json beside it they are the recipe's: give backbone.name=NAME. All
else is as in train.py: the run folder, going on after a stop, several processes, exit codes.
"""

import os
import sys
from collections.abc import Sequence
from pathlib import Path

if not __package__:  # run as a script: let imports start at the checkout, not inside fastssl/
    sys.path[0] = str(Path(__file__).resolve().parents[1])
# OpenMP's threads spin while they wait, on cores that the loader's threads need. Read once, when
# torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

from fastssl import config, launcher, train, weights
from fastssl.config import Recipe, RecipeError
from fastssl.recipe_text import in_yaml, is_null, read_file, read_overrides, value


def main(arguments: Sequence[str]) -> int:
    """Runs the recipe named by the command line; returns the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    return train.start(lambda: load(arguments[0], arguments[1:]))


def load(path: str, overrides: Sequence[str]) -> Recipe:
    """The recipe, with what the RUN's card says of its backbone and its evaluation.

    The backbone is the RUN's; the command line may repeat it, and nothing else. The evaluation is
    the RUN's where it has one and both go through the same graph, and so are the pixels that the
    crops are resized to; the command line has precedence.

    Raises:
        RecipeError: no train.weights, no such RUN, a backbone.key that is not the RUN's, or a
            mistake in the recipe.
    """
    run = _weights(path, overrides)
    if weights.names_no_network(run):
        recipe = config.load(path, overrides)
        weights.source(run, recipe.values["backbone"])  # refuses what doesn't fit
        return recipe
    source = weights.source(run, {})
    backbone = {"use": source.use, **source.options}
    instead = {"backbone": backbone}
    use, options = source.preprocessing
    as_written = config.load(path, [each for each in overrides if not _is_of("backbone", each)])
    if use == as_written.evaluation.use and options:  # none: nobody wrote down how it was
        instead["evaluation"] = {"use": use, **options}
    given = [*_sizes(as_written, options if "evaluation" in instead else {}), *overrides]
    recipe = config.load(path, given, instead)
    here = recipe.values["backbone"]
    unlike = [
        f"{key}: {in_yaml(here[key])}, but {in_yaml(_listed(there))} in {run}"
        for key, there in backbone.items()
        if key in here and here[key] != _listed(there)  # another `use` may lack it
    ]
    if unlike:
        raise RecipeError(
            f"command line: backbone.{'; backbone.'.join(unlike)}: the weights fit no other"
            " backbone; leave it out"
        )
    return recipe


def _weights(path: str, overrides: Sequence[str]) -> str:
    """What train.weights says: on the command line, or in the recipe."""
    errors: list[str] = []  # told by config.load, which reads all of it again
    recipe, _ = read_file(path, config.SECTIONS, errors)
    command = read_overrides(overrides, config.SECTIONS, errors)
    entry = {**recipe["train"], **command["train"]}.get("weights")
    if entry is None or is_null(entry.node):
        raise RecipeError(
            f"{path}: train.weights names the RUN to start from: a run folder, a .safetensors or"
            " torchvision:NAME, such as train.weights=runs/pirl_jigsaw (train.py starts from random"
            " weights)"
        )
    return str(value(entry.node))


def _sizes(recipe: Recipe, evaluation: dict) -> list[str]:
    """The size that crops are resized to: that of the images which the RUN is evaluated on."""
    key = "pipeline.image_size"
    if key not in recipe.sources or recipe.sources[key] == "command line":
        return []
    return [f"{key}={evaluation['crop']}"] if "crop" in evaluation else []


def _is_of(section: str, override: str) -> bool:
    return override.startswith(f"{section}.")


def _listed(plain: object) -> object:
    return list(plain) if isinstance(plain, tuple) else plain


if __name__ == "__main__":
    launcher.mend()
    sys.exit(main(sys.argv[1:]))
