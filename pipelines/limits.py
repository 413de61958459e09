"""What the Options of graphs refuse alike: a number out of its range, by its name and value."""

from pipelines.ops import Colors

MOST_PIXELS = 16_384  # a side of what a graph puts out: 800 MB an image; DALI would try and hang


def sides(**pixels: int) -> None:
    """Refuses a side that no image of a batch can have.

    Raises:
        ValueError: names the first.
    """
    at_least(8, **pixels)
    for name, value in pixels.items():
        if value > MOST_PIXELS:
            raise ValueError(f"{name} ({value}) must be at most {MOST_PIXELS} pixels")


def at_least(least: float, **numbers: float) -> None:
    """Refuses a number below `least`.

    Raises:
        ValueError: names the first.
    """
    for name, value in numbers.items():
        if not value >= least:
            raise ValueError(f"{name} ({value}) must be at least {least}")


def probabilities(**numbers: float) -> None:
    """Refuses what is no probability.

    Raises:
        ValueError: names the first.
    """
    for name, value in numbers.items():
        if not 0 <= value <= 1:
            raise ValueError(f"{name} ({value}) must be a probability, 0 ... 1")


def fractions(**ranges: tuple[float, float]) -> None:
    """Refuses a range that is not of parts of a whole.

    Raises:
        ValueError: names the first.
    """
    for name, (low, high) in ranges.items():
        if not 0 < low <= high <= 1:
            raise ValueError(f"{name} ([{low}, {high}]) must be two ascending fractions in 0 ... 1")


def factors(**ranges: tuple[float, float]) -> None:
    """Refuses a range of factors, ratios or widths that is not above 0.

    Raises:
        ValueError: names the first.
    """
    for name, (low, high) in ranges.items():
        if not 0 < low <= high:
            raise ValueError(f"{name} ([{low}, {high}]) must be two ascending numbers above 0")


def colors(strengths: Colors) -> None:
    """Refuses strengths that `ops.random_colors` has no meaning for.

    Raises:
        ValueError: names the first.
    """
    probabilities(grayscale=strengths.grayscale)
    at_least(
        0,
        brightness=strengths.brightness,
        contrast=strengths.contrast,
        saturation=strengths.saturation,
    )
    if not 0 <= strengths.hue <= 0.5:
        raise ValueError(f"hue ({strengths.hue}) must be a part of a full turn, 0 ... 0.5")
