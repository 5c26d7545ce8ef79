"""Methods for CLIP on two streams, CLAP and its parts: the experiments of docs/clip.md and docs/clap.md.

    python benchmarks/clip.py --data DIR [--only digits tiny-odd-10]

Every run is a variant of a recipe, and measures how well classes to come are noticed; see `study.py`.
"""

from __future__ import annotations

from study import Study, Variant

from lamina.continual import lesson_settings

SEEDS = (0, 1, 2)
#: whose images are encoded once
KEPT = (
    *("zero-shot", "strata-clip", "clip-adapter", "proof", "coop", "proda", "attriclip", "bayes-prompt"),
    "cocoop",
)
PROMPTED = ("clip-seq", "clip-nsp2", "clip-pgp", "maple", "clap-nsp2")
#: old images a class, where methods are compared with them and without
MEMORY = 10
#: the numbers of CLAP's paper in place of those of our recipes; names look at each image by itself all the same
PAPER = {"cosine": False, "lr": 0.001, "language": 15.0, "epochs": 5, "balance": 2}


def compared(name: str, method: str, **settings: object) -> list[Variant]:
    """Return a method on digits with old images and without, where it may have them."""
    without = {**settings, **lesson_settings(method), "memory": 0}  # as `lamina learn` takes them
    return [
        Variant(f"{name}, memory {MEMORY}", method, {**settings, "memory": MEMORY}, seeds=SEEDS, stream="digits"),
        Variant(name, method, without, seeds=SEEDS, stream="digits"),
    ]


#: one part of CLAP left out or done otherwise at a time
ABLATION = {
    "CLAP": {},
    "by the paper's plan": PAPER,
    "preset=paper (transductive)": {**PAPER, "preset": "paper"},
    "means alone (without VI)": {"variational": False},
    "no attention": {"guidance": False},
    "no encoders": {"encoder": "none"},
    "one encoder for all tasks": {"encoder": "shared"},
    "no consolidation": {"balance": 0},
    "encoders start at zero": {"start": "zero"},
    "no language-aware loss": {"language": 0.0},
    "probabilities averaged": {"average": "probabilities"},
    "names look at the batch (transductive)": {"context": "batch"},
    "names look at no image": {"context": "none"},
}

EXPERIMENTS: dict[str, list[Variant]] = {
    "digits": [
        *(Variant(method, method, seeds=SEEDS, stream="digits") for method in (*KEPT, *PROMPTED)),
        Variant("clap, as its recipe has it", "clap", seeds=SEEDS, stream="digits"),
        Variant("clap, by the paper's plan", "clap", PAPER, seeds=SEEDS, stream="digits"),
    ],
    "tiny-odd-10": [
        Variant("clap, as its recipe has it", "clap", seeds=SEEDS),
        Variant(f"clap, by the paper's plan, memory {MEMORY}", "clap", {**PAPER, "memory": MEMORY}),
        *(Variant(method, method, seeds=SEEDS) for method in KEPT),
        *(Variant(method, method) for method in PROMPTED),
    ],
    "memory": [
        Variant("zero-shot", "zero-shot", seeds=SEEDS, stream="digits"),
        *compared("CoOp", "coop"),
        *compared("AttriCLIP", "attriclip"),
        *compared("CLIP-Adapter", "clip-adapter"),
        *compared("PROOF", "proof"),
        *compared("CLAP", "clap"),
        *compared("CLAP w/o VI", "clap", variational=False),
        *compared("CLAP on CoOp's words", "clap", text="coop"),
        *compared("CLAP on AttriCLIP's words", "clap", text="attriclip"),
    ],
    "ablation": [Variant(name, "clap", changes, SEEDS, "digits") for name, changes in ABLATION.items()],
    "samples": [Variant(f"{count}", "clap", {"samples": count}, SEEDS, "digits") for count in (1, 5, 20, 100)],
}
STUDY = Study("clip", EXPERIMENTS, run={"measure_novelty": True})


if __name__ == "__main__":
    STUDY.main(__doc__)
