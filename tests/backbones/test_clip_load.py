"""Names of open_clip models: published tags, local files, folders, untrained; what is refused, and before what."""

import json
import logging
import socket
import urllib.request

import open_clip
import pytest
import torch
from safetensors.torch import save_file

from lamina.backbones.clip import ClipImageTower, TextSide
from lamina.backbones.clip_text import TextTower
from lamina.backbones.load import load_backbone
from lamina.errors import ConfigError, UnsupportedBackbone
from tests.backbones.clips import TEXT, VISION, clip, close, ids, images

CONFIG = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
KNOWN = {"mean": (0.1, 0.2, 0.3), "std": (0.4, 0.5, 0.6), "interpolation": "bilinear", "resize_mode": "shortest"}


@pytest.fixture(autouse=True)
def known(tmp_path, monkeypatch):
    """No network, and tiny models with published weights, which lie in files."""

    def refuse(*arguments, **more):
        raise OSError("no network in this test")

    for place in ("connect", "connect_ex"):
        monkeypatch.setattr(socket.socket, place, refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    monkeypatch.setattr(urllib.request, "urlopen", refuse)
    models = {
        "tiny": CONFIG,
        "tiny-quickgelu": {**CONFIG, "quick_gelu": True},
        "tiny-custom": {**CONFIG, "custom_text": True},
        "wide": {**CONFIG, "vision_cfg": {**VISION, "image_size": [32, 40]}},
        "few": {**CONFIG, "text_cfg": {**TEXT, "vocab_size": 50}},
        "timm": {**CONFIG, "vision_cfg": {"timm_model_name": "vit_tiny_patch16_224"}},
        "foreign-words": {**CONFIG, "text_cfg": {**TEXT, "hf_tokenizer_name": "bert-base-uncased"}},
        "foreign-text": {**CONFIG, "text_cfg": {"hf_model_name": "roberta-base"}},
        "writer": {**CONFIG, "multimodal_cfg": {}},
        "odd": {**CONFIG, "vision_cfg": {**VISION, "colour": 1}},
        "averaged": {**CONFIG, "vision_cfg": {**VISION, "pool_type": "avg"}},
    }
    gelu, quick = ({**KNOWN, "quick_gelu": q, "file": str(tmp_path / f"{q}.safetensors")} for q in (False, True))
    far = {**KNOWN, "quick_gelu": False, "url": "https://example.invalid/far.pt"}
    tags = {
        "tiny": {"good_one": gelu, "good_two": gelu, "quick": quick, "far": far},
        "tiny-quickgelu": {"quick": quick},
    }
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", models)
    monkeypatch.setattr(open_clip.pretrained, "_PRETRAINED", tags)
    monkeypatch.setenv("HOME", str(tmp_path))
    for kind, q in (("plain", False), ("quick", True)):
        save_file(clip(kind).state_dict(), tmp_path / f"{q}.safetensors")


def refused(name, kind=ConfigError):
    with pytest.raises(kind) as error:
        load_backbone(name)
    return str(error.value)


def is_the_model(backbone, kind="plain"):
    close(backbone.tower(images()).features, clip(kind).encode_image(images()))
    close(backbone.tower.text.tower(ids()).features, clip(kind).encode_text(ids()))
    assert backbone.tower.text.logit_scale == pytest.approx(clip(kind).logit_scale.exp().item())


# ── what can be loaded ─────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("model, tag, kind", [("tiny", "good_one", "plain"), ("tiny-quickgelu", "QUICK", "quick")])
def test_a_tag_gives_both_towers_and_the_pixels_that_they_were_trained_on(model, tag, kind):
    backbone = load_backbone(f"open_clip:{model}:{tag}")
    is_the_model(backbone, kind)
    assert isinstance(backbone.tower, ClipImageTower) and isinstance(backbone.tower.text, TextSide)
    assert isinstance(backbone.tower.text.tower, TextTower) and backbone.tower.text.logit_bias is None
    assert backbone.name == f"open_clip:{model}:{tag}"
    assert backbone.pixels == {
        "size": 32,
        "mean": (0.1, 0.2, 0.3),
        "std": (0.4, 0.5, 0.6),
        "interpolation": "bilinear",
        "crop_pct": 1.0,
    }
    assert torch.equal(backbone.tower.text.tokenizer(["a photo of a cat.", "x"]), ids("a photo of a cat.", "x"))


@pytest.mark.parametrize("file", ["weights.safetensors", "weights.pt", "a:b@c.bin"])
def test_a_local_file_gives_the_model(tmp_path, file):
    path = tmp_path / file
    save = save_file if path.suffix == ".safetensors" else torch.save
    save(clip().state_dict(), path)
    backbone = load_backbone(f"open_clip:tiny:{path}")
    is_the_model(backbone)
    assert backbone.pixels["mean"] == open_clip.OPENAI_DATASET_MEAN and backbone.pixels["interpolation"] == "bicubic"
    half = load_backbone(f"open_clip:tiny:{path}", dtype=torch.bfloat16)
    assert half.tower.dtype == half.tower.text.tower.dtype == torch.bfloat16
    assert half.tower.fingerprint == backbone.tower.fingerprint
    assert half.tower.text.tower.fingerprint == backbone.tower.text.tower.fingerprint


def test_a_model_with_a_text_module_of_its_own_is_built_as_one(tmp_path):
    save_file(clip("custom text").state_dict(), tmp_path / "weights.safetensors")
    is_the_model(load_backbone(f"open_clip:tiny-custom:{tmp_path / 'weights.safetensors'}"), "custom text")


def folder(path, config=None, weights="open_clip_model.safetensors", **more):
    path.mkdir(exist_ok=True)
    (path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config or CONFIG, **more}))
    if weights:
        (save_file if weights.endswith("safetensors") else torch.save)(clip().state_dict(), path / weights)
    return f"open_clip:local-dir:{path}"


