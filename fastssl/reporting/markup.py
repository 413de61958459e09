"""HTML that is well formed and escaped by construction: text becomes markup in `element` alone."""

import html
from collections.abc import Mapping, Sequence

_VOID = frozenset({"meta", "img", "br", "line", "path", "polygon", "circle", "rect"})


class Markup(str):
    """Text that is HTML already; made by `element`, `join` and for constants of this package."""

    __slots__ = ()


Child = Markup | str


def element(name: str, attributes: Mapping[str, str | None], *children: Child) -> Markup:
    """<name ...>children</name>; plain text among the children is escaped.

    Args:
        name: of the element.
        attributes: None: an attribute without a value, such as `open`.
        children: none for an element that has no end tag.
    """
    written = "".join(
        f" {key}" if value is None else f' {key}="{html.escape(value)}"'
        for key, value in attributes.items()
    )
    if name in _VOID:
        assert not children, f"<{name}> holds nothing"
        return Markup(f"<{name}{written}/>")
    return Markup(f"<{name}{written}>{join(children)}</{name}>")


def join(children: Sequence[Child], between: str = "") -> Markup:
    """One after the other; plain text is escaped."""
    return Markup(
        between.join(
            child if isinstance(child, Markup) else html.escape(child, quote=False)
            for child in children
        )
    )


def table(
    head: Sequence[Child], rows: Sequence[Sequence[Child]], caption: str, *, numbers: bool = False
) -> Markup:
    """A table that scrolls sideways where it is wider than the page; the first column are heads.

    Args:
        head: names of the columns.
        rows: cells; one that is a whole <td> is taken as it is.
        caption: what it is, read out by screen readers and shown above it.
        numbers: align all but the first column to the right.
    """

    def row(cells: Sequence[Child]) -> Markup:
        first = element("th", {"scope": "row"}, cells[0])
        others = [
            cell if isinstance(cell, Markup) and cell.startswith("<td") else element("td", {}, cell)
            for cell in cells[1:]
        ]
        return element("tr", {}, first, *others)

    return element(
        "div",
        {"class": "scroll", "tabindex": "0", "role": "region", "aria-label": caption},
        element(
            "table",
            {"class": "numbers"} if numbers else {},
            element("caption", {}, caption),
            element(
                "thead", {}, element("tr", {}, *[element("th", {"scope": "col"}, h) for h in head])
            ),
            element("tbody", {}, *[row(cells) for cells in rows]),
        ),
    )


def folded(summary: Child, *children: Child, opened: bool = False) -> Markup:
    """Shown on a click or a press of a key."""
    attributes: dict[str, str | None] = {"open": None} if opened else {}
    return element("details", attributes, element("summary", {}, summary), *children)
