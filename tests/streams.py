"""Tiny streams and the trainers that run them."""

import numpy as np
from lightning_fabric import Fabric

from lamina.data.pictures import ArrayPictures
from lamina.data.stream import Split, Stream, Task
from lamina.data.transforms import InputSpec
from lamina.training.feed import Feed
from lamina.training.trainer import Trainer

#: what the sentence for an unknown stream lists
KNOWN_STREAMS = (
    "ade20k, cifar10, cifar100, digits, digits-domains, fgvc-NAME, folder-domains:PATH, folder:PATH, medical-NAME, "
    "segment-digits, tiny-even-10, tiny-even-10-full, tiny-imagenet, tiny-odd-10, tiny-odd-10-full, tiny-odd-1x10, "
    "tiny-odd-1x50, vtab-NAME"
)

SPEC = InputSpec(size=32, mean=(0.5, 0.5, 0.5), std=(0.25, 0.25, 0.25))


def blobs(tasks=2, per_task=3, train=27, test=11, seed=0):
    """Noisy copies of one random picture per class: `train` and `test` images a task, 32 x 32."""
    rng = np.random.default_rng(seed)
    classes = tasks * per_task
    coarse = rng.uniform(0, 255, (classes, 3, 4, 4))
    pictures = coarse.repeat(8, axis=2).repeat(8, axis=3)

    def make(count):
        labels = np.concatenate([t * per_task + np.arange(count) % per_task for t in range(tasks)])
        noisy = pictures[labels] + rng.normal(0, 40, (len(labels), 3, 32, 32))
        return ArrayPictures(noisy.clip(0, 255).astype(np.uint8), labels)

    def split(images, task):
        indices = np.flatnonzero(images.labels // per_task == task)
        return Split(images, indices, images.labels[indices])

    learned, tested = make(train), make(test)
    stages = []
    for t in range(tasks):
        columns = list(range(t * per_task, (t + 1) * per_task))
        names = [f"class {column}" for column in columns]
        stages.append(Task(t, names, columns, split(learned, t), split(tested, t)))
    return Stream("blobs", stages, order_seed=0, fingerprint=f"blobs-{tasks}-{per_task}-{train}-{test}-{seed}")


def trainer_of(settings, tower, *, fabric=None, seed=0, **arguments):
    """Build a method on a tower and give it a trainer, on one CPU process unless told otherwise."""
    import torch

    fabric = fabric or Fabric(accelerator="cpu", devices=1)
    torch.manual_seed(seed)
    learner = settings.build(tower)
    feed = Feed.to(learner, fabric, SPEC, seed=seed, eval_batch=6)
    return Trainer(learner, feed, fabric, seed=seed, **arguments)
