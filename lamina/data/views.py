"""Fixed views of training images: a few that every image shows in turn, so that what is computed of them is kept.

Which view an image shows in which pass is decided in `loader.part_of`. A draw depends on the run's seed, its number and
the image alone, so an image has the same views in every task, phase, process and batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from lamina.data.transforms import STILL, InputSpec, Transform, still_of, transform
from lamina.errors import ConfigError

#: how to ask for them: the plain image and its mirror image, so many draws of the augmentation, or none that are fixed
Asked = int | Literal["flip"] | None


@dataclass(frozen=True)
class View:
    """One way in which every image can be seen.

    Attributes:
        transform: from an image to what the model sees.
        address: what a random transform draws is seeded by this and the image's index.
    """

    transform: Transform
    address: tuple[int | str, ...] = ()

    @property
    def key(self) -> tuple[str, ...]:
        """All that it shows depends on, beside the image and the pixels that the backbone takes; empty for plain."""
        return () if self.transform.name == "plain" else (self.transform.name, *map(str, self.address))


def check_views(views: Any, augmentation: str) -> None:
    """Make sure that there are such views.

    Raises:
        ConfigError: when it is neither "flip" nor a number from 1 up, or the augmentation has nothing to draw.
    """
    if views is None or views == "flip":
        return
    if type(views) is not int or views < 1:
        raise ConfigError(f"views must be 'flip' or a whole number from 1 up; got {views!r}")
    if views > 1 and augmentation in STILL:
        raise ConfigError(
            f"augmentation {augmentation!r} draws nothing, so {views} views of an image would all be one; take "
            "views=flip, or another augmentation"
        )


def fixed_views(views: Asked, augmentation: str, spec: InputSpec, seed: int) -> tuple[View, ...]:
    """Return the views that images show in turn; none where views are not fixed.

    Args:
        augmentation: name of the transform that is drawn from.
        seed: of the run.

    Raises:
        ConfigError: when there are no such views.
    """
    check_views(views, augmentation)
    if views is None:
        return ()
    if views == "flip":
        plain = transform(still_of(augmentation), spec)
        mirrored = "mirrored" if plain.name == "plain" else f"{plain.name}, mirrored"
        return View(plain), View(Transform(mirrored, spec, False, lambda image: plain.steps(image).flip(-1)))
    drawn = transform(augmentation, spec)
    return tuple(View(drawn, (seed, "view", number)) for number in range(views))


def in_words(views: Asked, augmentation: str, cached: bool) -> str:
    """Return what training images look like, and whether features stand in for them.

    >>> in_words("flip", "crop-flip", cached=False), in_words(4, "crop-flip", cached=True)
    ('plain and mirrored', 'crop-flip, 4 fixed views (cached features)')
    """
    if views is None:
        said = "none" if cached else augmentation
    elif views == "flip":
        said = "plain and mirrored"
    else:
        said = f"{augmentation}, {views} fixed view{'s' if views > 1 else ''}"
    return said + " (cached features)" * cached
