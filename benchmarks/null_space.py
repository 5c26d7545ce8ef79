"""What null spaces are worth: the experiments of docs/null-space.md.

    python benchmarks/null_space.py --data DIR [--only ablation heads]

Every run is a variant of a recipe on `tiny-odd-10`, with its drift measured; see `study.py`.
"""

from __future__ import annotations

from study import Study, Variant

#: passes over a task's images in sweeps, where the recipes take eight: a quarter of the time
SWEEP = 2


def _parts(b1: bool, b2: bool, loss: bool) -> Variant:
    names = [name for name, there in (("B1", b1), ("B2", b2), ("LN loss", loss)) if there]
    settings = {"use_b1": b1, "use_b2": b2, "use_ln_loss": loss}
    seeds = (0, 1, 2) if len(names) == 3 else (0,)
    return Variant(" + ".join(names) or "none", "vpt-nsp2", settings, seeds)


#: experiment -> its rows
EXPERIMENTS: dict[str, list[Variant]] = {
    "ablation": [
        _parts(*parts)
        for parts in (
            (False, False, False),
            (True, True, True),
            (True, False, False),
            (False, True, False),
            (True, True, False),
            (True, False, True),
            (False, True, True),
        )
    ],
    "control": [
        Variant("projectors", "vpt-nsp2", {}, (0, 1, 2)),
        Variant("the same gain, no directions", "vpt-nsp2", {"gain_control": True}, (0, 1, 2)),
        Variant("projectors, class statistics, two passes", "vpt-nsp2", {"epochs": SWEEP, "head": "statistics"}),
        Variant(
            "the same gain, class statistics, two passes",
            "vpt-nsp2",
            {"epochs": SWEEP, "head": "statistics", "gain_control": True},
        ),
    ],
    "correction": [
        Variant("none", "vpt-nsp2", {}, (0, 1, 2)),
        Variant("affine", "vpt-nsp2", {"ln_correction": "affine"}),
        Variant("affine + center", "vpt-nsp2", {"ln_correction": "affine", "center": True}),
    ],
    "exact": [
        Variant("vpt-nsp2", "vpt-nsp2", {}, (0, 1, 2)),
        Variant("vpt-nsp2-exact", "vpt-nsp2-exact", {}, (0, 1, 2)),
    ],
    "heads": [
        Variant(f"{method}, {head}", method, {"epochs": SWEEP, "head": head})
        for head in ("linear", "statistics", "refined", "cosine")
        for method in ("vpt-deep", "vpt-nsp2", "vpt-nsp2-exact")
    ],
    "eta": [Variant(f"eta {eta}", "vpt-nsp2", {"epochs": SWEEP, "eta1": eta, "eta2": eta}) for eta in (0.9, 0.97, 1.0)]
    + [Variant("1.0, not normalised", "vpt-nsp2", {"epochs": SWEEP, "eta1": 1.0, "eta2": 1.0, "normalize": False})],
    "drift": [
        Variant(f"max_drift {bound}", "vpt-nsp2-exact", {"epochs": SWEEP, "max_drift": bound})
        for bound in (0.05, 0.1, 0.4)
    ]
    + [Variant(f"kept {kept}", "vpt-nsp2-exact", {"epochs": SWEEP, "kept": kept}) for kept in (0.8, 0.9, 0.99, 0.999)],
    "strata": [
        Variant("strata", "strata", {}, (0, 1, 2)),
        Variant("reading the last block alone", "strata", {"layers": 1}),
        Variant("with 16 prompts", "strata", {"length": 16}),
    ],
}


STUDY = Study("null-space", EXPERIMENTS, run={"measure_drift": True})


if __name__ == "__main__":
    STUDY.main(__doc__)
