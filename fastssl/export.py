"""Takes a trained backbone to another library: written, reloaded there and compared, then kept.

    accelerate launch fastssl/export.py RUN --to torchvision|timm|safetensors|onnx|torchscript
        [--out FOLDER] [backbone.key=value ...] [weights.ignore=[key,...]]

RUN is a run folder or what else fastssl/evaluate.py takes; backbone.* says which network a lone
.safetensors is of, and says more of random:NAME. FOLDER: exports/NAME-FORMAT, beside the run's
other files for a run folder.
Exit codes: 0 done, 1 the other side gives other features, or a file can't be read or written,
2 a mistake in the input.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if not __package__:  # run as a script: let imports start at the checkout, not inside fastssl/
    sys.path[0] = str(Path(__file__).resolve().parents[1])
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as in train.py; before torch is imported

from fastssl import export_formats, launcher, starting, trained
from fastssl.config import RecipeError
from fastssl.recipe_check import check, schema_of_settings
from fastssl.recipe_text import read_overrides


def main(arguments: Sequence[str]) -> int:
    """Exports what the command line names; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="fastssl/export.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--to", required=True, choices=export_formats.FORMATS)
    parser.add_argument("--out", type=Path, metavar="FOLDER")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value")
    given = parser.parse_intermixed_args(arguments)
    if starting.environment("RANK", 0) != 0:
        return 0  # nothing that several processes could share
    try:
        backbone, ignore = _overrides(given.run, given.overrides)
        loaded = trained.load(given.run, backbone=backbone, ignore=ignore)
        export_formats.export_to(loaded, given.to, given.out, say=starting.say)
    except (export_formats.Mismatch, OSError) as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 1
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return 2
    return 0


def _overrides(run: str, texts: Sequence[str]) -> tuple[dict[str, Any], tuple[str, ...]]:
    """What backbone.* and weights.ignore say, as trained.load takes them."""
    errors: list[str] = []
    layer = read_overrides(texts, ("backbone", "weights"), errors)
    ignore = check(layer["weights"], schema_of_settings("weights", trained.Weights), errors)
    network = trained.read_backbone(run, layer["backbone"], errors)
    if errors:
        raise RecipeError("\n".join(errors))
    return network, ignore.get("ignore", ())


if __name__ == "__main__":
    launcher.mend()
    sys.exit(main(sys.argv[1:]))
