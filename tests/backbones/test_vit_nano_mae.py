"""The backbone that was taught without labels: what its training computes and reads, how it goes on, what ships."""

import importlib
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch.nn import functional as F

from lamina.backbones.load import BUNDLED, load_backbone

PRETRAINING = Path(__file__).parents[2] / "pretraining"
SHIPPED = BUNDLED / "vit-nano-mae.safetensors"
ships = pytest.mark.skipif(not SHIPPED.exists(), reason="vit-nano-mae has not been trained yet")
#: 9 patches of 64 numbers, of which 3 are seen
MODEL = {"img_size": 24, "patch_size": 8, "embed_dim": 40, "depth": 2, "num_heads": 5}
DECODER = {"width": 16, "depth": 1, "heads": 2}
SETTINGS = {
    "seed": 0,
    "epochs": 2,
    "batch_size": 5,
    "lr": 1e-2,
    "weight_decay": 0.05,
    "warmup_share": 0.2,
    "crop_area": 0.3,
    "masked": 2 / 3,
    "model": MODEL,
    "decoder": DECODER,
}


@pytest.fixture
def script(monkeypatch):
    """A script of pretraining/, by its name."""
    monkeypatch.syspath_prepend(PRETRAINING)
    return importlib.import_module


@pytest.fixture
def mae(script):
    return script("vit_nano_mae")


@pytest.fixture
def model(mae):
    torch.manual_seed(1)
    return mae.MaskedAutoEncoder(MODEL, DECODER)


def orders(count=7):
    return torch.rand(count, 9, generator=torch.Generator().manual_seed(4)).argsort(1)


def test_an_encoder_that_sees_all_patches_is_timms(model):
    images = torch.randn(7, 3, 24, 24)
    every = torch.arange(9).expand(7, -1)
    torch.testing.assert_close(
        model.encoded(model.patches(images), every), model.encoder.forward_features(images), rtol=1e-4, atol=1e-5
    )


def test_what_is_hidden_changes_the_loss_by_its_target_alone(model, mae):
    images, order = torch.randn(7, 3, 24, 24), orders()
    patches = model.patches(images)
    said = {}
    hook = model.leave.register_forward_hook(lambda module, given, out: said.update(out=out))
    model(images, order, 3)
    before = said["out"]
    moved = patches.scatter(1, order[:, 3:, None].expand(-1, -1, 192), torch.randn(7, 6, 192))
    other = moved.view(7, 3, 3, 3, 8, 8).permute(0, 3, 1, 4, 2, 5).reshape(7, 3, 24, 24)
    assert torch.equal(model.patches(other), moved)
    loss = model(other, order, 3)
    hook.remove()
    assert torch.equal(said["out"], before)
    target = torch.stack([moved[i, order[i, 3:]] for i in range(7)])
    target = (target - target.mean(-1, keepdim=True)) / (target.var(-1, keepdim=True) + 1e-6).sqrt()
    torch.testing.assert_close(loss, F.mse_loss(before, target))


