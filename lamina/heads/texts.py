"""Names of classes to features, by a frozen text tower: what heads for CLIP compare images with."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from lamina.backbones.clip import TextSide
from lamina.backbones.tower import Tower
from lamina.errors import ConfigError, DataError
from lamina.heads.templates import spoken
from lamina.prompts.contexts import TOGETHER, Position, Wording, check_room, encoded, ids_of, len_of, tokenized, worded
from lamina.prompts.reading import along
from lamina.text import printable


def text_side(tower: Tower, method: str) -> TextSide:
    """Return the text side that goes with an image tower.

    Raises:
        ConfigError: when there is none.
    """
    if tower.text is None:
        raise ConfigError(
            f"{method} reads the names of classes, and this backbone has no text tower; take one of CLIP: "
            "lamina:clip-nano, or open_clip:MODEL:TAG"
        )
    return tower.text


def version_of(*parts: Tensor) -> Hashable:
    """Return something that is another one as soon as one of some tensors was changed, or moved."""
    return tuple((part.data_ptr(), part._version) for part in parts)


class ClassTexts(nn.Module):
    """Features of class names, each of length 1; what is known of a class is computed once and kept.

    Args:
        side: of a CLIP model.
        names: what to read instead of a class's own name.

    Attributes:
        classes: names of the classes met so far, by column.
        per_image: features depend on the image, too; then `of_images` is asked for them.
        encoded_classes: how many classes were encoded so far, again or anew, where nothing was trained.
        pool_size: how many prompts images choose from; 0 where there is nothing to choose.
    """

    per_image: bool = False
    pool_size: int = 0

    def __init__(self, side: TextSide, names: Mapping[str, str] | None = None) -> None:
        super().__init__()
        self.tower, self.side, self.names = side.tower, side, dict(names or {})
        self.classes: list[str] = []
        self.encoded_classes = 0
        self._kept: dict[Hashable, tuple[Hashable, Tensor]] = {}

    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        """Take up new classes, and freeze what must not move any more.

        Raises:
            DataError: when a name is no word, or makes a text too long, or another class is called the same.
        """
        self.take_up({c: name for c, name in zip(columns, classes, strict=True) if c >= len(self.classes)})

    def take_up(self, classes: Mapping[int, str]) -> None:
        """Write the texts of new classes, by column."""
        new = [classes[column] for column in sorted(classes)]
        said = {spoken(name, self.names).lower(): name for name in self.classes}  # tokenizers do not tell cases apart
        for name in new:
            text = spoken(name, self.names)
            if other := said.get(text.lower()):
                raise DataError(
                    f"classes {printable(other)!r} and {printable(name)!r} are both called {printable(text)!r}, "
                    "so a text tower cannot tell them apart; rename one, or say what it is with names={...}"
                )
            said[text.lower()] = name
        if new:
            self.write([spoken(name, self.names) for name in new])
            self.classes = [*self.classes, *new]

    def preview(self, classes: Sequence[str]) -> ClassTexts:
        """Return texts that know further classes, too, by their names alone; parameters are shared, not copied."""
        out = copy.copy(self)
        out._kept = dict(self._kept)
        known = set(self.classes)
        out.take_up({len(self.classes) + i: name for i, name in enumerate(n for n in classes if n not in known)})
        return out

    def write(self, names: Sequence[str]) -> None:
        """Write the texts of new classes, as they are to be read."""
        raise NotImplementedError

    def encode(self, columns: Sequence[int]) -> Tensor:
        """Return the features (C, F) of some classes, with their gradient."""
        raise NotImplementedError

    def of_images(self, images: Tensor, columns: Sequence[int] | None = None) -> Tensor:
        """Return the features (B, C, F), float32, of some classes or of all, for images whose features are (B, F).

        Texts that do not depend on the image are the same for each.
        """
        return self(columns).expand(len(images), -1, -1)

    def choose(self, images: Tensor) -> Tensor | None:
        """Return which prompts images (B, F) take, (B, k); None where there is nothing to choose."""
        return None

    def terms(self, images: Tensor) -> dict[str, Tensor]:
        """Return extra losses by name, weighted, for images whose features are (B, F)."""
        return {}

    def says(self, column: int) -> str:
        """Return what is read of a class, in words."""
        return f"[learned words] {spoken(self.classes[column], self.names)}."

    def version(self, column: int) -> Hashable:
        """Return what a class's features depend on; they are computed anew when it has changed."""
        return None

    def forward(self, columns: Sequence[int] | None = None) -> Tensor:
        """Return the features (C, F), float32, of some classes or of all; of the tower's own where nothing learns."""
        columns = range(len(self.classes)) if columns is None else columns
        if torch.is_grad_enabled() and any(parameter.requires_grad for parameter in self.parameters()):
            return self.encode(columns)
        traced = torch.compiler.is_exporting()  # what is kept then is what goes into the file
        stale = [c for c in columns if c not in self._kept or not (traced or self._kept[c][0] == self.version(c))]
        if stale:
            with torch.inference_mode(False), torch.no_grad():
                fresh = self.encode(stale)
            self.encoded_classes += len(stale)
            self._kept |= {c: (self.version(c), row) for c, row in zip(stale, fresh, strict=True)}
        return torch.stack([self._kept[c][1] for c in columns])

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ClassTexts:
        before = self._where
        out = super()._apply(fn, recurse)
        if self._where != before:
            self._kept = {}  # they stayed where they were computed
        return out

    @property
    def _where(self) -> tuple[torch.device, torch.dtype]:
        return self.tower.positions.device, self.tower.positions.dtype


