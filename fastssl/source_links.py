"""Links in a folder of images that lead out of it, which are packed only when that is asked for."""

import os
from typing import Any

from fastssl.tar_file import shown


def refuse_links_out(samples: Any) -> None:
    """Refuses a listing of which a usable file lies elsewhere, by a link of its own or a folder's.

    Args:
        samples: what the folder reader listed.

    Raises:
        ValueError: names the first few.
    """
    inside = os.path.join(os.path.realpath(samples.root), "")
    out: list[str] = []
    folder, links = "", set[str]()
    for row in samples.usable.tolist():
        path = samples.path(row)
        # One look at a folder tells all links in it: a look at each file takes as long as listing.
        if os.path.dirname(path) != folder:
            folder = os.path.dirname(path)
            links = _links(folder)
            if not os.path.join(os.path.realpath(folder), "").startswith(inside):
                out.append(folder)
                links = set()
        if path in links and not os.path.realpath(path).startswith(inside):
            out.append(path)
    if out:
        named = ", ".join(f"{shown(path)} -> {shown(os.path.realpath(path))}" for path in out[:5])
        more = f" and {len(out) - 5:,} more" if len(out) > 5 else ""
        raise ValueError(
            f"links lead out of {samples.root}: {named}{more}; --follow-links packs what they lead"
            " to"
        )


def _links(folder: str) -> set[str]:
    with os.scandir(folder) as entries:
        return {entry.path for entry in entries if entry.is_symlink()}
