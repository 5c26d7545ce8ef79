"""BitFit: all biases of the tower are trained and nothing else of it, on one task after another.

As in full fine-tuning the tower is a copy in float32; of its other weights nothing is saved and nothing changes.

Shared parts, in reading order:
    tower and plan       lamina.methods.full.Full
    classifier           lamina.heads.linear.LinearHead; others by name: lamina.heads.choose.head_of

References:
    Ben Zaken, Goldberg and Ravfogel, BitFit, ACL 2022; as a baseline in Jia et al., Visual Prompt Tuning, ECCV 2022,
    table 1 (Bias).
"""

from __future__ import annotations

from pydantic import Field

from lamina.methods.full import Full


class BitFit(Full):
    """Settings; those of full fine-tuning, at 0.001 per 256 images. Biases are not worn down, the classifier is."""

    lr: float = Field(
        0.0015, gt=0, description="learning rate at its highest, not scaled by anything; then it falls along a cosine"
    )

    def tunes(self, name: str) -> bool:
        """Say whether the parameter of this name is a bias."""
        return name.endswith("bias")