@pytest.mark.parametrize("weights", ["open_clip_model.safetensors", "open_clip_pytorch_model.bin"])
def test_a_folder_gives_the_model(tmp_path, weights):
    name = folder(tmp_path / "f", weights=weights, preprocess_cfg={"mean": [0.5, 0.6, 0.7]})
    backbone = load_backbone(name)
    is_the_model(backbone)
    assert backbone.pixels["mean"] == (0.5, 0.6, 0.7) and backbone.pixels["std"] == open_clip.OPENAI_DATASET_STD


def test_of_several_files_in_a_folder_the_safe_one_is_read(tmp_path):
    name = folder(tmp_path / "f")
    (tmp_path / "f" / "open_clip_pytorch_model.bin").write_bytes(b"junk")
    is_the_model(load_backbone(name))


def test_an_untrained_model_is_the_same_every_time_and_draws_nothing():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first = load_backbone("open_clip:tiny@random")
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(6)
    again = load_backbone("open_clip:tiny@random")
    assert (
        first.tower.fingerprint == again.tower.fingerprint != load_backbone("open_clip:tiny:good_one").tower.fingerprint
    )
    assert first.tower.text.logit_scale == pytest.approx(1 / 0.07)


def test_a_bias_of_logits_is_told():
    open_clip.factory._MODEL_CONFIGS["tiny"] = {**CONFIG, "init_logit_bias": -10.0}
    assert load_backbone("open_clip:tiny@random").tower.text.logit_bias == -10.0


def test_other_backbones_have_no_text_side():
    assert load_backbone("lamina:vit-nano").tower.text is None


def test_nothing_is_said_and_loggers_stay_as_they_were(capfd, recwarn):
    handlers = list(logging.getLogger().handlers)
    load_backbone("open_clip:tiny:good_one")
    assert tuple(capfd.readouterr()) == ("", "") and logging.getLogger().handlers == handlers
    assert [str(w.message) for w in recwarn.list] == []


# ── activations ────────────────────────────────────────────────────────────────────────────────────


def test_weights_and_a_model_with_another_activation_are_refused_with_the_right_name():
    assert refused("open_clip:tiny:quick") == (
        "the weights 'quick' were trained with QuickGELU and tiny computes GELU, which spoils them; take "
        "open_clip:tiny-quickgelu:quick"
    )
    assert refused("open_clip:tiny-quickgelu:good_one") == (
        "the weights 'good_one' were trained with GELU and tiny-quickgelu computes QuickGELU, which spoils them; take "
        "open_clip:tiny:good_one"
    )


def test_the_published_names_are_judged_without_loading_anything(monkeypatch):
    monkeypatch.undo()
    monkeypatch.setattr(open_clip, "download_pretrained", lambda cfg: pytest.fail("fetched"))
    assert refused("open_clip:ViT-B/16:openai") == (
        "the weights 'openai' were trained with QuickGELU and ViT-B-16 computes GELU, which spoils them; take "
        "open_clip:ViT-B-16-quickgelu:openai"
    )
    assert refused("open_clip:ViT-B-16-quickgelu:laion2b_s34b_b88k").endswith("open_clip:ViT-B-16:laion2b_s34b_b88k")


# ── names and files ────────────────────────────────────────────────────────────────────────────────


def test_unknown_names_say_the_nearest():
    assert refused("open_clip:tiny@random:good_one") == "no open_clip model is called 'tiny@random'."
    assert refused("open_clip:tinny@random") == "no open_clip model is called 'tinny'; did you mean 'tiny'?"
    assert refused("open_clip:tiny:good_ones") == (
        "no weight tag of tiny is called 'good_ones'; did you mean 'good_one'? Known: far, good_one, good_two, quick"
    )
    assert refused("open_clip:tiny:no/such.pt") == "open_clip:tiny:no/such.pt: there is no file 'no/such.pt'"


@pytest.mark.parametrize("name", ["open_clip:tiny", "open_clip:tiny:", "open_clip:tiny@rand"])
def test_a_name_without_weights_says_which_there_are(name):
    assert refused(name) == (
        f"{name} does not say which weights; add :PATH of a local file, @random, or :TAG, one of these: good_one, "
        "good_two, quick, far"
    )


