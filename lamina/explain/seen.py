"""Images, what a model says of them, and what it looks at."""

from __future__ import annotations

import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lamina.data.incoming import expand, incoming
from lamina.errors import DataError
from lamina.explain.maps import Maps, look, whose_attention
from lamina.explain.opened import Opened
from lamina.model import Batch
from lamina.seeds import seed_at
from lamina.text import printable
from lamina.training.evaluation import scores

#: so many images are drawn at most: nobody looks at more, and a picture of them would be huge
MOST = 32


@dataclass(frozen=True, eq=False)
class Seen:
    """One image.

    Attributes:
        path: as given.
        pixels: (3, size, size), uint8, as the model gets them.
        name, probability: the likeliest class; None of a head that labels pixels.
        maps: what the model looks at.
    """

    path: str
    pixels: Tensor
    name: str | None
    probability: float | None
    maps: Maps

    @property
    def said(self) -> str:
        """Class and probability in words; nothing where there is none."""
        return "" if self.probability is None else f"{printable(self.name or '')} {100 * self.probability:.1f} %"


@dataclass(frozen=True, eq=False)
class Explanation:
    """What a model looks at in some images.

    Attributes:
        facts: of the model and of how it was asked, in words.
        notes: what a reader should know before taking a map for an answer.
        attends: whose attention the maps show.
        images: one or more.
    """

    facts: dict[str, str]
    notes: Sequence[str]
    attends: str
    images: Sequence[Seen]

    @property
    def compared(self) -> bool:
        """Whether a prompt token enters any block, so that there are cosines."""
        return any(self.images[0].maps.tokens)

    def arrays(self) -> dict[str, np.ndarray]:
        """Return everything as arrays; n images, L blocks, M tokens, patches in height x width.

        `path` and `class` (n,), text; `probability` (n,), NaN without a class; `attention` (n, L, height, width);
        `on_prompts` (n, L); `cosine` (n, L, height, width), NaN in blocks that no token enters; and for each other
        block l, `cosine_l` (n, M, height, width), token by token.
        """
        maps = [seen.maps for seen in self.images]
        each = [torch.stack(own) for own in zip(*(own.each for own in maps), strict=True)]
        return {
            "path": np.array([printable(seen.path) for seen in self.images]),
            "class": np.array([seen.name or "" for seen in self.images]),
            "probability": np.array([seen.probability for seen in self.images], dtype=np.float64),
            "attention": torch.stack([own.attention for own in maps]).numpy(),
            "on_prompts": torch.stack([own.on_prompts for own in maps]).numpy(),
            "cosine": torch.stack([own.cosine for own in maps]).numpy(),
            **{f"cosine_{layer}": own.numpy() for layer, own in enumerate(each) if own.shape[1]},
        }

    def npz(self) -> bytes:
        """Return `arrays` as a file for `numpy.load`."""
        file = io.BytesIO()
        np.savez_compressed(file, allow_pickle=False, **self.arrays())
        return file.getvalue()

    def as_dict(self) -> dict[str, Any]:
        """Return plain values, without the maps themselves."""
        return {
            **self.facts,
            "notes": list(self.notes),
            "attention_of": self.attends,
            "prompt_tokens": self.images[0].maps.tokens,
            "images": [
                {
                    "path": seen.path,
                    "class": seen.name,
                    "probability": seen.probability,
                    "on_prompts": seen.maps.on_prompts.tolist(),
                }
                for seen in self.images
            ],
        }


def explain(
    opened: Opened, arguments: Sequence[str], stdin: Iterable[str] | None = None, *, post_norm: bool = False
) -> Explanation:
    """Look at images one by one, so that what is said of one does not depend on the others.

    Args:
        arguments: files, folders, glob patterns; "-" for paths on `stdin`.
        post_norm: as of `lamina.explain.maps.look`.

    Raises:
        DataError: when there is no image or too many, or one cannot be read.
    """
    paths = list(islice(expand(arguments, stdin), MOST + 1))
    if len(paths) > MOST:
        raise DataError(f"at most {MOST} images are drawn at once; name fewer")
    images = []
    for item in incoming(iter(paths), opened.plain, opened.plain.spec.max_side):
        if item.pixels is None:
            raise DataError(f"{item.path or 'an image'} cannot be read: {item.error}; mend it, or name another one")
        images.append(_seen(opened, item.path, item.pixels, post_norm))
    if not images:
        raise DataError("there is no image to look at; name one or more")
    maps = images[0].maps
    facts = {
        "model": opened.name,
        "method": opened.method,
        "backbone": opened.backbone,
        "precision": opened.precision,
        "blocks": str(len(maps.each)),
        "patches": " x ".join(map(str, maps.attention.shape[1:])),
    }
    return Explanation(facts, _notes(opened, maps, post_norm), whose_attention(opened.model), images)


@torch.inference_mode()
def _seen(opened: Opened, path: str, pixels: Tensor, post_norm: bool) -> Seen:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed_at(0, "explain"))  # some heads draw
        batch = opened.plain.normalised(pixels[None]).to(opened.device)
        maps, features = look(opened.model, batch, post_norm=post_norm)
        logits = scores(opened.model, Batch(batch, features=features))[0].float()
    if logits.ndim > 1:
        return Seen(path, pixels, None, None, maps)
    best, column = (logits / opened.temperature).softmax(-1).cpu().max(-1)
    return Seen(path, pixels, opened.classes[int(column)], float(best), maps)


def _notes(opened: Opened, maps: Maps, post_norm: bool) -> list[str]:
    """Say what enters, and what the maps do not show."""
    notes, prompts = [], opened.model.prompts
    if any(maps.tokens):
        behind = post_norm or any(maps.behind_norm)
        where = "behind the first norm of a block" if behind else "as both enter a block"
        blocks = f"{sum(map(bool, maps.tokens))} of {len(maps.tokens)} blocks"
        notes.append(f"Prompt tokens enter {blocks}; they are compared with patches {where}.")
    if any(maps.prefixes):
        notes.append("Prompts enter as rows of keys and values: there is no token to compare with patches.")
    if not any(maps.tokens) and not any(maps.prefixes):
        notes.append("No prompt enters a block: there is attention alone.")
    if opened.model.tower.readout is None:
        notes.append("The features are not those of a class token, so attention is that of all patches, averaged.")
    if prompts is not None and prompts.readout == "prompts":
        notes.append("The classifier reads what became of the prompts, not the class token.")
    if opened.model.transductive:
        notes.append("The model lets the images of a batch decide together; here each was alone in its batch.")
    return notes
