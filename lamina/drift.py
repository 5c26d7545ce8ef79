"""How far a lesson may have moved the features of images that are gone.

Old images cannot be looked at again, but new ones can: their features before and after a lesson are
compared. A protection says, to first order and up to a common factor, how much old and new images feel
the same move of the prompts; the new images' measured drift supplies the factor.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from lamina.audit import BlockDrift, Drift
from lamina.heads.base import Head
from lamina.model import Batch, PromptedModel
from lamina.protections.base import Felt, Protection


def lesson_drift(
    before: PromptedModel,
    after: PromptedModel,
    batches: Iterable[Batch],
    protections: Sequence[Protection],
    remembered: Sequence[Mapping[str, Any]],
    spread: float,
) -> Drift:
    """Return how far features moved in a lesson.

    Args:
        before, after: the model on both sides of the lesson.
        batches: of the lesson's images.
        protections: as they are after it.
        remembered: by the same protections before it, as from `state_dict`.
        spread: root mean squared distance of old features from their mean.
    """
    retrained = _retrained(before.head, after.head)
    if _same(before, after):  # what is frozen, or was left alone, does not move
        return Drift(new=0.0, old=0.0, bound=0.0, blocks=[], retrained=retrained)
    new = _moved(before, after, batches) / max(spread, 1e-12)
    prompts = before.prompts
    for protection, memory in zip(protections, remembered, strict=True):
        if prompts is None:
            break
        old_felt = protection.felt(prompts, memory)
        new_felt = protection.felt(prompts, protection.since(memory))
        factor = sum(felt.moved for felt in new_felt)
        if not old_felt or factor <= 0:
            continue
        # felt squares add up over blocks; one factor brings them to squared features
        unit = new * factor**-0.5
        blocks = [
            BlockDrift(block=f.layer, step=f.step, old=unit * f.moved**0.5, bound=unit * f.worst**0.5) for f in old_felt
        ]
        old, bound = (unit * _total(old_felt, which) for which in ("moved", "worst"))
        return Drift(new=new, old=old, bound=bound, blocks=blocks, retrained=retrained)
    return Drift(new=new, old=None, bound=None, blocks=[], retrained=retrained)


def _retrained(before: Head, after: Head) -> bool:
    """Say whether what a head had before has learned on, such as words or an attention that all classes share.

    A number that multiplies all scores alike changes no answer, and rows for new classes behind those of old ones none
    of theirs.
    """
    now = dict(after.named_parameters())
    return any(
        not torch.equal(value, now[name][tuple(map(slice, value.shape))])
        for name, value in before.named_parameters()
        if value.ndim > 0 and name in now
    )


def _same(ours: PromptedModel, theirs: PromptedModel) -> bool:
    """Say whether two models have the same features: all that was learned is equal, heads aside."""
    mine, others = (
        {name: value for name, value in model.learned().items() if not name.startswith("head.")}
        for model in (ours, theirs)
    )
    return mine.keys() == others.keys() and all(torch.equal(value, others[name]) for name, value in mine.items())


def _total(felt: Sequence[Felt], which: str) -> float:
    return sum(getattr(part, which) for part in felt) ** 0.5


@torch.no_grad()
def _moved(before: PromptedModel, after: PromptedModel, batches: Iterable[Batch]) -> float:
    """Return the root mean squared distance between the features (B, F) of the same images."""
    squares, count = 0.0, 0
    for model in (before, after):
        model.eval()
    for batch in batches:
        move: Tensor = after.features(batch)[0].double() - before.features(batch)[0].double()
        squares, count = squares + float(move.square().sum()), count + len(move)
    return (squares / max(count, 1)) ** 0.5
