"""Prefixes of keys and values: general ones with an expert per task (DualPrompt).

A prefix joins the keys and values of a block after their projection, so the sequence does not grow. Prompts
hold both: (2, M, D), rows for keys first, rows for values second.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.splice import PromptPass, Splice
from lamina.errors import ConfigError
from lamina.prompts.base import PromptModule, Scripted
from lamina.prompts.pool import Selection


def blocks_of(wanted: Sequence[int] | None, usual: Sequence[int], depth: int, setting: str) -> list[int]:
    """Return the blocks that get prefixes: the wanted ones, or those of the usual ones that a tower of `depth` L has.

    Args:
        setting: its name, for the message.

    Raises:
        ConfigError: when there is none, one is named twice, or the tower does not have it.
    """
    blocks = [block for block in usual if block < depth] if wanted is None else sorted(wanted)
    if not blocks or blocks != sorted(set(blocks) & set(range(depth))):
        got = list(usual if wanted is None else wanted)
        raise ConfigError(f"{setting} must name different blocks of the backbone, from 0 to {depth - 1}; got {got}")
    return blocks


class ExpertPrefixes(PromptModule):
    """A general prefix for all tasks on some blocks, and on others an expert prefix per task, found by its key.

    In training the true task's expert is used; its key is pulled to the queries. In evaluation every image takes
    the expert whose key is nearest its own query. There is one key per task for all blocks; a pool of them
    grows with every task. The first expert and all keys start uniform in [-1, 1], every other expert as a copy of
    the one before. What belongs to earlier tasks is frozen, the general prefix never is.

    A block that is named in both places gets the general rows, then the expert's.

    Args:
        general: blocks with a general prefix.
        expert: blocks with an expert.
        general_length, length: M, rows for keys, and as many for values.
        width: D of the tower.
        features: F of the query.
        pull: weight of the loss that pulls keys, which is minus the mean cosine.
        selection: "batch" lets a batch agree on the expert that most of its images are nearest to; then the answer
            for an image depends on its batch. For comparison with what others did.

    Attributes:
        transductive: predictions depend on the other images of the batch.

    References:
        Wang et al., DualPrompt: Complementary Prompting for Rehearsal-free Continual Learning, ECCV 2022.
    """

    query = "frozen"

    def __init__(
        self,
        general: Sequence[int],
        expert: Sequence[int],
        general_length: int,
        length: int,
        width: int,
        features: int,
        *,
        pull: float = 1.0,
        selection: Selection = "image",
    ) -> None:
        super().__init__()
        self.general_blocks, self.expert_blocks = list(general), list(expert)
        self.length, self.width, self.features = length, width, features
        self.pull, self.selection, self.transductive = pull, selection, selection == "batch"
        self.general = _uniform(len(self.general_blocks), 2, general_length, width)  # in the order of their blocks
        self.experts = nn.ParameterList()  # per task (blocks, 2, M, D)
        self.keys = nn.ParameterList()  # per task (F,)

    @property
    def pool_size(self) -> int:
        return len(self.keys)

    def begin_task(self, index: int, columns: Sequence[int] = ()) -> None:
        self.experts.requires_grad_(False)
        self.keys.requires_grad_(False)
        last = self.experts[-1].detach().clone() if len(self.experts) else None
        shape = (len(self.expert_blocks), 2, self.length, self.width)
        self.experts.append(_uniform(*shape) if last is None else nn.Parameter(last))
        self.keys.append(_uniform(self.features))

    def nearest(self, query: Tensor) -> Tensor:
        """Return the tasks (B,) whose keys are nearest to queries (B, F); of equally near ones the first."""
        keys = torch.stack(list(self.keys))
        nearest = (F.normalize(query, dim=-1) @ F.normalize(keys, dim=-1).T).argmax(-1)
        if self.selection == "batch":
            return torch.bincount(nearest, minlength=len(keys)).argmax().expand(len(nearest))
        return nearest

    def start(self, query: Tensor | None = None, task: int | None = None) -> PromptPass:
        if query is None:
            raise ValueError("experts are found by queries; give `start` the features of the same images")
        terms, query = {}, query.to(self.general.dtype)
        if task is None:
            chosen = self.nearest(query)
        else:
            chosen = torch.full((len(query),), task, device=query.device)
            terms["pull"] = -self.pull * F.cosine_similarity(query, self.keys[task][None], dim=-1).mean()

        def at(layer: int, tokens: Tensor, carried: Tensor | None) -> Splice | None:
            rows = []
            if layer in self.general_blocks:
                rows.append(self.general[self.general_blocks.index(layer)])  # (2, M, D)
            if layer in self.expert_blocks:
                rows.append(self._expert(self.expert_blocks.index(layer), chosen, task))
            return Splice(prefix=_keys_and_values(rows)) if rows else None

        started = Scripted(at)
        started.terms, started.chosen = terms, chosen[:, None]
        return started

    def _expert(self, place: int, chosen: Tensor, task: int | None) -> Tensor:
        """Return the experts' rows at one of their blocks: (2, M, D) of one task, (B, 2, M, D) as chosen."""
        if task is not None:
            return self.experts[task][place]
        return torch.stack([expert[place] for expert in self.experts])[chosen]


def _uniform(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.empty(*shape).uniform_(-1, 1))


def _keys_and_values(rows: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Put prompts (2, M, D) or (B, 2, M, D) one after another; return keys and values, (M, D) or (B, M, D)."""
    outer = max((part.shape[:-3] for part in rows), key=len)
    together = torch.cat([part.expand(*outer, *part.shape[-3:]) for part in rows], dim=-2)
    keys, values = together.unbind(-3)
    return keys, values
