"""Methods for CLIP on two streams, CLAP and its parts: the experiments of docs/clip.md and docs/clap.md.

    python benchmarks/clip.py --data DIR [--only digits tiny-odd-10]

Every run is a variant of a recipe, and measures how well classes to come are noticed; see `study.py`.
"""

from __future__ import annotations

from study import Study, Variant

SEEDS = (0, 1, 2)
#: whose images are encoded once
KEPT = (
    *("zero-shot", "strata-clip", "clip-adapter", "proof", "coop", "proda", "attriclip", "bayes-prompt"),
    *("clap", "cocoop"),
)
PROMPTED = ("clip-seq", "clip-nsp2", "clip-pgp", "maple")
#: old images a class, where CLAP is compared
MEMORY = 10


def compared(name: str, method: str, **settings: object) -> list[Variant]:
    """Return a method with old images and without, where it may have them."""
    with_memory = Variant(f"{name}, memory {MEMORY}", method, {**settings, "memory": MEMORY}, seeds=SEEDS)
    return [with_memory, Variant(name, method, {**settings, "memory": 0}, seeds=SEEDS)]


#: one part of CLAP left out or done otherwise at a time
ABLATION = {
    "CLAP": {},
    "means alone (without VI)": {"variational": False},
    "no attention": {"guidance": False},
    "no encoders": {"encoder": "none"},
    "one encoder for all tasks": {"encoder": "shared"},
    "no consolidation": {"balance": 0},
    "encoders start at zero": {"start": "zero"},
    "no language-aware loss": {"language": 0.0},
    "prediction in closed form": {"mc": "mean"},
    "probabilities averaged": {"average": "probabilities"},
    "names look at the batch (transductive)": {"context": "batch"},
    "names look at no image": {"context": "none"},
}

EXPERIMENTS: dict[str, list[Variant]] = {
    "digits": [Variant(method, method, seeds=SEEDS, stream="digits") for method in (*KEPT, *PROMPTED)],
    "tiny-odd-10": [
        *(Variant(method, method, seeds=SEEDS) for method in KEPT),
        *(Variant(method, method) for method in PROMPTED),
    ],
    "memory": [
        Variant("zero-shot", "zero-shot"),
        *compared("CoOp", "coop"),
        *compared("AttriCLIP", "attriclip"),
        *compared("CLIP-Adapter", "clip-adapter"),
        *compared("PROOF", "proof"),
        *compared("CLAP", "clap"),
        *compared("CLAP w/o VI", "clap", variational=False),
        *compared("CLAP on CoOp's words", "clap", text="coop"),
        *compared("CLAP on AttriCLIP's words", "clap", text="attriclip"),
    ],
    "ablation": [Variant(name, "clap", {"memory": MEMORY, **changes}) for name, changes in ABLATION.items()],
    "samples": [Variant(f"{count}", "clap", {"memory": MEMORY, "samples": count}) for count in (1, 5, 20, 100)],
}
STUDY = Study("clip", EXPERIMENTS, run={"measure_novelty": True})


if __name__ == "__main__":
    STUDY.main(__doc__)