def test_each_prediction_stands_where_its_patch_does(model):
    """Which order hidden patches come in makes no difference to what is said of each."""
    images, order = torch.randn(7, 3, 24, 24), orders()
    said = []
    model.leave.register_forward_hook(lambda module, given, out: said.append(out))
    turned = torch.cat([order[:, [2, 0, 1]], order[:, 3:].flip(1)], 1)
    losses = [model(images, each, 3) for each in (order, turned)]
    torch.testing.assert_close(said[0], said[1].flip(1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(*losses)
    assert said[0].std(1).min() > 1e-4  # and places do make one


def test_a_hidden_patch_is_a_blank_at_its_own_place(model, mae):
    order, entered = orders(), []
    model.blocks[0].register_forward_pre_hook(lambda block, given: entered.append(given[0]))
    model(torch.randn(7, 3, 24, 24), order, 3)
    places = mae.waves(3, 16)[0, 1:]
    torch.testing.assert_close(entered[0][:, 4:] - model.blank, places[order[:, 3:]])


def test_positions_are_fixed_waves_and_all_else_learns(model, mae):
    model(torch.randn(7, 3, 24, 24), orders(), 3).backward()
    still = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert still == {"encoder.pos_embed"}
    places = mae.waves(3, 40)
    assert torch.equal(model.encoder.pos_embed, places) and not places[0, 0].any()
    assert len(torch.unique(places[0], dim=0)) == 10


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(mae, tmp_path, monkeypatch):
    images = torch.randint(0, 256, (17, 3, 64, 64), dtype=torch.uint8)
    whole = mae.Run(SETTINGS, images, whole_dir := tmp_path / "whole")
    whole_dir.mkdir()
    whole.go()
    assert whole.step == 6
    monkeypatch.setattr(mae, "_BETWEEN", 0.0)
    (tmp_path / "parts").mkdir()
    first = mae.Run(SETTINGS, images, tmp_path / "parts")
    update, left = first.update, iter(range(4))

    def until_it_is_stopped(*batch):
        if next(left, None) is None:
            raise KeyboardInterrupt
        return update(*batch)

    first.update = until_it_is_stopped
    with pytest.raises(KeyboardInterrupt):
        first.go()
    second = mae.Run(SETTINGS, images, tmp_path / "parts")
    assert second.step == 4
    second.go()
    states = [torch.load(tmp_path / name / "state.pt", weights_only=True) for name in ("whole", "parts")]
    assert states[0]["step"] == states[1]["step"] == 6
    for part in ("model", "decoder"):
        assert all(torch.equal(value, states[1][part][name]) for name, value in states[0][part].items())
    rows = [json.loads(line) for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]


def test_the_learning_rate_rises_and_then_falls_like_a_cosine_to_nothing(mae, tmp_path):
    images = torch.randint(0, 256, (25, 3, 64, 64), dtype=torch.uint8)
    run, rates = mae.Run(SETTINGS, images, tmp_path), []
    step = run.optimizer.step
    run.optimizer.step = lambda: rates.append([g["lr"] for g in run.optimizer.param_groups]) or step()
    run.go()
    assert len(rates) == 10 and all(a == b for a, b in rates)
    expected = [5e-3, 1e-2, *(1e-2 * (1 + np.cos(np.pi * k / 8)) / 2 for k in range(8))]
    np.testing.assert_allclose([a for a, _ in rates], expected, rtol=1e-6)


def test_only_matrices_decay(mae, tmp_path):
    run = mae.Run(SETTINGS, torch.zeros(9, 3, 64, 64, dtype=torch.uint8), tmp_path)
    decayed, free = run.optimizer.param_groups
    assert (decayed["weight_decay"], free["weight_decay"], decayed["betas"]) == (0.05, 0.0, (0.9, 0.95))
    assert {p.ndim for p in free["params"]} == {1} and min(p.ndim for p in decayed["params"]) == 2


def test_training_images_of_even_classes_are_all_that_is_read(mae, tmp_path, monkeypatch):
    class Pixels:
        def __init__(self, labels):
            self.labels, self.wanted = labels, None

        def opened(self, wanted, skip_broken):
            self.wanted = wanted.tolist()
            return self

        def batch(self, indices):
            return torch.zeros(len(indices), 3, 64, 64, dtype=torch.uint8)

    class Source:
        train = Pixels(np.array([0, 1, 2, 3, 4, 5, 1, 0]))

        @property
        def test(self):
            raise AssertionError("validation images were read")

    seen = {}
    monkeypatch.setattr(mae.sources, "tiny_imagenet", lambda path: Source())
    monkeypatch.setattr(mae.Run, "__init__", lambda run, settings, images, out: seen.update(images=images))
    monkeypatch.setattr(mae.Run, "go", lambda run: None)
    monkeypatch.setattr(sys, "argv", ["vit_nano_mae.py", "--data", str(tmp_path), "--out", str(tmp_path / "out")])
    mae.main()
    assert Source.train.wanted == [0, 2, 4, 7] and len(seen["images"]) == 4


def test_what_a_run_leaves_is_exported_as_it_is_loaded(mae, script, tmp_path, monkeypatch):
    shelf, run = tmp_path / "shelf", tmp_path / "run"
    shelf.mkdir(), run.mkdir()
    mae.Run(SETTINGS, torch.randint(0, 256, (9, 3, 64, 64), dtype=torch.uint8), run).go()
    export = script("export")
    settings = "[model]\n" + "".join(f"{name} = {value}\n" for name, value in MODEL.items())
    (tmp_path / "vit_nano_mae.toml").write_text(settings)
    for name, place in (("HERE", tmp_path), ("BUNDLED", shelf)):
        monkeypatch.setattr(export, name, place)
    monkeypatch.setattr("lamina.backbones.load.BUNDLED", shelf)
    monkeypatch.setattr(sys, "argv", ["export.py", "vit-nano-mae", "--run", str(run)])
    export.main()
    assert (tmp_path / "vit_nano_mae.log.jsonl").read_text() == (run / "log.jsonl").read_text()
    found = load_backbone("lamina:vit-nano-mae")
    trained = torch.load(run / "state.pt", weights_only=True)["model"]
    held = found.tower.model.state_dict()
    assert found.pixels["size"] == 24 and found.pixels["mean"] == (0.5, 0.5, 0.5)
    assert all(torch.equal(held[name], value.half().float()) for name, value in trained.items() if name in held)
    assert set(held) <= set(trained)


# ── what ships ─────────────────────────────────────────────────────────────────────────────────────


@ships
def test_what_ships_is_small_in_half_precision_and_has_a_card():
    assert SHIPPED.stat().st_size <= 12_000_000
    with safe_open(SHIPPED, framework="pt") as file:
        names = list(file.keys())
        assert {file.get_tensor(name).dtype for name in names} == {torch.float16}
        assert not any(name.startswith(("head", "decoder", "blank")) for name in names)
    card = SHIPPED.with_suffix(".md").read_text().splitlines()
    assert card[0] == "# vit-nano-mae" and len(card[2]) > 20


@ships
def test_what_ships_has_the_shape_of_vit_nano_and_other_weights():
    own, like = (load_backbone(f"lamina:{name}") for name in ("vit-nano-mae", "vit-nano"))
    assert own.pixels == like.pixels and own.fingerprint != like.fingerprint
    shapes = [{n: v.shape for n, v in each.tower.model.state_dict().items()} for each in (own, like)]
    assert shapes[0] == shapes[1]
    assert all(value.isfinite().all() for value in own.tower.model.state_dict().values())


@ships
def test_what_ships_tells_hidden_patches_apart_by_their_places(script):
    """Trained positions are the fixed waves, so another size of image can have its own."""
    positions = load_backbone("lamina:vit-nano-mae").tower.model.pos_embed
    torch.testing.assert_close(positions, script("vit_nano_mae").waves(8, 192), rtol=1e-3, atol=1e-3)
