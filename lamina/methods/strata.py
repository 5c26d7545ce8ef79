"""Strata: prompts laid down layer upon layer without disturbing those below, and a head that does not forget.

The method we recommend. Prompts learn from each task in what the tasks before leave free, so old features
stay where they are within a bound. The head is remade after every task, in closed form, from sums over all
images so far of what the last blocks say; it needs no balancing and does not care in which order tasks came.
While a task is learned, a linear layer of its own stands in for the head. A task of a single class gives
prompts nothing to tell apart: the head alone learns it.

Shared parts, in reading order:
    prompts              lamina.prompts.deep.DeepPrompts, after the norm
    projected steps      lamina.protections.bounded.BoundedNullSpace
    classifier           lamina.heads.statistics.Discriminant; in training lamina.heads.linear.LinearHead
    plan of training     lamina.methods.vpt_deep.VPTDeep

References:
    Ours, from parts of others: Lu et al., Visual Prompt Tuning in Null Space for Continual Learning,
    NeurIPS 2024 (the null space); Goswami et al., FeCAM, NeurIPS 2023, and McDonnell et al., RanPAC,
    NeurIPS 2023 (class statistics under a pre-trained model); Ahrens et al., Read Between the Layers,
    TMLR 2024 (features of several layers).
"""

from __future__ import annotations

from pydantic import Field

from lamina.heads.choose import HeadName
from lamina.methods.vpt_nsp2_exact import VPTNSP2Exact


class Strata(VPTNSP2Exact):
    """Settings of the exact null space, with a tighter bound: class statistics are sharper than a layer per task."""

    lr: float = Field(
        0.001, gt=0, description="learning rate of Adam, divided by 10 after 0.5 and again after 0.8 of a task"
    )
    max_drift: float = Field(
        0.02, ge=0, description="how far one task may move old features, as a share of their spread; chooses the cut"
    )
    head: HeadName = Field(
        "statistics",
        description="classifier: class statistics, or as in the other methods a layer per task, the same by cosine, or "
        "layers balanced on draws",
    )
    layers: int = Field(2, ge=1, description="from how many of the last blocks the classifier reads, side by side")
