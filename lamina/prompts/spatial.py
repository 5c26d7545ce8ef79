"""What prompts are told of an image's patches: their mean, or the means of clusters.

Clusters are found for each image by itself and without a gradient, so a prediction does not depend on a batch; their
means are then taken once more with one: a patch gets 1 / (size of its cluster) of the gradient of its cluster's mean.

References:
    Mo et al., LSPT: Long-term Spatial Prompt Tuning for Visual Representation Learning, 2024, section 3.2, leaves
    start, steps and order open; they are ours: start at patches that are far from each other, ten steps, and the
    order in which prompts and clusters look most alike.
"""

from __future__ import annotations

from typing import Literal

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torch.nn import functional as F

from lamina.errors import ConfigError

Coding = Literal["mean", "kmeans", "none"]

#: of Lloyd's algorithm
STEPS = 10


def coded(patches: Tensor, prompts: Tensor, how: Coding) -> Tensor:
    """Return what is added to prompts, (B, 1, D) or (B, M, D), in at least float32.

    Args:
        patches: (B, N, D).
        prompts: (B, M, D); clusters are brought into their order.
        how: "mean" of all patches, or "kmeans": a cluster for each prompt.

    Raises:
        ConfigError: when there are to be more clusters than patches.
    """
    precise = torch.promote_types(patches.dtype, torch.float32)
    if how == "mean":
        return patches.sum(1, keepdim=True, dtype=precise) / patches.shape[1]
    patches = patches.to(precise)
    count = prompts.shape[1]
    check_clusters(count, patches.shape[1])
    means = cluster_means(patches, clusters(patches, count), count)
    order = alike(prompts, means)
    return means.gather(1, order[..., None].expand(-1, -1, means.shape[-1]))


def check_clusters(prompts: int, patches: int) -> None:
    """Make sure that there are patches enough for a cluster for each prompt.

    Raises:
        ConfigError: when there are not.
    """
    if prompts > patches:
        raise ConfigError(
            f"spatial=kmeans tells each prompt of a cluster of its own, and images here have {patches} patches for "
            f"{prompts} prompts; take length={patches} or less, or spatial=mean"
        )


@torch.no_grad()
def clusters(patches: Tensor, count: int, steps: int = STEPS) -> Tensor:
    """Return the cluster (B, N), whole numbers, that each patch (B, N, D) of an image is in.

    The first centre is the patch that is farthest from the mean, each other one the patch that is farthest from all
    centres so far; of equally far ones the first. A cluster that runs empty gets the mean of all patches as its centre.
    """
    patches = patches - patches.mean(1, keepdim=True)  # distances stay, and lose fewer digits
    chosen = [patches.square().sum(-1).argmax(1)]
    nearest = _apart(patches, _rows(patches, chosen[0][:, None]))[..., 0]
    for _ in range(1, count):
        chosen.append(nearest.argmax(1))
        nearest = nearest.minimum(_apart(patches, _rows(patches, chosen[-1][:, None]))[..., 0])
    centres = _rows(patches, torch.stack(chosen, dim=1))
    members = _apart(patches, centres).argmin(-1)
    for _ in range(steps - 1):
        centres = cluster_means(patches, members, count)
        members = _apart(patches, centres).argmin(-1)
    return members


def cluster_means(patches: Tensor, members: Tensor, count: int) -> Tensor:
    """Return the mean of each cluster (B, k, D), with a gradient to its patches; of an empty one that of all patches.

    Args:
        patches: (B, N, D).
        members: (B, N), which of `count` clusters each patch is in.
    """
    chosen = F.one_hot(members, count).to(patches.dtype).mT  # (B, k, N)
    sizes = chosen.sum(-1, keepdim=True)
    return torch.where(sizes > 0, chosen @ patches / sizes.clamp_min(1), patches.mean(1, keepdim=True))


@torch.no_grad()
def alike(prompts: Tensor, means: Tensor) -> Tensor:
    """Return which mean (B, M) each prompt gets: the order in which the sum of cosines is largest.

    Args:
        prompts, means: (B, M, D).
    """
    cosines = F.normalize(prompts.to(means.dtype), dim=-1) @ F.normalize(means, dim=-1).mT
    cosines = cosines.nan_to_num()  # a run that has gone astray is told so by its loss
    orders = [linear_sum_assignment(image, maximize=True)[1] for image in cosines.cpu().numpy()]
    return torch.stack([torch.as_tensor(order) for order in orders]).to(means.device)


def _apart(patches: Tensor, centres: Tensor) -> Tensor:
    """Return squared distances (B, N, k), each off by the same for a patch where only its nearest is asked for."""
    return (patches.square().sum(-1, keepdim=True) - 2 * patches @ centres.mT) + centres.square().sum(-1)[:, None]


def _rows(patches: Tensor, index: Tensor) -> Tensor:
    """Return rows (B, k, D) of patches (B, N, D) by their numbers (B, k)."""
    return patches.gather(1, index[..., None].expand(-1, -1, patches.shape[-1]))
