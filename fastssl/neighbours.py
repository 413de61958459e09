"""Weighted k-nearest-neighbour classification by cosine similarity, in bounded memory.

Votes are weighted by exp(similarity / temperature) (Wu et al. 2018, arXiv:1805.01978, section 3.4).
One search serves every k and every temperature.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def nearest(
    blocks: Iterable[tuple[Tensor, Tensor]], val: Tensor, most: int, *, rows: int = 1024
) -> tuple[Tensor, Tensor]:
    """The nearest of the training rows to each of `val`, nearest first.

    Args:
        blocks: of the training rows: unit vectors [b, D] and their labels int64 [b]; run through
            once. No more than one block and its similarities to `rows` rows of val are held.
        val: unit vectors [M, D].
        most: neighbours to find, at most the number of training rows.
        rows: of val that are compared at once.

    Returns:
        similarity [M, most] and label [M, most].
    """
    similarity = val.new_empty((len(val), 0))
    labels = torch.empty((len(val), 0), dtype=torch.int64, device=val.device)
    for train_ND, label_N in blocks:
        found: list[tuple[Tensor, Tensor]] = []
        for val_BD, best_BK, of_best_BK in zip(
            val.split(rows), similarity.split(rows), labels.split(rows), strict=True
        ):
            here_BN = val_BD @ train_ND.T
            near_BK, at_BK = here_BN.topk(min(most, len(train_ND)), dim=1)
            both = torch.cat([best_BK, near_BK], dim=1)
            of_both = torch.cat([of_best_BK, label_N[at_BK]], dim=1)
            kept, place = both.topk(min(most, both.shape[1]), dim=1)
            found.append((kept, of_both.gather(1, place)))
        similarity = torch.cat([each for each, _ in found])
        labels = torch.cat([each for _, each in found])
    return similarity, labels


def votes(
    similarity: Tensor,
    labels: Tensor,
    *,
    neighbours: Sequence[int],
    temperature: float,
    classes: int,
) -> dict[int, Tensor]:
    """The votes [M, classes] for each number of neighbours, from what `nearest` gave.

    They are relative to the nearest one's, so that no temperature makes all of them vanish.
    """
    weight_MK = ((similarity - similarity[:, :1]) / temperature).exp()
    votes_MC = similarity.new_zeros((len(similarity), classes))
    given, before = {}, 0
    for count in sorted(set(neighbours)):
        votes_MC = votes_MC.scatter_add(1, labels[:, before:count], weight_MK[:, before:count])
        given[count], before = votes_MC, count
    return given
