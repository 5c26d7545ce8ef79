"""Pre-train `lamina:vit-nano-mae` on the even classes of Tiny-ImageNet, from nothing and without a label.

    python pretraining/vit_nano_mae.py --data DIR --out runs/vit-nano-mae

A masked auto-encoder: the architecture of `lamina:vit-nano` sees a quarter of an image's patches, a small decoder
says what the others look like, and the loss is on those alone, each normalised by its own mean and deviation. The
decoder is thrown away. Every random draw belongs to a step, so a run that was stopped goes on from its last checkpoint,
at most a minute old, as if it had not been: type the same command again. Odd classes are never read, nor are
validation images.

The settings stand in `vit_nano_mae.toml` beside this file; loss and time go to `OUT/log.jsonl`.

References:
    He et al., Masked Autoencoders Are Scalable Vision Learners, CVPR 2022, section 3.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import tomllib
from pathlib import Path

import torch
from timm.layers import build_sincos2d_pos_embed
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from vit_nano import HERE, cropped, even, normalised

from lamina.data import sources
from lamina.seeds import generator_at
from lamina.training.launch import tower_dtype

#: seconds between two checkpoints
_BETWEEN = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds tiny-imagenet/")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the log")
    arguments = parser.parse_args()
    settings = tomllib.loads((HERE / "vit_nano_mae.toml").read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    images, _ = even(sources.tiny_imagenet(arguments.data).train)
    Run(settings, images, arguments.out).go()


class MaskedAutoEncoder(nn.Module):
    """An encoder that sees few patches, and a decoder that says what the others look like.

    Positions of both are fixed waves (sines and cosines of row and column), zero for the class token.

    Args:
        model: arguments of timm's `VisionTransformer`.
        decoder: its `width`, `depth` and `heads`.
    """

    def __init__(self, model: dict, decoder: dict) -> None:
        super().__init__()
        self.encoder = VisionTransformer(**model, num_classes=0)
        self.patch = model["patch_size"]
        side, width = model["img_size"] // self.patch, decoder["width"]
        self.encoder.pos_embed.requires_grad_(False).copy_(waves(side, model["embed_dim"]))
        self.enter = nn.Linear(model["embed_dim"], width)
        self.blank = nn.Parameter(torch.randn(width) * 0.02)
        self.register_buffer("places", waves(side, width))
        self.blocks = nn.ModuleList([Block(width, decoder["heads"], qkv_bias=True) for _ in range(decoder["depth"])])
        self.norm = nn.LayerNorm(width)
        self.leave = nn.Linear(width, 3 * self.patch**2)
        nn.init.normal_(self.leave.weight, std=0.02)
        for block in [*self.encoder.blocks, *self.blocks]:
            block.attn.fused_attn = False  # on a CPU, fused attention in bf16 is slow backwards

    def forward(self, images: Tensor, order: Tensor, seen: int) -> Tensor:
        """Return the loss on the patches that are not seen.

        Args:
            images: (B, 3, size, size), normalised.
            order: (B, P), a permutation of the patches of each; the first `seen` are seen.
        """
        patches = self.patches(images)
        shown, hidden = order[:, :seen], order[:, seen:]
        x = self.encoded(pick(patches, shown), shown)
        x = self.enter(x)
        places = self.places[0].expand(len(x), -1, -1)
        blank = self.blank.to(x.dtype).expand(len(x), hidden.shape[1], -1)
        where = torch.cat([torch.zeros_like(order[:, :1]), order + 1], 1)
        x = torch.cat([x, blank], 1) + pick(places, where).to(x.dtype)
        for block in self.blocks:
            x = block(x)
        said = self.leave(self.norm(x[:, 1 + seen :])).float()
        target = pick(patches, hidden)
        spread, mean = torch.var_mean(target, -1, keepdim=True)
        return F.mse_loss(said, (target - mean) / (spread + 1e-6).sqrt())

    def patches(self, images: Tensor) -> Tensor:
        """(B, 3, size, size) to (B, P, 3 * patch * patch), in the order of the patch embedding's weight."""
        side = images.shape[-1] // self.patch
        cells = images.view(len(images), 3, side, self.patch, side, self.patch)
        return cells.permute(0, 2, 4, 1, 3, 5).reshape(len(images), side * side, -1)

    def encoded(self, patches: Tensor, which: Tensor) -> Tensor:
        """Encode some patches (B, K, 3 * patch * patch), whose numbers are `which` (B, K): (B, 1 + K, D)."""
        e = self.encoder
        tokens = F.linear(patches, e.patch_embed.proj.weight.flatten(1), e.patch_embed.proj.bias)
        places = e.pos_embed[0]
        tokens = tokens + places[1:][which].to(tokens.dtype)
        first = (e.cls_token[0] + places[:1]).to(tokens.dtype).expand(len(tokens), -1, -1)
        x = torch.cat([first, tokens], 1)
        for block in e.blocks:
            x = block(x)
        return e.norm(x)


