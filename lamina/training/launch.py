"""Settings to Fabric: devices, processes, and the precision of frozen towers."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, get_args

import torch
from lightning_fabric import Fabric

from lamina.errors import ConfigError, unknown
from lamina.machine import keep_memory

Precision = Literal["auto", "bf16", "32"]


def launch(
    work: Callable[..., Any], *arguments: Any, accelerator: str = "auto", devices: int = 1, nodes: int = 1
) -> Any:
    """Call `work(fabric, *arguments)` in every process and return what it returns.

    Several devices of one machine are started here; under torchrun or SLURM, which start processes
    themselves, this process joins the others.
    """
    several = devices * nodes > 1
    outside = "TORCHELASTIC_RUN_ID" in os.environ or "SLURM_NTASKS" in os.environ
    strategy = "auto" if not several else "ddp" if outside or nodes > 1 else "ddp_spawn"
    fabric = Fabric(accelerator=accelerator, devices=devices, num_nodes=nodes, strategy=strategy)
    everyone: Any = _together  # Fabric's type for it leaves out the arguments
    return fabric.launch(everyone, work, *arguments)


def _together(fabric: Fabric, work: Callable[..., Any], *arguments: Any) -> Any:
    """Work, and leave the group of processes only when all are done.

    A process that ends while another still talks to the group can take that one down with it.
    """
    keep_memory()
    with denormals_flushed():
        result = work(fabric, *arguments)
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        fabric.barrier()
        torch.distributed.destroy_process_group()
    return result


@contextmanager
def denormals_flushed() -> Iterator[None]:
    """Take numbers below 1e-38 for 0, as far as this thread computes, and leave things as they were.

    A saturated softmax has gradients of that kind, on which a CPU is many times slower.
    """
    before = float(torch.tensor(1e-38) * 0.1) == 0.0
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(before)


def tower_dtype(precision: Precision, device: torch.device) -> torch.dtype:
    """Return the dtype of a frozen tower: bf16 where the processor computes in it, unless told otherwise.

    Raises:
        ConfigError: when the precision is none of the three.
    """
    if precision not in get_args(Precision):
        raise ConfigError(unknown("precision", precision, get_args(Precision)))
    if precision == "32":
        return torch.float32
    if precision == "bf16":
        return torch.bfloat16
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float32
    return torch.bfloat16 if _cpu_has_bf16() else torch.float32


def _cpu_has_bf16() -> bool:
    """Say whether the processor multiplies bf16 in hardware; elsewhere it would be slower than float32."""
    able = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return torch.backends.mkldnn.is_available() and bool(able.get("avx512_bf16") or able.get("amx_bf16"))
