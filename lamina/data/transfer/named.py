"""All data sets of transfer learning by the name of their stream, and how the images of a family are shown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lamina.data.transfer.fgvc import FGVC
from lamina.data.transfer.medical import MEDICAL
from lamina.data.transfer.sets import TransferSet
from lamina.data.transfer.vtab import VTAB

TRANSFER: dict[str, TransferSet] = {**FGVC, **VTAB, **MEDICAL}

#: how a name begins -> what people call those whose names begin so
FAMILIES = {"fgvc": "FGVC", "vtab": "VTAB-1K", "medical": "medical"}

#: family -> settings of runs. ImageNet's mean and deviation whatever the backbone, as the released code of VPT has it.
SHOWN: Mapping[str, Mapping[str, Any]] = {
    "fgvc": {"augmentation": "resize-crop-flip", "normalization": "imagenet"},
    "vtab": {"augmentation": "stretch", "normalization": "imagenet"},
    "medical": {"augmentation": "stretch", "normalization": "imagenet"},
}
