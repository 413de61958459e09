"""What a plain version honours of a graph's options, and the refusal of all else."""

from dataclasses import fields
from typing import Any


def check(options: Any, *names: str) -> None:
    """Refuses an option that is set and not among the honoured `names`.

    Raises:
        ValueError: names the option, its value, and the default that it must be left at.
    """
    for field in fields(options):
        value = vars(options)[field.name]
        if field.name not in names and value != field.default:
            refuse(options, field.name, f"leave it at {field.default!r}")


def refuse(options: Any, name: str, remedy: str) -> None:
    """Raises the ValueError that says which value of `name` has no plain version, and `remedy`."""
    task = type(options).__module__
    raise ValueError(
        f"pil: {name} ({vars(options)[name]!r}) of {task} has no plain version: {remedy}"
    )