def test_an_empty_name_is_unknown():
    assert refused("open_clip:") == (
        "no backbone is called 'open_clip:'. Known: lamina:clip-nano, lamina:vit-nano, lamina:vit-nano-mae; or "
        "timm:NAME, or open_clip:MODEL:TAG, see `lamina list backbones`"
    )


def test_weights_that_cannot_be_fetched_say_what_to_do():
    assert refused("open_clip:tiny:far") == (
        "the weights of open_clip:tiny:far cannot be fetched (no network in this test); without a network, give a "
        "local file: open_clip:MODEL:PATH"
    )


class Code:
    def __reduce__(self):
        return open, (Code.path, "w")


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("kind", ["pickle", "archive"])
def test_a_file_that_could_run_code_is_refused_and_runs_none(tmp_path, kind):
    path, Code.path = tmp_path / "weights.pt", str(tmp_path / "ran")
    if kind == "pickle":
        torch.save({"state_dict": Code()}, path)
    else:
        torch.jit.script(torch.nn.Linear(2, 3)).save(path)
    assert refused(f"open_clip:tiny:{path}") == (
        f"{path} holds more than weights, and loading it could run code; lamina does not. If you trust it, convert it "
        "once: safetensors.torch.save_file(open_clip.factory.load_state_dict(PATH, weights_only=False), "
        "'weights.safetensors')"
    )
    assert not (tmp_path / "ran").exists()


def test_the_advice_for_such_a_file_works(tmp_path):
    torch.save(clip(), tmp_path / "whole.pt")
    name = f"open_clip:tiny:{tmp_path / 'whole.pt'}"
    assert "holds more than weights" in refused(name)
    torch.save({"state_dict": clip().state_dict(), "epoch": torch.nn.Module()}, tmp_path / "trained.pt")
    assert "holds more than weights" in refused(f"open_clip:tiny:{tmp_path / 'trained.pt'}")
    state = open_clip.factory.load_state_dict(str(tmp_path / "trained.pt"), weights_only=False)
    save_file(state, tmp_path / "weights.safetensors")
    is_the_model(load_backbone(f"open_clip:tiny:{tmp_path / 'weights.safetensors'}"))


@pytest.mark.parametrize(
    "content, said",
    [
        (b"", "EOFError"),
        (b"hello", "101"),
        ([1, 2], "'list' object has no attribute 'items'"),
        ({}, "StopIteration"),
        ({"a": torch.zeros(2)}, 'Error(s) in loading state_dict for CLIP: Missing key(s) in state_dict: "positional_'),
    ],
)
def test_a_file_without_these_weights_is_refused_in_one_line(tmp_path, content, said):
    path = tmp_path / "weights.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    got = refused(f"open_clip:tiny:{path}")
    assert got.startswith(f"the weights of open_clip:tiny:{path} cannot be loaded from {path} ({said}")
    assert "\n" not in got and len(got) < 500


def test_a_folder_that_is_not_one_is_refused(tmp_path):
    place, facts = tmp_path / "f", tmp_path / "f" / "open_clip_config.json"
    name = f"open_clip:local-dir:{place}"
    said = f"{name}: {facts} must be there and hold a model_cfg with embed_dim, vision_cfg and text_cfg"
    assert refused(name) == said
    place.mkdir()
    for content in ["", "[]", '{"model_cfg": 3}', json.dumps({"model_cfg": {"embed_dim": 2}}), '"x"']:
        facts.write_text(content)
        assert refused(name) == said
    folder(place, weights=None)
    assert refused(name).startswith(f"{name}: no weights in {place}; one of these must be there: open_clip_model.safe")


# ── models that lamina cannot prompt, refused before anything is built or fetched ──────────────────


@pytest.mark.parametrize(
    "model, reason",
    [
        ("timm", "its image tower is timm's vit_tiny_patch16_224"),
        ("foreign-text", "its text tower is Hugging Face's roberta-base"),
        ("foreign-words", "its texts need the tokenizer bert-base-uncased of Hugging Face"),
        ("writer", "it writes texts, too (CoCa)"),
    ],
)
def test_foreign_towers_and_tokenizers_are_refused(model, reason):
    assert refused(f"open_clip:{model}@random", UnsupportedBackbone) == (
        f"open_clip:{model}@random: {reason}; lamina takes open_clip's own transformers with open_clip's own "
        "tokenizer. Image towers of timm can be had as timm:NAME"
    )


def test_a_tower_that_cannot_be_prompted_is_refused_before_its_weights_are_fetched():
    open_clip.pretrained._PRETRAINED["averaged"] = {"far": {"url": "https://example.invalid/far.pt"}}
    assert "pools by 'avg'" in refused("open_clip:averaged:far", UnsupportedBackbone)


def test_what_does_not_fit_together_is_refused():
    assert refused("open_clip:few@random") == ("open_clip:few@random knows 50 words, fewer than its tokenizer's 49408")
    assert refused("open_clip:wide@random", UnsupportedBackbone) == (
        "open_clip:wide@random takes pictures of 32 x 40; lamina shows square ones alone"
    )
    assert refused("open_clip:odd@random").startswith(
        "open_clip:odd@random: open_clip cannot build what the configuration says ("
    )
