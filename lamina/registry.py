"""Names of methods, resolved without importing any of them."""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import entry_points
from typing import Any

from lamina.errors import ConfigError, unknown

#: name -> "module:Class". Written out, so that a reader can grep it and `--help` need not import torch.
METHODS: dict[str, str] = {
    "adapter": "lamina.methods.adapter:Adapter",
    "attriclip": "lamina.methods.attriclip:AttriCLIP",
    "bayes-prompt": "lamina.methods.bayes_prompt:BayesPrompt",
    "bi-adaptformer": "lamina.methods.bi_adaptformer:BiAdaptFormer",
    "bitfit": "lamina.methods.bitfit:BitFit",
    "clap": "lamina.methods.clap:CLAP",
    "clap-nsp2": "lamina.methods.clap_nsp2:CLAPNSP2",
    "clip-adapter": "lamina.methods.clip_adapter:ClipAdapter",
    "clip-nsp2": "lamina.methods.clip_nsp2:CLIPNSP2",
    "clip-pgp": "lamina.methods.clip_pgp:CLIPPGP",
    "clip-seq": "lamina.methods.clip_seq:CLIPSeq",
    "cocoop": "lamina.methods.cocoop:CoCoOp",
    "coda-prompt": "lamina.methods.coda_prompt:CODAPrompt",
    "coop": "lamina.methods.coop:CoOp",
    "cprompt": "lamina.methods.cprompt:CPrompt",
    "dualprompt": "lamina.methods.dualprompt:DualPrompt",
    "dualprompt-pgp": "lamina.methods.dualprompt_pgp:DualPromptPGP",
    "gapt": "lamina.methods.gapt:GaPT",
    "full": "lamina.methods.full:Full",
    "joint": "lamina.methods.joint:Joint",
    "l2p": "lamina.methods.l2p:L2P",
    "l2p-nsp2": "lamina.methods.l2p_nsp2:L2PNSP2",
    "l2p-pgp": "lamina.methods.l2p_pgp:L2PPGP",
    "l2p-pp": "lamina.methods.l2p_pp:L2PPP",
    "linear-probe": "lamina.methods.linear_probe:LinearProbe",
    "lspt": "lamina.methods.lspt:LSPT",
    "lspt-nsp2": "lamina.methods.lspt_nsp2:LSPTNSP2",
    "maple": "lamina.methods.maple:MaPLe",
    "nearest-mean": "lamina.methods.nearest_mean:NearestMean",
    "proda": "lamina.methods.proda:ProDA",
    "proof": "lamina.methods.proof:PROOF",
    "ranpac": "lamina.methods.ranpac:RanPAC",
    "strata": "lamina.methods.strata:Strata",
    "strata-clip": "lamina.methods.strata_clip:StrataCLIP",
    "vpt-deep": "lamina.methods.vpt_deep:VPTDeep",
    "vpt-nsp2": "lamina.methods.vpt_nsp2:VPTNSP2",
    "vpt-nsp2-exact": "lamina.methods.vpt_nsp2_exact:VPTNSP2Exact",
    "vpt-pgp": "lamina.methods.vpt_pgp:VPTPGP",
    "vpt-shallow": "lamina.methods.vpt_shallow:VPTShallow",
    "zero-shot": "lamina.methods.zero_shot:ZeroShot",
}


def method_names() -> list[str]:
    """Return every known method, plug-ins of the entry-point group `lamina.methods` included."""
    return sorted(_table())


def method_class(name: str) -> Any:
    """Import and return the settings class of the method called `name`.

    Raises:
        ConfigError: when nobody knows the name.
    """
    table = _table()
    if name not in table:
        raise ConfigError(unknown("method", name, table))
    module, _, attribute = table[name].partition(":")
    return getattr(import_module(module), attribute)


def default_backbone(kind: Any) -> str:
    """Return the backbone that a method's settings class has where none is asked for."""
    return getattr(kind, "backbone", "lamina:vit-nano")


def _table() -> dict[str, str]:
    return METHODS | {point.name: point.value for point in entry_points(group="lamina.methods")}
