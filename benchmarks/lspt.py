"""Prompts, adapters and weights that were made for one task, over several, and on pixels: docs/transfer.md.

    python benchmarks/lspt.py --data DIR [--only continual digits pixels]

Every run is a variant of a recipe; see `study.py`. What these methods do on one task: `transfer.py`.
"""

from __future__ import annotations

from study import Study, Variant

ROWS = {
    "vpt-deep": ("vpt-deep", {}),
    "vpt-nsp2": ("vpt-nsp2", {}),
    "lspt": ("lspt", {}),
    "lspt, learned from the first task alone": ("lspt", {"freeze_after_first": True}),
    "lspt-nsp2": ("lspt-nsp2", {}),
    "gapt": ("gapt", {}),
    "vpt-shallow": ("vpt-shallow", {}),
    "adapter": ("adapter", {}),
    "bi-adaptformer": ("bi-adaptformer", {}),
    "bitfit": ("bitfit", {}),
    "full": ("full", {}),
}


def rows(stream: str, seeds: tuple[int, ...]) -> list[Variant]:
    """Return all of them on a stream."""
    return [Variant(name, method, settings, seeds, stream) for name, (method, settings) in ROWS.items()]


#: the plan of lspt's recipe for pixels, for methods that have none
ON_PIXELS = {"epochs": 10, "batch_size": 8, "optimizer": "adamw", "lr": 0.02, "warm_up": 0.1, "weight_decay": 0.001}
RUN = {"augmentation": "plain", "dense": {"channels": 32, "auxiliary": 0.0}}
PIXELS = [
    Variant("the decoder alone", "linear-probe", ON_PIXELS, stream="segment-digits", run=RUN),
    Variant("vpt-shallow", "vpt-shallow", ON_PIXELS, stream="segment-digits", run=RUN),
    Variant("lspt without LSTM and patches", "lspt", {"carry": "none", "spatial": "none"}, stream="segment-digits"),
    Variant("lspt", "lspt", {}, stream="segment-digits"),
]
EXPERIMENTS = {
    "digits": rows("digits", (0, 1, 2)),
    "continual": rows("tiny-odd-10", (0,)),
    "pixels": PIXELS,
}
STUDY = Study("lspt", EXPERIMENTS, also=("tiny-odd-10", "null-space", "pools"))


if __name__ == "__main__":
    STUDY.main(__doc__)
