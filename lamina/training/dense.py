"""Settings of runs on streams whose images have label maps."""

from __future__ import annotations

from pydantic import Field

from lamina.config import Settings


class DenseSettings(Settings):
    """How pixels are told apart; the defaults are those of SETR-PUP, but for small towers."""

    channels: int | None = Field(
        default=None,
        ge=1,
        description="of the maps inside the decoders; None is a third of the tower's width, at most the paper's 256",
    )
    auxiliary: float = Field(
        default=0.4, ge=0, description="weight of the losses of decoders that read earlier blocks; 0 leaves these away"
    )
    padding: bool = Field(
        default=True, description="fill up training images that are smaller than a crop; else refuse them"
    )
    multi_scale: bool = Field(
        default=False,
        description="in the end also look at test images in six sizes and mirrored, and average probabilities",
    )
