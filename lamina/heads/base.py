"""What every classifier head is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from torch import Tensor, nn

from lamina.heads.moments import ClassStatistics
from lamina.lookback import Watcher


@dataclass(frozen=True)
class Scores:
    """What a head says: logits (B, C), or (S, B, C) if it draws S samples; extra losses by name.

    Attributes:
        chosen: (B, k), whole numbers. Which prompts of its own pool each image took; None without one.
    """

    logits: Tensor
    terms: dict[str, Tensor] = field(default_factory=dict)
    chosen: Tensor | None = None


class Head(nn.Module, Watcher):  # in this order: what is remembered is the module's own state_dict
    """Features (B, F) to scores over every class met so far, in order of arrival.

    Attributes:
        statistics: what it keeps of the features of all classes, for others to use; None if it does not.
        transductive: what it says of an image depends on the other images of its batch.
        decides: the setting, and its value, that makes it so.
        sampling: it draws, so that `samples_of` says something.
        pool_size: how many prompts its images choose from; 0 where there is nothing to choose.
        after: blocks, from 0, after which it reads the tokens of patches, (K, B, h * w, D) for K of them, in place of
            features; the labels that it is given are then those of pixels.
        replaceable: it learns by its loss alone and reads nothing but features, so a method trains as well with another
            head in its place, such as one for pixels.
    """

    transductive: bool = False
    decides: tuple[str, str] = ("", "")
    sampling: bool = False
    after: tuple[int, ...] = ()
    replaceable: bool = False

    @property
    def pool_size(self) -> int:
        return 0

    @property
    def statistics(self) -> ClassStatistics | None:
        return None

    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        """Add a column for each new class and freeze what must not move any more.

        Args:
            classes: names of the task's classes.
            columns: their places; new ones go on counting where the last task ended, a class met before
                comes with the column it has.
        """
        raise NotImplementedError

    def forward(self, features: Tensor, labels: Tensor | None = None) -> Scores:
        """Score features (B, F); `labels` (B,) are given in training only.

        Prompts that show each image several times (`PromptPass.copies`) bring features (copies * B, F) then; the
        head that goes with them says what the logits (B, C) are made of.
        """
        raise NotImplementedError

    def samples_of(self, features: Tensor) -> Tensor | None:
        """Return the logits (S, B, C) of each draw for features (B, F); None for a head that draws nothing."""
        return None

    def preview(self, classes: Sequence[str]) -> Head | None:
        """Return a head that scores further classes, too, by their names alone; None for one that needs images.

        It shares what was learned, and is of use until the next step of training.

        Args:
            classes: names; those that are known already keep their columns, the others are appended in this order.
        """
        return None

    def says(self, column: int) -> str | None:
        """Return what is read of a class, in words; None for a head that reads no names."""
        return None

    def draws(self, per_class: int, *address: int | str) -> tuple[Tensor, Tensor]:
        """Return features (n, F) that stand for images of the classes met so far, and their columns (n,).

        Args:
            per_class: how many of each class.
            address: of the random numbers, see `lamina.seeds`.
        """
        raise NotImplementedError
