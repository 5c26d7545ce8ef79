"""A backbone of ours with a text side: how its file is read, how it is written, what ships, and how it was taught."""

import importlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from open_clip.transformer import TextTransformer
from safetensors import safe_open
from safetensors.torch import save_file
from torch.nn import functional as F

from lamina.backbones import load
from lamina.backbones.clip import TextSide
from lamina.backbones.load import BUNDLED, load_backbone
from tests.backbones.clips import TEXT, clip, close, ids
from tests.backbones.conftest import TINY, tiny

PRETRAINING = Path(__file__).parents[2] / "pretraining"
PIXELS = {
    "input_size": [3, 16, 16],
    "mean": [0.1, 0.2, 0.3],
    "std": [0.4, 0.5, 0.6],
    "interpolation": "bilinear",
    "crop_pct": 1.0,
}
SHIPPED = BUNDLED / "clip-nano.safetensors"
ships = pytest.mark.skipif(not SHIPPED.exists(), reason="clip-nano has not been trained yet")


def words(seed=3):
    """A text transformer and what its file holds: a table of whole numbers, the rest in half precision."""
    draw = torch.Generator().manual_seed(seed)
    model = clip("custom text").text
    rows = torch.randint(-127, 128, (49408, 40), generator=draw, dtype=torch.int8)
    factors = 0.01 * torch.rand(49408, 1, generator=draw) + 0.001
    held = {name: value.half() for name, value in model.state_dict().items()}
    whole = {name: value.float() for name, value in held.items()}
    model.load_state_dict({**whole, "token_embedding.weight": rows.float() * factors.float()})
    return model, {**held, "token_embedding.weight": rows, "token_embedding.scale": factors}


def write(folder, name, weights, **facts):
    said = {key: json.dumps(value) for key, value in facts.items()}
    save_file({key: value.contiguous() for key, value in weights.items()}, folder / f"{name}.safetensors", said)


@pytest.fixture
def shelf(tmp_path, monkeypatch):
    """A folder of backbones of ours: eye, which sees, and eye-mouth, which has a text side, too."""
    monkeypatch.setattr(load, "BUNDLED", tmp_path)
    architecture = {name: value for name, value in TINY.items() if name != "num_classes"}
    write(tmp_path, "eye", tiny().half().state_dict(), architecture=architecture, pixels=PIXELS)
    write(tmp_path, "eye-mouth", words()[1], text=TEXT, images="eye", logit_scale=17.5)
    return tmp_path


@pytest.fixture
def script(monkeypatch):
    """A script of pretraining/, by its name."""
    monkeypatch.syspath_prepend(PRETRAINING)
    return importlib.import_module


# ── how a file is read ─────────────────────────────────────────────────────────────────────────────


def test_texts_are_read_as_open_clip_reads_them(shelf):
    text = load_backbone("lamina:eye-mouth").tower.text
    assert isinstance(text, TextSide) and (text.logit_scale, text.logit_bias) == (17.5, None)
    close(text.tower(ids()).features, words()[0](ids()))


def test_the_table_of_whole_numbers_is_the_table_of_floats(shelf):
    table = load_backbone("lamina:eye-mouth").tower.text.tower.table.weight
    assert table.dtype == torch.float32 and torch.equal(table, words()[0].token_embedding.weight)


def test_ids_are_those_of_the_standard_tokenizer(shelf):
    tokenizer = load_backbone("lamina:eye-mouth").tower.text.tokenizer
    got = tokenizer(["a photo of a x.", "x " * 90])
    assert got.shape == (2, 77) and got.dtype == torch.int64
    assert got[0].tolist() == [49406, 320, 1125, 539, 320, 343, 269, 49407] + [0] * 69
    assert got[1].tolist() == [49406] + [343] * 75 + [49407]


def test_images_are_seen_as_by_the_backbone_that_the_file_names(shelf):
    images = torch.randn(7, 3, 16, 16)
    both, eye = (load_backbone(f"lamina:{name}") for name in ("eye-mouth", "eye"))
    assert torch.equal(both.tower(images).features, eye.tower(images).features)
    assert both.pixels == eye.pixels and both.pixels["mean"] == (0.1, 0.2, 0.3)
    assert both.name == "lamina:eye-mouth" and eye.tower.text is None
    assert both.tower.fingerprint == eye.tower.fingerprint


def test_other_words_change_the_fingerprint_of_the_text_side_alone(shelf):
    before = load_backbone("lamina:eye-mouth").tower
    write(shelf, "eye-mouth", words(seed=4)[1], text=TEXT, images="eye", logit_scale=17.5)
    after = load_backbone("lamina:eye-mouth").tower
    assert before.fingerprint == after.fingerprint
    assert before.text.tower.fingerprint != after.text.tower.fingerprint


def test_both_towers_come_in_the_dtype_asked_for(shelf):
    tower = load_backbone("lamina:eye-mouth", dtype=torch.bfloat16).tower
    assert tower.dtype == tower.text.tower.dtype == torch.bfloat16


def test_loading_draws_nothing(shelf):
    before = torch.get_rng_state()
    load_backbone("lamina:eye-mouth")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("name", ["positional_embedding", "ln_final.bias"])
def test_a_file_without_all_weights_is_not_taken(shelf, name):
    weights = words()[1]
    del weights[name]
    write(shelf, "eye-mouth", weights, text=TEXT, images="eye", logit_scale=17.5)
    with pytest.raises(RuntimeError, match=f'Missing key.*"{name}"'):
        load_backbone("lamina:eye-mouth")


