"""Tiny streams whose images have label maps, and the trainers that run them."""

import numpy as np
import torch
from lightning_fabric import Fabric

from lamina.data.dense_streams import DenseSource, dense_stream
from lamina.data.scenes import LabelledArrays
from lamina.data.streams import StreamSettings
from lamina.training.dense import DenseSettings
from lamina.training.feed import Feed
from lamina.training.segmentation import Segmentation
from lamina.training.trainer import Trainer
from tests.streams import SPEC

PALETTE = ["ground", "red", "green", "blue", "grey"]
COLOURS = np.array([[30, 20, 25], [220, 40, 30], [40, 200, 60], [20, 60, 230], [150, 140, 160]])


def boxes(count, height=40, width=48, seed=0):
    """Boxes in the colours of their classes on a dark ground, and a stripe without a label on the left."""
    rng = np.random.default_rng(seed)
    masks = np.zeros((count, height, width), np.uint8)
    for mask in masks:
        for label in rng.permutation(np.arange(1, len(PALETTE)))[:3]:
            top, left = rng.integers(0, height - 16), rng.integers(0, width - 16)
            mask[top : top + 16, left : left + 16] = label
    pixels = COLOURS[masks].transpose(0, 3, 1, 2) + rng.normal(0, 8, (count, 3, height, width))
    masks[:, :, :3] = 255
    return LabelledArrays(pixels.clip(0, 255).astype(np.uint8), masks, PALETTE)


def dense_blobs(train=11, test=7, **sizes):
    source = DenseSource(PALETTE, boxes(train, seed=1, **sizes), boxes(test, seed=2, **sizes))
    return dense_stream(StreamSettings(name="boxes"), source)


def dense_trainer(settings, tower, *, fabric=None, seed=0, dense=None, eval_batch=6, augmentation="crop-flip", **more):
    """Build a method on a tower, give it a head for pixels, and a trainer."""
    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    kind = Segmentation(dense or DenseSettings(channels=7))
    torch.manual_seed(seed)
    learner = kind.adapted(settings.build(tower), SPEC)
    feed = Feed.to(
        learner, fabric, SPEC, seed=seed, eval_batch=eval_batch, augmentation=augmentation, transform=kind.transform
    )
    return Trainer(learner, feed, fabric, seed=seed, kind=kind, **more)
