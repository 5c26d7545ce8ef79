"""What a kept model costs and is worth: `learn`, `predict`, calibration, novelty.

    python benchmarks/model_file.py speed            judging decoded images against the bare backbone; size of files
    python benchmarks/model_file.py learn            seconds of `lamina learn` on 5 classes x 100 photographs
    python benchmarks/model_file.py readme           run the commands of README.md's example and put in what they print
    python benchmarks/model_file.py quality          lessons of ten classes of tiny-odd-10: accuracy, calibration,
                                                     novelty, and the drift estimate against what really moved

Each part replaces its own entry in benchmarks/results/model-file.json. Speed is a ratio of medians in one
process, interleaved; seconds are what a user waits for, so run `learn` on a machine that does nothing else.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc, multiclass_calibration_error

from lamina.confidence import SCORES
from lamina.continual import ContinualModel
from lamina.data.material import Material
from lamina.data.stream import Split, Stream, Task
from lamina.data.streams import StreamSettings, build_stream
from lamina.heads.moments import ClassStatistics
from lamina.machine import commit, hardware, versions
from lamina.model import Batch
from lamina.seeds import seed_at

RESULTS = Path(__file__).parent / "results" / "model-file.json"
README = Path(__file__).parents[1] / "README.md"
LAMINA = [sys.executable, "-c", "from lamina.cli import main; main()"]

#: the example of README.md; what the last one prints is cut to its overview
EXAMPLE = (
    "lamina sample digits digits",
    'lamina learn digits.lamina digits/1 --name "week 1"',
    'lamina learn digits.lamina digits/2 --name "week 2"',
    "lamina predict digits.lamina digits/test/six/003*.png digits/test/nine/002*.png --flag-novel --novelty energy",
    "lamina evaluate digits.lamina digits/test",
)


class OneSource:
    """The images of one task of a stream, with labels that count through its classes."""

    def __init__(self, split: Split, columns: list[int]) -> None:
        self.images, self.fingerprint = split.images, f"{split.images.fingerprint}-{columns}"
        self.labels = np.full(len(split.images), -1, np.int64)
        self.labels[split.indices] = split.columns - min(columns)
        self.batch = getattr(split.images, "batch", None)

    def __len__(self) -> int:
        return len(self.labels)

    def image(self, index: int) -> Tensor:
        return self.images.image(index)


def material(task: Task, share: float = 0.1) -> Material:
    """Hold out a tenth of each class of a task's training images, drawn by class."""
    held = np.zeros(len(task.train), bool)
    for column in task.columns:
        own = np.flatnonzero(task.train.columns == column)
        held[np.random.default_rng(column).choice(own, max(1, round(share * len(own))), replace=False)] = True
    source = OneSource(task.train, list(task.columns))
    return Material(source, list(task.classes), task.train.indices[~held], task.train.indices[held])


