"""Features of class names that look at images: one attention layer for all tasks (CLAP's visual-guided attention).

References:
    Jha et al., CLAP4CLIP: Continual Learning with Probabilistic Finetuning for Vision-Language Models, NeurIPS 2024,
    section 3.2; the layer is that of Vaswani et al., Attention Is All You Need, NeurIPS 2017, section 3.1.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Context = Literal["image", "batch", "none"]


class Guidance(nn.Module):
    """What class names become that look at one another, within a task, and then at images.

    A layer of a transformer's decoder: names are its sequence, images what they look at. With a single image to look
    at there is nothing to choose, so what a name gets of it is the same for every name, and is computed once.

    Args:
        width: F.
        heads: of both attentions.
        hidden: channels between its last two matrices.
        dropout: of weights and of what is added to names, as long as the layer learns. The weight of a single image
            is not dropped, and what is dropped of a name is the same for all images of a step, as where they are
            looked at together.
        context: what names look at: "image" lets each image be looked at by itself; "batch" all images of a batch
            together, so that a prediction depends on the others; "none" nothing.
    """

    def __init__(
        self, width: int, heads: int = 1, *, hidden: int = 2048, dropout: float = 0.1, context: Context = "image"
    ) -> None:
        super().__init__()
        self.context = context
        self.layer = nn.TransformerDecoderLayer(width, heads, hidden, dropout, F.gelu, batch_first=True)
        if context == "none":  # nothing would ever teach it, and processes that share gradients would wait for its own
            self.layer.multihead_attn = None  # type: ignore[assignment]

    def train(self, mode: bool = True) -> Guidance:
        """Drop nothing where the layer does not learn."""
        return super().train(mode and self.layer.linear1.weight.requires_grad)

    def forward(self, names: Tensor, images: Tensor, apart: Tensor) -> Tensor:
        """Return (B, C, F) of names (C, F), or (B, C, F) where they depend on the image; (1, C, F) if no image matters.

        Args:
            images: (B, F).
            apart: (C, C), true where two classes must not look at one another.
        """
        layer, inside = self.layer, names if names.ndim == 3 else names[None]
        if self.context == "batch":
            return layer(inside.mean(0, keepdim=True), images[None], tgt_mask=apart)
        seen, _ = layer.self_attn(inside, inside, inside, attn_mask=apart, need_weights=False)
        x, told = layer.norm1(inside + layer.dropout1(seen)), inside.new_zeros(1, inside.shape[-1])
        if self.context == "image":
            told = layer.dropout2(self._told(images))
        x, hidden = self._between(x, told)
        hidden = layer.activation(hidden) * layer.dropout(torch.ones_like(hidden[:1]))
        more = layer.linear2(hidden)
        return layer.norm3(x + more * layer.dropout3(torch.ones_like(more[:1])))

    def _between(self, names: Tensor, told: Tensor) -> tuple[Tensor, Tensor]:
        """Return the second norm of names (1 or B, C, F) plus what images told them (B, F), and the first matrix of it.

        A norm takes away a mean and divides by a number. So what the matrix makes of a sum is that of its two parts,
        divided: C + B rows meet the matrix, not C * B.
        """
        norm, matrix = self.layer.norm2, self.layer.linear1
        names, told = (part - part.mean(-1, keepdim=True) for part in (names, told))
        squares = names.square().sum(-1) + told.square().sum(-1)[:, None] + 2 * (names @ told[..., None]).squeeze(-1)
        scale = (squares.clamp_min(0) / names.shape[-1] + norm.eps).rsqrt()[..., None]
        weight = matrix.weight * norm.weight
        first = names @ weight.mT + (told @ weight.mT)[:, None]
        bias = torch.addmv(matrix.bias, matrix.weight, norm.bias)
        return (names + told[:, None]) * scale * norm.weight + norm.bias, torch.addcmul(bias, first, scale)

    def _told(self, images: Tensor) -> Tensor:
        """Return what looking at each of some images (B, F) alone brings, (B, F): its value, whoever looks."""
        attention = self.layer.multihead_attn
        weight, bias = attention.in_proj_weight.chunk(3)[2], attention.in_proj_bias.chunk(3)[2]
        return attention.out_proj(F.linear(images, weight, bias))


def apart(sizes: list[int], device: torch.device) -> Tensor:
    """Return which classes are of different tasks, (C, C), for tasks of so many classes one after the other.

    >>> apart([1, 2], torch.device("cpu")).int().tolist()
    [[0, 1, 1], [1, 0, 0], [1, 0, 0]]
    """
    task = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(device)
    return task[:, None] != task