class HandTexts(ClassTexts):
    """Templates written by hand; the feature of a class is the mean over templates, of length 1 again.

    Args:
        templates: each with one {}.

    References:
        Radford et al., Learning Transferable Visual Models From Natural Language Supervision, ICML 2021, section 3.1.
    """

    def __init__(self, side: TextSide, templates: Sequence[str], names: Mapping[str, str] | None = None) -> None:
        super().__init__(side, names)
        self.templates = list(templates)
        self._ids: list[Tensor] = []  # of each class (templates, 77)

    def write(self, names: Sequence[str]) -> None:
        self._ids = [
            *self._ids,
            *(
                tokenized(self.side, [t.replace("{}", name) for t in self.templates], [name] * len(self.templates))
                for name in names
            ),
        ]

    def says(self, column: int) -> str:
        more = f", and {len(self.templates) - 1} more like it" if len(self.templates) > 1 else ""
        return self.templates[0].replace("{}", spoken(self.classes[column], self.names)) + more

    def encode(self, columns: Sequence[int]) -> Tensor:
        return F.normalize(self.encode_each(columns).mean(1), dim=-1)

    def encode_each(self, columns: Sequence[int]) -> Tensor:
        """Return the features (C, templates, F) of every text, of length 1."""
        ids = torch.cat([self._ids[c] for c in columns])
        order = ids.argmax(1).argsort()  # texts of like length go together, and stop where the longest of them ends
        device = self.tower.positions.device
        parts = order.split(TOGETHER)
        read = [self.tower(ids[part].to(device)).features for part in along(parts, [len(part) for part in parts])]
        features = F.normalize(torch.cat(read)[order.argsort()], dim=-1)
        return features.unflatten(0, (len(columns), len(self.templates)))


class EachText(HandTexts):
    """Features of every template by itself, (C, templates, F), each of length 1."""

    def encode(self, columns: Sequence[int]) -> Tensor:
        return self.encode_each(columns)


class ContextTexts(ClassTexts):
    """Learned words before, around or behind the name of a class (CoOp).

    Args:
        length: n, learned words.
        words: to start from, such as "a photo of a"; as many as there are learned ones. Empty draws them.
        position: of the class name.
        scope: "shared": one context for all; "task": each task has one, and those before stay; "class": each class has
            one of its own (class-specific contexts).
        fixed: words that stay as they are, between context and name.

    References:
        Zhou et al., Learning to Prompt for Vision-Language Models, IJCV 2022, section 3.2.
    """

    def __init__(
        self,
        side: TextSide,
        length: int = 16,
        *,
        words: str = "",
        position: Position = "end",
        scope: Literal["shared", "task", "class"] = "shared",
        fixed: str = "",
        names: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(side, names)
        check_room(side, length, f"length={length}")
        self.length, self.words, self.position, self.scope, self.fixed = length, words, position, scope, fixed
        if words and len_of(side, words) != length:
            raise ConfigError(
                f"{words!r} has {len_of(side, words)} tokens, and there are {length} learned ones to start from them: "
                "change one or the other"
            )
        self.contexts = nn.ParameterList()  # (n, W) each; those of classes side by side (classes, n, W)
        self._wording: Wording | None = None
        self._of: list[tuple[int, int]] = []  # of each class: which of the contexts, and which row of it

    def begin_task(self, index: int, classes: Sequence[str], columns: Sequence[int]) -> None:
        if self.scope != "shared":
            self.contexts.requires_grad_(False)
        met = len(self.classes)
        super().begin_task(index, classes, columns)
        new = len(self.classes) - met
        if not len(self.contexts) or (self.scope != "shared" and new):
            self.contexts.append(nn.Parameter(self._new(new if self.scope == "class" else None)))
        if not new:  # with nothing of its own to learn, a task goes on with what its classes have
            for part in {self._of[column][0] for column in columns}:
                self.contexts[part].requires_grad_(True)
        self._of += [(len(self.contexts) - 1, place) for place in range(new)]

    def _new(self, classes: int | None) -> Tensor:
        if self.words:
            start = self.tower.words(ids_of(self.side, [self.words])[0, 1 : self.length + 1].to(self._device))
        else:
            start = torch.empty(self.length, self.tower.width, device=self._device).normal_(std=0.02)
        return start.clone() if classes is None else start.expand(classes, -1, -1).clone()

    @property
    def _device(self) -> torch.device:
        return self.tower.positions.device

    def write(self, names: Sequence[str]) -> None:
        new, old = worded(self.side, names, self.length, position=self.position, words=self.fixed), self._wording
        self._wording = new if old is None else old.joined(new)

    def version(self, column: int) -> Hashable:
        return version_of(self.contexts[self._context_of(column)[0]])

    def _context_of(self, column: int) -> tuple[int, int]:
        """Return a class's context; a class that is only previewed has the newest one."""
        return self._of[column] if column < len(self._of) else (len(self.contexts) - 1, 0)

    def encode(self, columns: Sequence[int]) -> Tensor:
        assert self._wording is not None
        if self.scope == "class":
            own = torch.stack([self.contexts[part][row] for part, row in map(self._context_of, columns)])
            return F.normalize(encoded(self.tower, self._wording.of(columns), own[None])[0], dim=-1)
        parts: dict[int, list[int]] = {}
        for place, column in enumerate(columns):
            parts.setdefault(self._context_of(column)[0], []).append(place)
        found = [
            encoded(self.tower, self._wording.of([columns[p] for p in places]), self.contexts[part][None])[0]
            for part, places in parts.items()
        ]
        order = torch.tensor([place for places in parts.values() for place in places]).argsort()
        return F.normalize(torch.cat(found)[order], dim=-1)