def median_of(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Return the median seconds of each call, taken in turn."""
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds + 1):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            if turn:  # the first one warms up
                taken[name].append(time.perf_counter() - began)
    return {name: statistics.median(values) for name, values in taken.items()}


def speed(rounds: int) -> dict[str, Any]:
    """Time judging 256 decoded images against the bare backbone's forward of the same batches and precision."""
    model = ContinualModel("vpt-nsp2", settings={"epochs": 1})
    stream = build_stream(StreamSettings(name="digits", tasks=1, per_class=20))
    model.learn(material(stream.tasks[0]))
    pixels = torch.randint(0, 256, (256, 3, 64, 64), dtype=torch.uint8)
    tower = model.backbone.tower
    bare: Any = tower.model
    ready = model.plain.normalised(pixels)
    vendor = VisionTransformer(num_classes=0, img_size=64, patch_size=8, embed_dim=192, depth=12, num_heads=3)
    vendor = vendor.to(bare.cls_token.dtype).eval()

    @torch.inference_mode()
    def in_batches(call: Callable[[Tensor], object], images: Tensor) -> None:
        for part in images.split(64):
            call(part)

    taken = median_of(
        {
            "judge": lambda: in_batches(model.judge, pixels),
            "tower": lambda: in_batches(lambda part: tower(part).features, ready),
            "timm": lambda: in_batches(lambda part: vendor(part.to(bare.cls_token.dtype)), ready),
        },
        rounds,
    )
    return {
        "images_per_second": {name: round(256 / seconds, 1) for name, seconds in taken.items()},
        "judge_over_timm": round(taken["timm"] / taken["judge"], 3),
        "judge_over_own_tower": round(taken["tower"] / taken["judge"], 3),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
        "file_bytes": {"vit-nano, 10 classes": size_of(model), "vit-b16, 100 classes": size_of(big())},
    }


def big() -> ContinualModel:
    """Return vpt-nsp2 on an untrained ViT-B/16 with 100 classes, after two lessons of random images."""
    random = np.random.default_rng(0)

    class Noise:
        labels, fingerprint = np.repeat(np.arange(50), 2), "noise"

        def __len__(self) -> int:
            return len(self.labels)

        def image(self, index: int) -> Tensor:
            return torch.from_numpy(random.integers(0, 256, (3, 224, 224), dtype=np.uint8))

    model = ContinualModel("vpt-nsp2", "timm:vit_base_patch16_224@random", settings={"epochs": 1})
    for start in (0, 50):
        names = [f"class {start + i}" for i in range(50)]
        model.learn(Material(Noise(), names, np.arange(0, 100, 2), np.arange(1, 100, 2)))
    return model


def size_of(model: ContinualModel) -> int:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.lamina"
        model.file().write(path)
        return path.stat().st_size


def learn(data: Path | None) -> dict[str, Any]:
    """Run `lamina learn` twice on 5 classes x 100 photographs, as files, and `lamina predict` on 250."""
    stream = build_stream(StreamSettings(name="tiny-odd-10-full", tasks=20, per_class=100), data)
    seconds: dict[str, list[float]] = {"learn": [], "predict": []}
    told = []
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        for number in range(2):
            task = stream.tasks[number]
            for role, split in (("train", task.train), ("test", task.test)):
                for place, index in enumerate(split.indices):
                    name = task.classes[split.columns[place] - min(task.columns)].replace("/", "_")
                    path = root / role / str(number) / name / f"{place:04}.png"
                    path.parent.mkdir(parents=True, exist_ok=True)
                    Image.fromarray(split.images.image(int(index)).permute(1, 2, 0).numpy()).save(path)
            for what, words in (
                ("learn", ["learn", "m.lamina", f"train/{number}", "--json"]),
                ("predict", ["predict", "m.lamina", f"test/{number}", "--format", "jsonl"]),
            ):
                began = time.perf_counter()
                subprocess.run([*LAMINA, *words], cwd=root, capture_output=True, text=True, check=True)
                seconds[what].append(round(time.perf_counter() - began, 1))
            told.append(
                json.loads(
                    subprocess.run(
                        [*LAMINA, "inspect", "m.lamina", "--json"], cwd=root, capture_output=True, text=True, check=True
                    ).stdout
                )["lessons"][-1]["seconds"]
            )
    return {"seconds": seconds, "of_which": told, "threads": torch.get_num_threads()}


def readme() -> dict[str, Any]:
    """Run the commands of the example in an empty folder; README.md gets what they print."""
    lines = []
    with tempfile.TemporaryDirectory() as folder:
        for command in EXAMPLE:
            words = [*LAMINA, *shlex.split(command)[1:]]
            done = subprocess.run(words, cwd=folder, capture_output=True, text=True, check=True)
            shown, cut, _ = done.stdout.partition("by task")
            shown = [*shown.rstrip().splitlines(), *(["..."] if cut else [])]
            lines += [f"$ {command}", *shown, ""]
    before, _, rest = README.read_text().partition("<!-- example -->\n")
    after = rest.partition("<!-- /example -->")[2]
    block = "\n".join(lines).rstrip()
    README.write_text(f"{before}<!-- example -->\n```\n{block}\n```\n<!-- /example -->{after}")
    return {"commands": list(EXAMPLE)}


def quality(data: Path | None, method: str, lessons: int) -> dict[str, Any]:
    """Let a model take lessons of ten classes of tiny-odd-10; the classes of the tasks left over are new to it."""
    stream: Stream = build_stream(StreamSettings(name="tiny-odd-10"), data)
    model = ContinualModel(method)
    rows = []
    for number, task in enumerate(stream.tasks[:lessons]):
        old = [features(model, past.test) for past in stream.tasks[:number]]
        lesson = model.learn(material(task))
        now = [features(model, past.test) for past in stream.tasks[: number + 1]]
        row: dict[str, Any] = {"held_out_accuracy": lesson.accuracy, **judged(model, stream.tasks[: number + 1])}
        if old:
            before, after = torch.cat(old).double(), torch.cat(now[:-1]).double()
            spread = model_spread(before)
            moved = float((after - before).square().sum(1).mean().sqrt()) / spread
            assert lesson.drift is not None
            row["drift"] = {"measured_on_old_test_images": moved} | {
                name: getattr(lesson.drift, name) for name in ("old", "bound", "new")
            }
        rows.append(row)
        print(method, number + 1, json.dumps(row), flush=True)
    unknown = [says(model, task.test) for task in stream.tasks[lessons:]]
    known = [says(model, task.test) for task in stream.tasks[:lessons]]
    out: dict[str, Any] = {"lessons": rows, "classes_known": len(model.classes)}
    for score in SCORES:
        values = [torch.cat([said[1][score] for said in some]) for some in (known, unknown)]
        new = torch.cat([torch.zeros(len(values[0])), torch.ones(len(values[1]))]).long()
        out[score] = {
            "auroc": float(binary_auroc(torch.cat(values), new)),
            "flagged_known": float((values[0] > 1).float().mean()),
            "flagged_unknown": float((values[1] > 1).float().mean()),
        }
    return out


def model_spread(rows: Tensor) -> float:
    statistics_ = ClassStatistics(rows.shape[1])
    statistics_.grow(1)
    statistics_.collect(rows, torch.zeros(len(rows), dtype=torch.int64))
    statistics_.end_look(lambda total: total)
    return statistics_.spread()


def pixels_of(model: ContinualModel, split: Split) -> list[Tensor]:
    return list(torch.stack([model.plain(split.images.image(int(i))) for i in split.indices]).split(100))


@torch.inference_mode()
def features(model: ContinualModel, split: Split) -> Tensor:
    """Return the features (n, F) of a split under the model as it is now."""
    model.model.eval()
    parts = pixels_of(model, split)
    return torch.cat([model.model.features(Batch(model.plain.normalised(part)))[0] for part in parts]).clone()


def says(model: ContinualModel, split: Split) -> tuple[Tensor, dict[str, Tensor]]:
    said = [model.judge(part) for part in pixels_of(model, split)]
    return torch.cat([s.probabilities for s in said]), {n: torch.cat([s.novelty[n] for s in said]) for n in SCORES}


def judged(model: ContinualModel, tasks: list[Task]) -> dict[str, float]:
    probabilities = torch.cat([says(model, task.test)[0] for task in tasks])
    labels = torch.from_numpy(np.concatenate([task.test.columns for task in tasks]))
    ece = multiclass_calibration_error(probabilities, labels, num_classes=probabilities.shape[1], n_bins=15)
    accuracy = float((probabilities.argmax(1) == labels).float().mean())
    return {"accuracy": accuracy, "ece": float(ece), "temperature": model.confidence.temperature}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=["speed", "learn", "readme", "quality"])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--method", default="vpt-nsp2")
    parser.add_argument("--lessons", type=int, default=5)
    parser.add_argument("--data", type=Path)
    given = parser.parse_args()
    torch.manual_seed(seed_at(0, "benchmark"))
    name = given.part if given.part != "quality" else f"quality {given.method}"
    found = {
        "speed": lambda: speed(given.rounds),
        "learn": lambda: learn(given.data),
        "readme": readme,
        "quality": lambda: quality(given.data, given.method, given.lessons),
    }[given.part]()
    found |= {"commit": commit(), "hardware": hardware(torch.device("cpu")), "versions": versions()}
    kept = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    RESULTS.write_text(json.dumps({**kept, name: found}, indent=2) + "\n")
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
