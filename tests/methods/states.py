"""What a method has learned and says, for tests that compare it over time."""

import torch

from lamina.model import Batch


def kept(trainer):
    """All that is learned, by name, as it is now."""
    return {name: value.clone() for name, value in trainer.learner.model.learned().items()}


def images_of(trainer, stream):
    """The test images of all tasks, one after another."""
    return torch.cat([batch.images for task in stream for batch in trainer.feed.plain(task.test)])


@torch.no_grad()
def logits(trainer, images, size=64):
    """What the model says of images, `size` at a time."""
    model = trainer.learner.model.eval()
    return torch.cat([model(Batch(part)).logits for part in images.split(size)])


def moved(before, after):
    """The names of what changed."""
    return {name for name, value in before.items() if not torch.equal(value, after[name])}
