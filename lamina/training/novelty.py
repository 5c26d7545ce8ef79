"""Whether scores tell images of classes met so far from those of classes to come, exact over processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
from scipy.stats import rankdata
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, binary_average_precision

from lamina.data.loader import Share
from lamina.data.stream import Task
from lamina.lookback import Reduce
from lamina.model import Batch, Output
from lamina.training.evaluation import averaged

#: of an image's scores (B, C): higher looks more like what was learned
SCORES: dict[str, Callable[[Tensor], Tensor]] = {
    "energy": lambda logits: logits.logsumexp(-1),
    "confidence": lambda logits: logits.softmax(-1).max(-1).values,
    "entropy": lambda logits: -torch.special.entr(logits.softmax(-1)).sum(-1),
}


class Detection:
    """Gathers how known images look, while somebody else goes through them task by task.

    Args:
        tasks: whose test images will be seen.
        temperature: divides the scores of a model, as it did in the loss that they were trained with.
        share: which of the images this process sees.

    References:
        Jha et al., CLAP4CLIP, NeurIPS 2024, section 4: post-hoc novel data detection. Liu et al., Energy-based
        Out-of-distribution Detection, NeurIPS 2020.
    """

    def __init__(self, tasks: Sequence[Task], temperature: float, share: Share) -> None:
        self.temperature, self.share = temperature, share
        self._sizes = [len(task.test) for task in tasks]
        self._seen: list[list[Tensor]] = [[] for _ in tasks]

    def see(self, place: int, batch: Batch, output: Output) -> None:
        """Note what a model says of a batch of the task at that place."""
        logits = averaged(output).double() / self.temperature
        self._seen[place].append(torch.stack([score(logits) for score in SCORES.values()], dim=1).cpu())

    def scores(self, reduce: Reduce) -> Tensor:
        """Return what was noted of all images (n, SCORES), float64, task after task."""
        tables = []
        for size, seen in zip(self._sizes, self._seen, strict=True):
            table = torch.zeros(size, len(SCORES), dtype=torch.float64)
            if seen:
                table[torch.arange(self.share.rank, size, self.share.world)] = torch.cat(seen)
            tables.append(table)
        return reduce(torch.cat(tables))


def detected(known: Tensor, new: Tensor) -> dict[str, dict[str, float]]:
    """Return how well each score tells known images (n, SCORES) from new ones (m, SCORES), known ones being sought.

    `auroc` and `aupr` (the average precision) are areas; `fpr95` is the share of new images that pass for known at the
    threshold that 95 % of the known ones pass.
    """
    out = {}
    for place, name in enumerate(SCORES):
        mine, other = known[:, place].numpy(), new[:, place].numpy()
        both = np.concatenate([mine, other])
        # torchmetrics squeezes scores outside [0, 1] through a sigmoid, where large ones become equal; ranks do not.
        ranks, sought = torch.from_numpy(rankdata(both) / len(both)), torch.arange(len(both)) < len(mine)
        passes = np.sort(mine)[len(mine) - -(-95 * len(mine) // 100)]
        out[name] = {
            "auroc": float(binary_auroc(ranks, sought.long())),
            "aupr": float(binary_average_precision(ranks, sought.long())),
            "fpr95": float((other >= passes).mean()),
        }
    return out
