"""Which images of a source a stream takes, and which of them arrive with which task."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lamina.seeds import seed_at

#: of each class's training images, what is set aside where a data set has no validation images
USUAL_SHARE = 0.2


def first_of_each(found: np.ndarray, labels: np.ndarray, count: int | None) -> np.ndarray:
    """Return the sorted indices of the first `count` images of each label in `labels`.

    Args:
        found: (n,), int64. The label of every image.
    """
    return np.sort(np.concatenate([np.flatnonzero(found == label)[:count] for label in labels]))


def parted(found: np.ndarray, wanted: np.ndarray, share: float) -> tuple[np.ndarray, np.ndarray]:
    """Part indices in two: a share of each label's, the last of them and at least one, forms the second part."""
    kept, held = [], []
    for label in np.unique(found[wanted]):
        own = wanted[found[wanted] == label]
        cut = len(own) - max(1, round(share * len(own)))
        kept.append(own[:cut])
        held.append(own[cut:])
    return np.sort(np.concatenate(kept)), np.sort(np.concatenate(held))


def set_aside(
    found: np.ndarray, wanted: np.ndarray, validation: np.ndarray, share: float | None
) -> tuple[np.ndarray, np.ndarray, str]:
    """Part training images into those to learn from and those to choose settings on; say in words what the latter are.

    Args:
        found: (n,), int64. The label of every image.
        wanted: (m,), int64. The images to part.
        validation: (v,), int64. Those that the data set sets aside itself.
        share: of each label, the last, to set aside instead; None takes those of the data set, or else a fifth.
    """
    if share is None and len(validation):
        return np.setdiff1d(wanted, validation), np.intersect1d(wanted, validation), "validation images"
    return *parted(found, wanted, USUAL_SHARE if share is None else share), "held-out training images"


def with_labels(found: np.ndarray, wanted: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Return which of the images `wanted` have one of `labels`, in the order in which they came; int64."""
    return wanted[np.isin(found[wanted], labels)].astype(np.int64)


def dealt(
    labels: np.ndarray, indices: np.ndarray, homes: Sequence[np.ndarray], share: float, seed: int
) -> list[np.ndarray]:
    """Return the indices of the images that arrive with each task, sorted; every image arrives once.

    Of each class `share`, rounded, goes away from home, and is dealt to the other tasks in turn; at least one image
    stays, so that a class is known when its own task is over. Which images go, and where the dealing begins, is
    drawn by address from `seed` and the class, so the images of one class do not depend on what else there is.

    Args:
        labels: (n,), int64. Of every image of the source.
        indices: (m,), int64. The images to deal, each with a label in one of `homes`.
        homes: for each task, the labels that are at home in it; at least two tasks.
        share: in [0, 1).

    >>> [part.tolist() for part in dealt(np.zeros(4, int), np.arange(4), [np.array([0]), np.array([1])], 0.5, 0)]
    [[0, 3], [1, 2]]
    """
    arriving: list[list[np.ndarray]] = [[] for _ in homes]
    for task, members in enumerate(homes):
        for label in members.tolist():
            draw = np.random.RandomState(seed_at("blurry", seed, label) % 2**32)
            own = draw.permutation(indices[labels[indices] == label])
            leaving = own[: min(round(share * len(own)), len(own) - 1)]
            arriving[task].append(own[len(leaving) :])
            others = draw.permutation([other for other in range(len(homes)) if other != task])
            for turn, other in enumerate(others.tolist()):
                arriving[other].append(leaving[turn :: len(others)])
    return [np.sort(np.concatenate(parts)) for parts in arriving]
