"""How well the confidence of predictions agrees with how often they are right, exact over processes."""

from __future__ import annotations

import torch
from torch import Tensor

from lamina.lookback import Reduce
from lamina.model import Batch, Output
from lamina.training.evaluation import averaged

#: equal intervals of confidence
BINS = 15


class Calibration:
    """Gathers confidences while `lamina.training.evaluation.accuracies` goes through images.

    A confidence is the largest probability; probabilities are the softmax of scores over all classes met.

    Args:
        temperature: divides the scores, as it did in the loss that they were trained with.

    References:
        Guo et al., On Calibration of Modern Neural Networks, ICML 2017, section 2: the expected calibration error.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        self.temperature = temperature
        self._bins = torch.zeros(BINS, 3, dtype=torch.float64)  # images, sum of confidences, right ones
        self._batches = torch.zeros(2, dtype=torch.float64)  # the sum of their errors, and how many

    def see(self, place: int, batch: Batch, output: Output) -> None:
        """Sort a batch of images into the bins."""
        confidence, best = (averaged(output).double() / self.temperature).softmax(-1).max(-1)
        right = (best == batch.targets).double()
        rows = torch.stack([torch.ones_like(confidence), confidence, right], dim=1).cpu()
        own = torch.zeros_like(self._bins)
        own.index_add_(0, (confidence * BINS).long().clamp(max=BINS - 1).cpu(), rows)
        self._bins += own
        self._batches += torch.tensor([calibration_error(own), 1.0], dtype=torch.float64)

    def error(self, reduce: Reduce) -> float:
        """Return the mean distance between confidence and accuracy of the bins, weighted by their images: the ECE."""
        return calibration_error(self.bins(reduce))

    def bins(self, reduce: Reduce) -> Tensor:
        """Return for each bin its images, the sum of their confidences, and how many were right (BINS, 3)."""
        return reduce(self._bins)

    def batch_mean(self, reduce: Reduce) -> float:
        """Return the mean of the errors of single batches, as some released code has it; larger for smaller batches."""
        errors, batches = reduce(self._batches).tolist()
        return errors / max(batches, 1)


def calibration_error(bins: Tensor) -> float:
    """Return the expected calibration error of bins (BINS, 3): images, sum of confidences, right ones.

    >>> calibration_error(torch.tensor([[4.0, 1.0, 0.0], [4.0, 3.0, 3.0]]))
    0.125
    """
    images, confidence, right = bins.unbind(1)
    return float((confidence - right).abs().sum() / images.sum().clamp_min(1))
