"""Pre-train `lamina:vit-nano` on the even classes of Tiny-ImageNet, from nothing, on a few CPU cores.

    python pretraining/vit_nano.py --data DIR --out runs/vit-nano

Supervised, in stages of growing image size, with Muon on the matrices of the blocks and AdamW on the
rest. Every random draw belongs to a step, so a run that was stopped goes on from its last checkpoint
as if it had not been: type the same command again. Odd classes are never read.

The settings stand in `vit_nano.toml` beside this file; loss, accuracy and speed go to `OUT/log.jsonl`.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import time
import tomllib
from pathlib import Path

import numpy as np
import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torch.nn import functional as F

from lamina.data import sources
from lamina.data.pictures import Pictures
from lamina.seeds import generator_at

HERE = Path(__file__).parent
MEAN, STD = (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder that holds tiny-imagenet/")
    parser.add_argument("--out", type=Path, required=True, help="folder for checkpoints and the log")
    parser.add_argument("--device", default="cpu")
    arguments = parser.parse_args()
    settings = tomllib.loads((HERE / "vit_nano.toml").read_text())
    arguments.out.mkdir(parents=True, exist_ok=True)
    source = sources.tiny_imagenet(arguments.data)
    train, held = even(source.train), even(source.test)
    Run(settings, train, held, arguments.out, torch.device(arguments.device)).go()


def even(images: Pictures) -> tuple[Tensor, Tensor]:
    """Return the images (n, 3, 64, 64), uint8, of the classes with an even label, and their halved labels (n,)."""
    wanted = np.flatnonzero(images.labels % 2 == 0)
    pixels = images.opened(wanted, skip_broken=False).batch(wanted)
    if pixels is None:
        raise SystemExit("the images of Tiny-ImageNet should all have 64 x 64 pixels")
    return pixels, torch.from_numpy(images.labels[wanted] // 2)


class Run:
    """One pre-training run: model, two optimizers and the number of the next step."""

    def __init__(
        self,
        settings: dict,
        train: tuple[Tensor, Tensor],
        held: tuple[Tensor, Tensor],
        out: Path,
        device: torch.device,
    ) -> None:
        self.settings, self.train, self.held, self.out, self.device = settings, train, held, out, device
        self.seed = settings["seed"]
        torch.manual_seed(self.seed)
        self.model = VisionTransformer(**settings["model"], num_classes=100, dynamic_img_size=True).to(device)
        for block in self.model.blocks:
            block.attn.fused_attn = device.type != "cpu"  # on a CPU, fused attention in bf16 is slow backwards
        named = list(self.model.named_parameters())
        matrices = [p for name, p in named if name.startswith("blocks.") and p.ndim == 2]
        rest = [p for name, p in named if not (name.startswith("blocks.") and p.ndim == 2)]
        decay = settings["weight_decay"]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=settings["lr_matrices"], weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=settings["lr_rest"], weight_decay=decay, betas=(0.9, 0.99)),
        ]
        self.base = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.step, self.seconds = 0, 0.0
        self.plan: list[tuple[dict, int, int]] = []  # stage, epoch within all stages, step within the epoch
        for stage in settings["stages"]:
            for _ in range(stage["epochs"]):
                epoch = self.plan[-1][1] + 1 if self.plan else 0
                self.plan += [(stage, epoch, at) for at in range(len(train[1]) // stage["batch_size"])]
        self._restore()

    def go(self) -> None:
        smooth, began, seen = None, time.perf_counter(), 0
        while self.step < len(self.plan):
            stage, epoch, at = self.plan[self.step]
            images, targets = self.batch(stage, epoch, at)
            loss = self.update(images, targets)
            smooth = loss if smooth is None else 0.98 * smooth + 0.02 * loss
            if not math.isfinite(loss):
                raise SystemExit(f"step {self.step}: the loss is {loss}; lower lr_matrices or lr_rest")
            self.step += 1
            seen += len(images)
            last = self.step == len(self.plan) or self.plan[self.step][1] != epoch
            if self.step % 50 == 0 or last:
                now = time.perf_counter()
                self.seconds += now - began
                print(
                    f"step {self.step}/{len(self.plan)} loss {smooth:.3f} {seen / (now - began):.0f} images/s",
                    flush=True,
                )
                began, seen = now, 0
            if last:
                row = {
                    "epoch": epoch + 1,
                    "size": stage["size"],
                    "loss": round(smooth, 4),
                    "hours": round(self.seconds / 3600, 3),
                }
                if (epoch + 1) % 4 == 0 or self.step == len(self.plan) or stage["size"] == 64:
                    row["top1_even"] = round(self.accuracy(stage["size"]), 4)
                with (self.out / "log.jsonl").open("a") as log:
                    log.write(json.dumps(row) + "\n")
                print(row, flush=True)
                self._save()
                began = time.perf_counter()

    def batch(self, stage: dict, epoch: int, at: int) -> tuple[Tensor, Tensor]:
        """Augmented images (B, 3, size, size) and soft labels (B, 100) of one step."""
        order = torch.randperm(len(self.train[1]), generator=generator_at(self.seed, "order", epoch))
        chosen = order[at * stage["batch_size"] : (at + 1) * stage["batch_size"]]
        draw = generator_at(self.seed, "augment", epoch, at)
        images = augment(self.train[0][chosen], stage["size"], self.settings, draw)
        hot = F.one_hot(self.train[1][chosen], 100).float()
        if torch.rand((), generator=draw) < self.settings["mix"]:
            images, hot = mixed(images, hot, draw)
        smoothing = self.settings["label_smoothing"]
        return images.to(self.device), (hot * (1 - smoothing) + smoothing / 100).to(self.device)

    def update(self, images: Tensor, targets: Tensor) -> float:
        """Take one step; return the loss."""
        progress = self.step / len(self.plan)
        warm = min(1.0, (self.step + 1) / self.settings["warmup_steps"])
        for optimizer, base in zip(self.optimizers, self.base, strict=True):
            optimizer.param_groups[0]["lr"] = base * warm * (1 - progress)
        self.model.train()
        with torch.autocast(self.device.type, torch.bfloat16):
            logits = self.model(images)
        loss = F.cross_entropy(logits.float(), targets)
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    @torch.no_grad()
    def accuracy(self, size: int) -> float:
        """Top-1 on the validation images of the even classes."""
        self.model.eval()
        hits = 0
        for start in range(0, len(self.held[1]), 250):
            images = normalised(self.held[0][start : start + 250].float())
            images = F.interpolate(images, (size, size), mode="bilinear", antialias=True) if size != 64 else images
            with torch.autocast(self.device.type, torch.bfloat16):
                logits = self.model(images.to(self.device)).cpu()
            hits += int((logits.argmax(-1) == self.held[1][start : start + 250]).sum())
        return hits / len(self.held[1])

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        torch.save(state, self.out / "state.pt.draft")
        os.replace(self.out / "state.pt.draft", self.out / "state.pt")

    def _restore(self) -> None:
        if not (self.out / "state.pt").exists():
            return
        state = torch.load(self.out / "state.pt", weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


def normalised(images: Tensor) -> Tensor:
    """(B, 3, h, w) in 0..255 to what the model takes."""
    return (images / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)


def augment(images: Tensor, size: int, settings: dict, draw: torch.Generator) -> Tensor:
    """Crop, flip, colour and erase each image by draws of its own.

    Args:
        images: (B, 3, 64, 64), uint8.
        size: of the result; at half size or less the crop is taken at twice the size and averaged.

    Returns:
        (B, 3, size, size), float32, normalised.
    """
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=draw) * (high - low) + low

    out = cropped(images, size, settings["crop_area"], draw)
    strength = settings["colour"]
    grey = out.mean(1, keepdim=True)
    saturation = torch.where(uniform(0, 1) < settings["grey"], 0.0, uniform(1 - strength, 1 + strength))
    out = grey + (out - grey) * saturation.view(-1, 1, 1, 1)
    middle = out.mean((1, 2, 3), keepdim=True)
    out = middle + (out - middle) * uniform(1 - strength, 1 + strength).view(-1, 1, 1, 1)
    out = (out * uniform(1 - strength, 1 + strength).view(-1, 1, 1, 1)).clamp(0, 1)
    out = normalised(out * 255)
    side = (uniform(0.15, 0.5) * size).long()
    x, y = (uniform(0, 1) * (size - side)).long(), (uniform(0, 1) * (size - side)).long()
    line = torch.arange(size)
    inside_x = (line >= x[:, None]) & (line < (x + side)[:, None])
    inside_y = (line >= y[:, None]) & (line < (y + side)[:, None])
    erased = inside_y[:, :, None] & inside_x[:, None, :] & (uniform(0, 1) < settings["erase"])[:, None, None]
    return out.masked_fill(erased[:, None], 0.0)


def cropped(images: Tensor, size: int, area: float, draw: torch.Generator) -> Tensor:
    """Crop and flip each image by draws of its own.

    Args:
        images: (B, 3, 64, 64), uint8.
        size: of the result; at half size or less the crop is taken at twice the size and averaged.
        area: smallest share of an image that a crop keeps.

    Returns:
        (B, 3, size, size), float32 in [0, 1].
    """
    count = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(count, generator=draw) * (high - low) + low

    scale = uniform(area, 1.0).sqrt()
    ratio = (uniform(-1, 1) * math.log(4 / 3) / 2).exp()
    wide, high = (scale * ratio).clamp(max=1.0), (scale / ratio).clamp(max=1.0)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0], theta[:, 1, 1] = wide * flip, high
    theta[:, 0, 2], theta[:, 1, 2] = uniform(-1, 1) * (1 - wide), uniform(-1, 1) * (1 - high)
    inner = 2 * size if 2 * size <= images.shape[-1] else size
    grid = F.affine_grid(theta, [count, 3, inner, inner], align_corners=False)
    out = F.grid_sample(images.float() / 255, grid, mode="bilinear", padding_mode="reflection", align_corners=False)
    return F.avg_pool2d(out, 2) if inner != size else out


def mixed(images: Tensor, hot: Tensor, draw: torch.Generator) -> tuple[Tensor, Tensor]:
    """Mix each image with its neighbour: by a box (CutMix) or by a weighted mean (mixup)."""
    share = float(torch.rand((), generator=draw)) * 0.5
    other = images.roll(1, 0)
    size = images.shape[-1]
    if torch.rand((), generator=draw) < 0.5:
        side = int(size * math.sqrt(share))
        x, y = (int(torch.randint(0, size - side + 1, (), generator=draw)) for _ in range(2))
        images = images.clone()
        images[:, :, y : y + side, x : x + side] = other[:, :, y : y + side, x : x + side]
        share = side * side / (size * size)
    else:
        images = torch.lerp(images, other, share)
    return images, torch.lerp(hot, hot.roll(1, 0), share)


if __name__ == "__main__":
    main()