class Run:
    """One pre-training run: model, optimizer and the number of the next step."""

    def __init__(self, settings: dict, images: Tensor, out: Path) -> None:
        self.settings, self.images, self.out = settings, images, out
        self.seed, self.size = settings["seed"], settings["batch_size"]
        torch.manual_seed(self.seed)
        self.model = MaskedAutoEncoder(settings["model"], settings["decoder"])
        learned = [p for p in self.model.parameters() if p.requires_grad]
        groups = [
            {"params": [p for p in learned if p.ndim >= 2], "weight_decay": settings["weight_decay"]},
            {"params": [p for p in learned if p.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=settings["lr"], betas=(0.9, 0.95), fused=True)
        self.bf16 = tower_dtype("auto", torch.device("cpu")) == torch.bfloat16
        self.step, self.seconds = 0, 0.0
        self.in_epoch = len(images) // self.size
        self.steps = settings["epochs"] * self.in_epoch
        self._restore()

    def go(self) -> None:
        began, seen, losses = time.perf_counter(), 0, []
        while self.step < self.steps:
            epoch, at = divmod(self.step, self.in_epoch)
            loss = self.update(*self.batch(epoch, at))
            if not math.isfinite(loss):
                raise SystemExit(f"step {self.step}: the loss is {loss}; lower lr")
            losses.append(loss)
            self.step += 1
            seen += self.size
            now, last = time.perf_counter(), self.step % self.in_epoch == 0
            if last or now - began > _BETWEEN:
                self.seconds += now - began
                row = {
                    "step": self.step,
                    "epoch": round(self.step / self.in_epoch, 2),
                    "loss": round(sum(losses) / len(losses), 4),
                    "hours": round(self.seconds / 3600, 3),
                }
                print(f"{row} of {self.steps} steps, {seen / (now - began):.0f} images/s", flush=True)
                self._save(row)
                began, seen, losses = time.perf_counter(), 0, []

    def batch(self, epoch: int, at: int) -> tuple[Tensor, Tensor]:
        """Crops (B, 3, size, size) of one step, and an order of their patches (B, P)."""
        order = torch.randperm(len(self.images), generator=generator_at(self.seed, "order", epoch))
        chosen = order[at * self.size : (at + 1) * self.size]
        draw = generator_at(self.seed, "augment", epoch, at)
        size = self.settings["model"]["img_size"]
        images = cropped(self.images[chosen], size, self.settings["crop_area"], draw)
        patches = (size // self.settings["model"]["patch_size"]) ** 2
        return normalised(images * 255), torch.rand(len(images), patches, generator=draw).argsort(1)

    def update(self, images: Tensor, order: Tensor) -> float:
        """Take one step; return the loss."""
        warm = max(1, int(self.settings["warmup_share"] * self.steps))
        wave = 0.5 * (1 + math.cos(math.pi * max(0, self.step - warm) / (self.steps - warm)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.settings["lr"] * min(1.0, (self.step + 1) / warm) * wave
        seen = order.shape[1] - round(self.settings["masked"] * order.shape[1])
        with torch.autocast("cpu", torch.bfloat16, enabled=self.bf16):
            loss = self.model(images, order, seen)
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.item()

    def _save(self, row: dict) -> None:
        encoder = self.model.encoder.state_dict()
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": encoder,
            "decoder": {k: v for k, v in self.model.state_dict().items() if not k.startswith("encoder.")},
            "optimizer": self.optimizer.state_dict(),
        }
        torch.save(state, self.out / "state.pt.draft")
        os.replace(self.out / "state.pt.draft", self.out / "state.pt")
        with (self.out / "log.jsonl").open("a") as log:
            log.write(json.dumps(row) + "\n")

    def _restore(self) -> None:
        if not (self.out / "state.pt").exists():
            return
        state = torch.load(self.out / "state.pt", weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        encoder = {f"encoder.{name}": value for name, value in state["model"].items()}
        self.model.load_state_dict(encoder | state["decoder"])
        self.optimizer.load_state_dict(state["optimizer"])


def waves(side: int, width: int) -> Tensor:
    """Fixed positions of a grid and, before them, zeros of the class token: (1, 1 + side * side, width)."""
    grid = build_sincos2d_pos_embed([side, side], width)
    return torch.cat([torch.zeros(1, width), grid.reshape(side * side, width)])[None]


def pick(x: Tensor, rows: Tensor) -> Tensor:
    """Return the rows (B, K) of x (B, n, W): (B, K, W)."""
    return x.gather(1, rows[..., None].expand(-1, -1, x.shape[-1]))


if __name__ == "__main__":
    main()
