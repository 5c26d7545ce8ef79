"""Every recipe says what it is, what to type and what came out, and can be run."""

import json
import re
from pathlib import Path

import pytest

from lamina.config import read_toml
from lamina.registry import method_class
from lamina.runs import RECIPES, plan

ROOT = Path(__file__).parents[1]
PATHS = sorted(RECIPES.rglob("*.toml"))
every_recipe = pytest.mark.parametrize("path", PATHS, ids=lambda path: f"{path.parent.name}/{path.stem}")


def head(path):
    """The lines of comment that a recipe opens with, without their marks."""
    lines = path.read_text().splitlines()
    return [line.lstrip("# ").strip() for line in lines[: next(i for i, x in enumerate(lines) if x[:1] != "#")]]


def test_there_are_recipes():
    assert len(PATHS) >= 10


@every_recipe
def test_a_recipe_opens_with_title_command_published_and_own_numbers(path):
    title, command, published, ours, *_ = head(path)
    assert title and not title.startswith("lamina")
    assert command.startswith("lamina run ")
    assert published.startswith("published")
    assert re.fullmatch(r"ours: (not yet run|benchmarks/results/[\w-]+\.json \(\d seeds?\))", ours)


@every_recipe
def test_a_recipe_is_a_run_with_valid_settings_for_the_method_of_its_folder(path):
    run, used = plan(str(path))
    assert run.method == path.parent.name and used == path
    assert read_toml(path)["version"] == 1
    settings = method_class(run.method)(**run.settings)
    assert settings.model_dump().items() >= run.settings.items()


@every_recipe
def test_results_that_a_recipe_names_were_made_with_its_settings(path):
    ours = head(path)[3]
    if ours == "ours: not yet run":
        return
    name = ours.split()[1]
    if not (ROOT / name).exists():
        pytest.skip(f"{name} is not part of this copy")
    run, _ = plan(str(path))
    records = [r for r in json.loads((ROOT / name).read_text())["records"] if is_of(r, run)]
    assert records and all(r["settings"].items() >= run.settings.items() for r in records)
    assert {r["backbone"]["name"] for r in records} == {run.backbone}


def is_of(record, run):
    """Say whether a record is of a method on a stream with nothing changed; a study has variants, too."""
    as_it_is = " --set " not in record["command"] and "online" not in record["protocol"]
    return as_it_is and (record["method"], record["stream"]) == (run.method, run.stream.name)


def test_a_recipe_is_found_by_the_name_under_which_it_is_listed():
    assert plan("vpt-nsp2/cifar100-20")[0] == plan(str(RECIPES / "vpt-nsp2" / "cifar100-20.toml"))[0]


@pytest.mark.parametrize(
    ("name", "temperature", "eta"),
    [("cifar100", 28, 0.97), ("cifar100-20", 25, 0.95), ("imagenet-r", 30, 0.94), ("domainnet", 30, 0.95)],
)
def test_the_papers_settings_are_pinned(name, temperature, eta):
    """Lu et al., table of hyper-parameters: M = 4, Adam, lr 0.01, 100 passes, batch 256 for all four."""
    run, _ = plan(str(RECIPES / "vpt-nsp2" / f"{name}.toml"))
    settings = method_class(run.method)(**run.settings)
    assert (settings.temperature, settings.eta1, settings.eta2, settings.length) == (temperature, eta, eta, 4)
    assert (settings.lr, settings.epochs, settings.batch_size, settings.weight_decay) == (0.01, 100, 256, 5e-5)
    assert run.backbone == "timm:vit_base_patch16_224.augreg_in21k"
