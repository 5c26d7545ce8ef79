"""Prompt pools and gradient projection: the experiments of docs/prompt-pools.md.

    python benchmarks/pools.py --data DIR [--only methods projection]

Every run is a variant of a recipe; see `study.py`.
"""

from __future__ import annotations

from study import Study, Variant

SEEDS = (0, 1, 2)
METHODS = (
    "vpt-deep",
    "vpt-pgp",
    "l2p",
    "l2p-pgp",
    "l2p-nsp2",
    "l2p-pp",
    "dualprompt",
    "dualprompt-pgp",
    "coda-prompt",
    "cprompt",
)
#: the block that prompts enter when the query is early: a third of the way
ENTRY = 4
#: gradient projection as its authors' code has it
AS_RELEASED = {"space": "sample", "apply": "gradient"}

#: experiment -> its rows
EXPERIMENTS: dict[str, list[Variant]] = {
    "methods": [Variant(method, method, seeds=SEEDS) for method in METHODS],
    "digits": [Variant(method, method, seeds=SEEDS, stream="digits") for method in METHODS],
    "online": [Variant(method, method, stream="digits", run={"online": True}) for method in METHODS],
    "projection": [
        Variant("l2p", "l2p", seeds=SEEDS),
        Variant("l2p, PGP", "l2p-pgp", seeds=SEEDS),
        Variant("l2p, NSP²", "l2p-nsp2", seeds=SEEDS),
        Variant("dualprompt", "dualprompt", seeds=SEEDS),
        Variant("dualprompt, PGP", "dualprompt-pgp", seeds=SEEDS),
        Variant("vpt-deep", "vpt-deep", seeds=SEEDS),
        Variant("vpt-deep, PGP", "vpt-pgp", seeds=SEEDS),
        Variant("vpt-deep, NSP², channels alone", "vpt-nsp2", {"use_b2": False, "use_ln_loss": False}),
        Variant("vpt-deep, NSP²", "vpt-nsp2", seeds=SEEDS),
    ],
    "released": [
        Variant("l2p", "l2p", seeds=SEEDS, stream="digits"),
        Variant("l2p, PGP", "l2p-pgp", seeds=SEEDS, stream="digits"),
        Variant("l2p, PGP as released", "l2p-pgp", AS_RELEASED, seeds=SEEDS, stream="digits"),
        Variant("dualprompt", "dualprompt", seeds=SEEDS, stream="digits"),
        Variant("dualprompt, PGP", "dualprompt-pgp", seeds=SEEDS, stream="digits"),
        Variant("dualprompt, PGP as released", "dualprompt-pgp", AS_RELEASED, seeds=SEEDS, stream="digits"),
    ],
    "query": [
        Variant("frozen, before block 0", "l2p", seeds=SEEDS, stream="digits"),
        Variant(f"frozen, before block {ENTRY}", "l2p", {"entry": ENTRY}, seeds=SEEDS, stream="digits"),
        Variant(
            f"early, before block {ENTRY}", "l2p", {"query": "early", "entry": ENTRY}, seeds=SEEDS, stream="digits"
        ),
    ],
}
STUDY = Study("pools", EXPERIMENTS, also=("tiny-odd-10", "digits", "null-space"))


if __name__ == "__main__":
    STUDY.main(__doc__)
