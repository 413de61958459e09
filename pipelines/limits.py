"""What the Options of graphs refuse alike: a number out of its range, by its name and value."""

from pipelines.ops import Colors

LEAST_FRACTION = 1e-4  # of an image: 2 x 2 pixels of 224 x 224
MOST_FACTOR = 1000  # a blur of more takes DALI minutes
STRONGEST = 100  # colours are all at their ends by then
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
        if not LEAST_FRACTION <= low <= high <= 1:
            raise ValueError(
                f"{name} ([{low}, {high}]) must be two ascending fractions in {LEAST_FRACTION}"
                " ... 1"
            )


def factors(**ranges: tuple[float, float]) -> None:
    """Refuses a range of factors, ratios or widths that is not above 0, or far too large.

    Raises:
        ValueError: names the first.
    """
    for name, (low, high) in ranges.items():
        if not 1 / MOST_FACTOR <= low <= high <= MOST_FACTOR:
            raise ValueError(
                f"{name} ([{low}, {high}]) must be two ascending numbers above 0, from"
                f" {1 / MOST_FACTOR:g} to {MOST_FACTOR}"
            )


def colors(strengths: Colors) -> None:
    """Refuses strengths that `ops.random_colors` has no meaning for.

    Raises:
        ValueError: names the first.
    """
    probabilities(grayscale=strengths.grayscale)
    by_name = {
        "brightness": strengths.brightness,
        "contrast": strengths.contrast,
        "saturation": strengths.saturation,
    }
    at_least(0, **by_name)
    for name, value in by_name.items():
        if value > STRONGEST:
            raise ValueError(f"{name} ({value}) must be at most {STRONGEST}")
    if not 0 <= strengths.hue <= 0.5:
        raise ValueError(f"hue ({strengths.hue}) must be a part of a full turn, 0 ... 0.5")