def test_an_image_backbone_loads_without_open_clip():
    code = (
        "import sys\nfrom lamina.backbones.load import load_backbone\nload_backbone('lamina:vit-nano')\n"
        "sys.exit('open_clip' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


# ── how a file is written ──────────────────────────────────────────────────────────────────────────


def test_eight_bits_keep_every_value_within_half_a_step_of_its_row(script):
    table = torch.randn(11, 13) * torch.logspace(-6, 2, 11)[:, None]
    table[4] = 0
    rows, factors = script("export").in_eight_bits(table)
    assert (rows.dtype, factors.dtype, factors.shape) == (torch.int8, torch.float32, (11, 1))
    assert ((rows.float() * factors - table).abs() <= 0.501 * factors).all()
    assert rows.int().abs().amax(1).tolist() == [127] * 4 + [0] + [127] * 6


def test_what_a_run_leaves_is_exported_as_it_is_loaded(script, shelf, tmp_path, monkeypatch):
    run, here = tmp_path / "run", tmp_path / "here"
    run.mkdir(), here.mkdir()
    model = words()[0]
    torch.save({**model.state_dict(), "logit_scale": torch.tensor(17.504)}, run / "aligned.pt")
    (run / "log.jsonl").write_text("{}\n")
    (here / "clip_nano.toml").write_text("[text]\n" + "".join(f"{key} = {value}\n" for key, value in TEXT.items()))
    export = script("export")
    for name, place in (("HERE", here), ("BUNDLED", shelf)):
        monkeypatch.setattr(export, name, place)
    monkeypatch.setattr(sys, "argv", ["export.py", "clip-nano", "--run", str(run)])
    write(shelf, "vit-nano", tiny().half().state_dict(), architecture={**TINY, "num_classes": 0}, pixels=PIXELS)
    export.main()
    assert (here / "clip_nano.log.jsonl").read_text() == "{}\n"
    with safe_open(shelf / "clip-nano.safetensors", framework="pt") as file:
        facts, held = file.metadata(), set(file.keys())
    assert {key: json.loads(value) for key, value in facts.items()} == {
        "text": TEXT,
        "images": "vit-nano",
        "logit_scale": 17.5,
    }
    assert held == {*model.state_dict(), "token_embedding.scale"}
    assert (shelf / "clip-nano.safetensors").stat().st_size < 49408 * 45 + 100_000


# ── how it was taught ──────────────────────────────────────────────────────────────────────────────


def test_features_are_open_clips_before_its_projection(script):
    model = TextTransformer(width=40, heads=5, layers=2, output_dim=None)
    close(script("clip_nano_texts").features(model, ids()), model(ids()))


def test_meanings_are_the_teachers_word_and_the_mean_of_relatives(script):
    clip_nano = script("clip_nano_texts")
    synsets = [["a", "b"], ["c"], ["d", "a"], ["e"], ["f"]]
    told = torch.randn(6, 8)
    unit = F.normalize(told - told.mean(0), dim=1)
    own = torch.stack([(unit[0] + unit[1]) / 2, unit[2], (unit[3] + unit[0]) / 2, unit[4], unit[5]])
    around = torch.stack([own[[j for j in range(5) if j != i and abs(i - j) <= 2]].mean(0) for i in range(5)])
    phrases = torch.stack([(around[0] + around[2]) / 2, around[0], around[1], around[2], around[3], around[4]])
    expected = unit + 0.3 * F.normalize(phrases - phrases.mean(0), dim=1)
    got = clip_nano.meanings(synsets, list("abcdef"), told, relatives=2, share=0.3)
    close(got, F.normalize(expected, dim=1), 1e-6)


def test_a_group_without_rows_has_mean_zero(script):
    rows, groups = torch.arange(6.0).view(3, 2), torch.tensor([2, 0, 2])
    assert script("clip_nano_texts").averaged(rows, groups, 4).tolist() == [[2, 3], [0, 0], [2, 3], [0, 0]]


def test_names_of_odd_classes_are_never_read(script, tmp_path):
    rows = ["label\twnid\tnames", "2\tn3\tcab, taxi", "1\tn2\tdrum", "0\tn1\tant", "3\tn4\tbow"]
    (tmp_path / "classes.tsv").write_text("\n".join(rows) + "\n")
    assert script("clip_nano_texts").even_names(tmp_path / "classes.tsv") == [["ant"], ["cab", "taxi"]]


def test_nouns_come_in_the_order_of_their_ids(script, tmp_path):
    (tmp_path / "nouns.tsv").write_text("n2\tcab, taxi\nn1\tant\n")
    assert script("clip_nano_texts").nouns(tmp_path / "nouns.tsv") == [["ant"], ["cab", "taxi"]]


# ── what ships ─────────────────────────────────────────────────────────────────────────────────────


@ships
def test_what_ships_is_small_and_has_a_card():
    assert SHIPPED.stat().st_size <= 20_000_000
    with safe_open(SHIPPED, framework="pt") as file:
        assert not any("visual" in name for name in file.keys())  # noqa: SIM118 - not a mapping
    card = SHIPPED.with_suffix(".md").read_text().splitlines()
    assert card[0] == "# clip-nano" and len(card[2]) > 20


@ships
def test_what_ships_sees_as_vit_nano_and_knows_what_words_mean():
    both, eye = (load_backbone(f"lamina:{name}") for name in ("clip-nano", "vit-nano"))
    assert both.tower.fingerprint == eye.tower.fingerprint and both.pixels == eye.pixels
    text = both.tower.text
    assert text.tower.features == both.tower.features == 192 and text.tower.length == 77
    assert 1 < text.logit_scale <= 100
    said = ["a photo of a dog.", "puppy", "a photo of a bridge.", "viaduct", "a photo of the lemon.", "an orange"]
    told = F.normalize(text.tower(text.tokenizer(said)).features, dim=1)
    nearest = (told @ told.T).fill_diagonal_(-1).argmax(1)
    assert nearest.tolist() == [1, 0, 3, 2, 5, 4]
