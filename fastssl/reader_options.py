"""What `data.key=value` on the command line of `python -m fastssl.data` tells the folder reader."""

from collections.abc import Sequence
from typing import Any

import yaml

from fastssl.recipe_check import check, make, schema_of_part
from fastssl.recipe_text import Entry, RecipeError, read_overrides

READER = "pipelines.readers.folder"


def folder_options(source: str, overrides: Sequence[str]) -> Any:
    """The folder reader's Options for a folder.

    Args:
        source: the folder, taken as it is.
        overrides: `data.key=value`, as for a recipe; neither `data.use` nor `data.root`.

    Raises:
        RecipeError: all mistakes found, on one line.
    """
    errors: list[str] = []
    layer = read_overrides(overrides, ("data",), errors)["data"]
    if "root" in layer or "use" in layer:
        errors.append("command line: data.root is SOURCE, and data.use the folder reader: leave it")
    node = yaml.ScalarNode("tag:yaml.org,2002:str", source, style="'")
    use = read_overrides([f"data.use={READER}"], ("data",), errors)["data"]["use"]
    entries = {**layer, "root": Entry(node, "command line: SOURCE", "command line")}
    schema = schema_of_part("data", use, ("Options", "list_samples"), READER)
    values = check(entries, schema, errors)
    options = None if errors else make("command line", "data", schema, entries, values, errors)
    if errors:
        raise RecipeError("; ".join(errors))
    return options
