"""Means of patches and of clusters of them. B 3, N 17 patches, M 4, D 6; float64."""

import re

import pytest
import torch

from lamina.errors import ConfigError
from lamina.prompts.spatial import alike, cluster_means, clusters, coded
from tests.prompts.sequences import drawn, near


def patches():
    return drawn(3, 17, 6)


def slow_clusters(image, count, steps=10):
    """Lloyd's algorithm on one image (N, D), patch by patch."""
    centres = [max(image, key=lambda p: (p - image.mean(0)).norm())]
    while len(centres) < count:
        centres.append(max(image, key=lambda p: min((p - c).norm() for c in centres)))
    for _ in range(steps):
        members = torch.tensor([min(range(count), key=lambda c: (p - centres[c]).norm()) for p in image])
        centres = [image[members == c].mean(0) if (members == c).any() else image.mean(0) for c in range(count)]
    return members, torch.stack(centres)


@pytest.mark.parametrize("count", [1, 2, 4, 16, 17])
def test_clusters_are_those_of_lloyd_s_algorithm_from_far_patches(count):
    found = clusters(patches(), count)
    means = cluster_means(patches(), found, count)
    for image, members, centres in zip(patches(), found, means, strict=True):
        slow, slow_centres = slow_clusters(image, count)
        assert members.tolist() == slow.tolist()
        near(centres, slow_centres)


def test_an_image_s_clusters_depend_on_no_other_image_nor_on_a_shift_of_all_patches():
    found = clusters(patches(), 4)
    assert torch.equal(torch.cat([clusters(image[None], 4) for image in patches()]), found)
    assert torch.equal(clusters(patches() + 1e4, 4), found)


def test_one_cluster_says_the_mean_of_all_patches():
    near(coded(patches(), drawn(3, 1, 6), "kmeans"), coded(patches(), drawn(3, 1, 6), "mean"))
    near(coded(patches(), drawn(3, 4, 6), "mean"), patches().sum(1, keepdim=True) / 17)


def test_means_weighted_by_sizes_are_the_mean_of_all_patches():
    found = clusters(patches(), 4)
    sizes = torch.stack([(found == c).sum(1) for c in range(4)], dim=1)
    near((cluster_means(patches(), found, 4) * sizes[..., None]).sum(1) / 17, patches().mean(1))


def test_an_empty_cluster_has_the_mean_of_all_patches():
    members = torch.tensor([[0] * 9 + [2] * 8] * 3)
    means = cluster_means(patches(), members, 4)
    near(means[:, 1], patches().mean(1))
    near(means[:, 3], patches().mean(1))
    near(means[:, 2], patches()[:, 9:].mean(1))


def test_a_patch_gets_its_share_of_the_gradient_of_its_cluster_s_mean():
    values = patches().requires_grad_()
    found = clusters(values, 4)
    weights = drawn(3, 4, 6, seed=5)
    (cluster_means(values, found, 4) * weights).sum().backward()
    for image in range(3):
        for patch, cluster in enumerate(found[image].tolist()):
            near(values.grad[image, patch], weights[image, cluster] / (found[image] == cluster).sum())


def test_the_whole_coding_passes_a_numerical_check_of_its_gradient_away_from_ties():
    prompts = drawn(3, 4, 6, seed=6)
    assert torch.autograd.gradcheck(lambda p: coded(p, prompts, "kmeans"), patches().requires_grad_())


def test_prompts_get_the_order_of_clusters_in_which_the_sum_of_cosines_is_largest():
    means, prompts = drawn(3, 4, 6), drawn(3, 4, 6, seed=7)
    order = alike(prompts, means)
    cosines = torch.cosine_similarity(prompts[:, :, None], means[:, None], dim=-1)
    for image, got in zip(cosines, order, strict=True):
        every = torch.cartesian_prod(*[torch.arange(4)] * 4)
        every = every[[len(set(o.tolist())) == 4 for o in every]]
        best = max(every, key=lambda o: image[torch.arange(4), o].sum())
        assert got.tolist() == best.tolist()


def test_clusters_follow_prompts_whatever_their_order():
    prompts, order = drawn(3, 4, 6, seed=7), [2, 0, 3, 1]
    near(coded(patches(), prompts[:, order], "kmeans"), coded(patches(), prompts, "kmeans")[:, order])


def test_more_prompts_than_patches_are_refused_by_kmeans_and_only_by_it():
    assert coded(patches(), drawn(3, 17, 6), "kmeans").shape == (3, 17, 6)
    assert coded(patches(), drawn(3, 18, 6), "mean").shape == (3, 1, 6)
    message = (
        "spatial=kmeans tells each prompt of a cluster of its own, and images here have 17 patches for 18 prompts; "
        "take length=17 or less, or spatial=mean"
    )
    with pytest.raises(ConfigError, match=re.escape(message)):
        coded(patches(), drawn(3, 18, 6), "kmeans")


def test_patches_in_low_precision_are_summed_in_float32():
    assert coded(patches().bfloat16(), drawn(3, 4, 6).float(), "mean").dtype == torch.float32
    assert coded(patches().bfloat16(), drawn(3, 4, 6).float(), "kmeans").dtype == torch.float32
