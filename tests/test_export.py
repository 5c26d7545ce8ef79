"""Exported files against ONNX Runtime: C 6, F 24, N 17, M 5; batches of 1, 3 and 7 images of 32 x 32 pixels."""

import builtins
import json
import logging
import re
import sys
import warnings
from functools import cache

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional

import lamina.export
from lamina import __version__
from lamina.backbones.load import load_backbone
from lamina.backbones.timm_vit import TimmTower
from lamina.data.transforms import InputSpec, transform
from lamina.errors import ConfigError, ModelFileError, StorageError
from lamina.export import describe, export_onnx
from lamina.heads.base import Head, Scores
from lamina.model import Batch, PromptedModel
from lamina.registry import method_class
from tests.conftest import make_tiny_vit
from tests.streams import blobs, trainer_of

PIXELS = {"size": 32, "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.25, 0.3)}
TEMPERATURE = 2.5
CHEAP = {"epochs": 1, "batch_size": 9, "length": 5}

#: the first two with three blocks, the others with one, which is much faster; one in bfloat16, one in newer operators
DEEP = ["vpt-nsp2", "lspt"]
METHODS = [*DEEP, "vpt-deep", "linear-probe", "nearest-mean"]
DTYPES, OPSETS = {"vpt-deep": torch.bfloat16}, {"nearest-mean": 20}


def small_tower(dtype=torch.float32):
    """`tiny_vit` with one block."""
    torch.manual_seed(0)
    shape = {"img_size": 32, "patch_size": 8, "embed_dim": 24, "num_heads": 2}
    return TimmTower.create("vit_tiny_patch16_224", depth=1, dtype=dtype, **shape)


def tower_for(name, dtype=torch.float32):
    tower = make_tiny_vit(dtype) if name in DEEP else small_tower(dtype)
    for key, value in tower.named_parameters():
        if key.endswith("bias"):  # they begin at zero, where a lost one would not show
            value.data.normal_(std=0.3)
    return tower


@cache
def learned(name):
    """Return a model that has learned two tasks of three classes."""
    kind = method_class(name)
    settings = kind(**{key: value for key, value in CHEAP.items() if key in kind.model_fields})
    trainer = trainer_of(settings, tower_for(name, DTYPES.get(name, torch.float32)))
    trainer.run(blobs())
    model = trainer.learner.model.eval()
    for block in getattr(model.head, "blocks", ()):
        block.weight.data.mul_(100)  # logits far from zero, so that a lost temperature or column shows
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """Return a function from a method's name to its file, made once."""
    folder = tmp_path_factory.mktemp("exported")

    @cache
    def make(name):
        path = folder / f"{name}.onnx"
        options = {"temperature": TEMPERATURE, "opset": OPSETS.get(name, 18)}
        assert export_onnx(learned(name), path, **PIXELS, **options) is True
        return path

    return make


def run(path, images):
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, map(torch.from_numpy, session.run(None, {"images": images.numpy()})), strict=True))


def in_float32(name):
    """Return a method's model on a tower made in float32, with the very weights it has now."""
    model = learned(name)
    state = model.tower.cpu().state_dict()  # moving it brings back weights that were in oneDNN's layout
    tower = tower_for(name, torch.float32)
    tower.load_state_dict({key: value.float() for key, value in state.items()})
    return PromptedModel(tower, model.prompts, model.head).eval()


@torch.no_grad()
def expected(model, images, pixels=PIXELS, temperature=TEMPERATURE):
    normalised = functional.normalize(images, list(pixels["mean"]), list(pixels["std"]))
    logits = model(Batch(normalised)).logits
    features = model.look(Batch(normalised))[0].features
    return {"probabilities": F.softmax(logits / temperature, -1), "logits": logits, "features": features}


def assert_agree(got, wanted, within=1e-4):
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == torch.float32 and got[name].shape == value.shape
        assert (got[name] - value).abs().max() <= within * value.abs().max().clamp_min(1), name


# ── what the file computes ───────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", METHODS)
def test_onnx_runtime_gives_what_the_model_gives_in_float32_for_any_number_of_images(name, exported):
    path, model = exported(name), in_float32(name)
    for count in (1, 3, 7):
        images = torch.rand(count, 3, 32, 32)
        wanted = expected(model, images)
        assert wanted["logits"].shape == (count, 6) and wanted["features"].shape == (count, 24)
        assert_agree(run(path, images), wanted)


def test_a_prediction_does_not_depend_on_the_other_images_of_its_batch(exported):
    images = torch.rand(7, 3, 32, 32)
    together = run(exported("vpt-nsp2"), images)["logits"]
    alone = torch.cat([run(exported("vpt-nsp2"), image[None])["logits"] for image in images])
    assert torch.allclose(together, alone, rtol=0, atol=1e-4) and not torch.allclose(alone[:-1], alone[1:])


def test_the_graph_says_its_shapes_by_name_and_uses_the_operators_asked_for(exported):
    for name in METHODS:
        model = onnx.load(exported(name))
        assert {opset.domain: opset.version for opset in model.opset_import} == {"": OPSETS.get(name, 18)}
        shapes = {
            value.name: [dim.dim_param or dim.dim_value for dim in value.type.tensor_type.shape.dim]
            for value in (*model.graph.input, *model.graph.output)
        }
        assert shapes == {
            "images": ["batch", 3, 32, 32],
            "probabilities": ["batch", 6],
            "logits": ["batch", 6],
            "features": ["batch", 24],
        }


def test_prompts_are_normalised_when_the_file_is_loaded_and_not_for_every_batch(exported, tmp_path):
    def norms(path):
        return sum("LayerNormalization" in node.op_type for node in onnx.load(path).graph.node)

    options = onnxruntime.SessionOptions()
    options.optimized_model_filepath = str(tmp_path / "loaded.onnx")
    options.log_severity_level = 3
    onnxruntime.InferenceSession(exported("vpt-nsp2"), options, providers=["CPUExecutionProvider"])
    assert norms(exported("vpt-nsp2")) == 2 * 3 + 1 + 3  # two in each block, one after the last, three of prompts
    assert norms(tmp_path / "loaded.onnx") == 2 * 3 + 1


def test_the_file_stands_alone_and_tells_nothing_of_the_machine_that_made_it(exported):
    for name in METHODS:
        model = onnx.load(exported(name), load_external_data=False)
        assert not any(tensor.external_data for tensor in model.graph.initializer)
        content = exported(name).read_bytes()
        assert re.findall(rb"\w+\.py\b|pkg\.\w+|/site-packages", content) == []
        assert [path.name for path in exported(name).parent.glob(f"*{name}*")] == [f"{name}.onnx"]


def test_the_same_model_gives_the_same_bytes_without_a_word_and_without_onnx_runtime(
    exported, tmp_path, monkeypatch, capfd, caplog, recwarn
):
    first = exported("vpt-deep").read_bytes()
    capfd.readouterr(), caplog.clear(), recwarn.clear()
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    path = tmp_path / "new" / "again.onnx"
    assert export_onnx(learned("vpt-deep"), path, **PIXELS, temperature=TEMPERATURE) is False
    assert path.read_bytes() == first
    assert tuple(capfd.readouterr()) == ("", "") and recwarn.list == []
    assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []
    assert logging.getLogger("another").isEnabledFor(logging.ERROR)  # others may speak again
    assert [file.name for file in path.parent.iterdir()] == ["again.onnx"]


# ── the model ────────────────────────────────────────────────────────────────────────────────────────


def test_export_leaves_the_model_as_it_is(exported):
    images = torch.rand(3, 3, 32, 32)
    model = learned("vpt-deep")
    model.train()
    before = {name: value.clone() for name, value in model.learned().items()}
    wants = {name: value.requires_grad for name, value in model.named_parameters()}
    assert not all(wants.values()) and any(wants.values())
    with torch.no_grad():
        logits = model(Batch(images)).logits
        deployed = lamina.export._Deployed(lamina.export._plain_copy(model), InputSpec(**PIXELS), 1.0)
        assert not any(module.training for module in deployed.modules())
        assert not any(parameter.requires_grad for parameter in deployed.parameters())
        deployed.model.tower.model.patch_embed.proj.weight.fill_(0)
        assert torch.equal(model(Batch(images)).logits, logits)
    assert model.head.training and model.tower.dtype == next(model.tower.parameters()).dtype == torch.bfloat16
    assert all(torch.equal(value, before[name]) for name, value in model.learned().items())
    now = {name: value.requires_grad for name, value in model.named_parameters()}
    assert now == {name: wants[name] for name in now}
    model.eval()


class Bare(Head):
    """Three classes by whatever function of the features a plug-in could think of."""

    def __init__(self, score):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(24, 3))
        self.score = score

    def forward(self, features, labels=None):
        return Scores(self.score(features @ self.weight))


def bare(score):
    return PromptedModel(small_tower(), None, Bare(score)).eval()


def depends_on_data(logits):
    warnings.warn("torch.export and its helpers warn of this and that", stacklevel=2)
    return logits if logits.sum() > 0 else -logits


def raises_nothing_to_read(logits):
    raise KeyError


def has_no_word_in_onnx(logits):
    return logits + torch.special.bessel_j0(logits)


@pytest.mark.parametrize(
    ("score", "reason"),
    [
        (depends_on_data, "Could not guard on data-dependent expression"),
        (raises_nothing_to_read, "KeyError;"),
        (has_no_word_in_onnx, "No ONNX function found for <OpOverload(op='prims.bessel_j0'"),
    ],
)
def test_a_model_that_cannot_be_exported_says_why_in_one_line(score, reason, tmp_path, monkeypatch, capfd, recwarn):
    monkeypatch.chdir(tmp_path)  # where torch would leave a report
    length = builtins.len
    with pytest.raises(ConfigError) as error:
        export_onnx(bare(score), tmp_path / "out.onnx", **PIXELS)
    assert str(error.value).startswith(f"the model cannot be exported with opset 18: {reason}")
    assert str(error.value).endswith("; its prompts and head must do what torch.export can trace")
    assert "\n" not in str(error.value) and "\x1b" not in str(error.value)
    assert builtins.len is length
    assert list(tmp_path.iterdir()) == [] and tuple(capfd.readouterr()) == ("", "") and recwarn.list == []


def test_a_model_that_draws_random_numbers_is_refused(tmp_path):
    """A number for each image of however many: `len` must not bake in how many the example had."""
    with pytest.raises(ConfigError) as error:
        export_onnx(bare(lambda logits: logits + torch.randn(logits.shape[0], 1)), tmp_path / "out.onnx", **PIXELS)
    assert str(error.value) == (
        "the model draws random numbers when it predicts (RandomNormalLike), and a file for deployment must give the "
        "same answer every time; export a method whose prompts and head draw none"
    )
    assert list(tmp_path.iterdir()) == []


# ── wrong calls and wrong files ──────────────────────────────────────────────────────────────────────


NEWEST = onnx.defs.onnx_opset_version()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"temperature": 0.0}, "temperature must be finite and above 0; got 0.0"),
        ({"temperature": float("inf")}, "temperature must be finite and above 0; got inf"),
        ({"opset": 17}, f"opset must be from 18 to {NEWEST}, the newest that onnx knows; got 17"),
        ({"opset": NEWEST + 1}, f"opset must be from 18 to {NEWEST}, the newest that onnx knows; got {NEWEST + 1}"),
        ({"size": 0}, "InputSpec.size must be at least 1; got 0"),
        ({"std": (1, 2)}, "InputSpec.mean and std have three numbers, std above 0; got (0.5, 0.4, 0.3) and (1.0, 2.0)"),
        (
            {"size": 40},
            "the model cannot be exported with opset 18: Input height (40) doesn't match model (32); its prompts and "
            "head must do what torch.export can trace",
        ),
    ],
)
def test_a_wrong_number_is_refused_before_anything_is_written(wrong, message, tmp_path):
    with pytest.raises(ConfigError) as error:
        export_onnx(learned("nearest-mean"), tmp_path / "out.onnx", **{**PIXELS, **wrong})
    assert str(error.value) == message
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("package", ["onnx", "onnxscript"])
def test_a_missing_package_is_named_with_the_command_that_gets_it(package, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ConfigError) as error:
        export_onnx(learned("nearest-mean"), tmp_path / "out.onnx", **PIXELS)
    assert str(error.value) == "exporting needs the packages onnx and onnxscript: pip install 'lamina[onnx]'"


def test_a_model_larger_than_one_file_can_be_is_refused(tmp_path, monkeypatch):
    model = learned("vpt-deep")  # its tower is in bfloat16, the file would not be
    numbers = sum(value.numel() for value in in_float32("vpt-deep").state_dict().values())
    size = 4 * numbers + 4 * 6  # three means, three deviations
    monkeypatch.setattr(lamina.export, "LARGEST", size + 2**20 - 1)
    with pytest.raises(ConfigError) as error:
        export_onnx(model, tmp_path / "out.onnx", **PIXELS)
    assert str(error.value) == (
        f"one ONNX file holds at most 0.00 GB; in float32 this model takes {size / 1e9:.2f} GB; use a smaller backbone"
    )
    monkeypatch.setattr(lamina.export, "LARGEST", size + 2**20)
    lamina.export._check_size(lamina.export._Deployed(in_float32("vpt-deep"), InputSpec(**PIXELS), 1.0))


@pytest.fixture
def ready_graph(exported, monkeypatch):
    """Let the next export find its graph done: the one of linear-probe, after `change` was done to it."""

    def prepare(change=lambda graph: None):
        graph = onnx.load(exported("linear-probe"))
        change(graph)
        monkeypatch.setattr(lamina.export, "_graph", lambda *arguments: graph)

    return prepare


def test_a_file_that_gives_other_logits_is_not_written(ready_graph, tmp_path):
    (tmp_path / "out.onnx").write_text("an older file")
    ready_graph()
    with pytest.raises(ModelFileError) as error:
        export_onnx(learned("nearest-mean"), tmp_path / "out.onnx", **PIXELS)
    assert str(error.value).startswith("ONNX Runtime's logits must be within 0.0001 of torch's; they are ")
    assert str(error.value).endswith(" off for a batch of 1; nothing was written")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["an older file"]


def test_a_file_that_onnx_runtime_cannot_load_is_not_written(ready_graph, tmp_path):
    ready_graph(lambda graph: setattr(graph.graph.node[-1], "op_type", "Softmin"))
    with pytest.raises(ModelFileError) as error:
        export_onnx(learned("linear-probe"), tmp_path / "out.onnx", **PIXELS)
    assert str(error.value).startswith(f"ONNX Runtime {onnxruntime.__version__} cannot load the file: ")
    assert "Softmin" in str(error.value) and "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def bias(graph):
    return next(value for value in graph.graph.initializer if value.name == "model.head.blocks.0.bias")


@pytest.mark.parametrize(("off", "passes"), [(0.8, True), (2, False), (float("nan"), False)])
def test_one_wrong_logit_is_enough_and_rounding_is_not(off, passes, ready_graph, tmp_path):
    """`off` in units of what is allowed for one column's smallest logit, which is above 1."""
    model, draws = learned("linear-probe"), torch.Generator().manual_seed(1)
    images = torch.cat([torch.rand(count, 3, 32, 32, generator=draws) for count in (1, 3)])
    smallest, column = expected(model, images)["logits"][:, :3].abs().min(0).values.max(0)
    assert smallest > 1.5

    def change(graph):
        value = bias(graph)
        wrong = np.zeros(3, np.float32)
        wrong[column] = off * 1e-4 * float(smallest)
        value.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(value) + wrong, value.name))

    ready_graph(change)
    if passes:
        assert export_onnx(model, tmp_path / "out.onnx", **PIXELS) is True
    else:
        with pytest.raises(ModelFileError, match="nothing was written"):
            export_onnx(model, tmp_path / "out.onnx", **PIXELS)
    assert (tmp_path / "out.onnx").exists() == passes


def test_a_file_that_cannot_be_written_is_our_error(ready_graph, tmp_path):
    ready_graph()
    (tmp_path / "out").write_text("a file, no folder")
    with pytest.raises(StorageError, match="could not be written"):
        export_onnx(learned("linear-probe"), tmp_path / "out" / "out.onnx", **PIXELS)


# ── model.json ───────────────────────────────────────────────────────────────────────────────────────

SPEC = InputSpec(**PIXELS, interpolation="bilinear", crop_pct=0.875)
CLASSES = ["ant", "bee", "çınar", "dog", "elk", "fox"]


def described(tmp_path, pixels=SPEC, **arguments):
    describe(
        tmp_path / "model.json",
        file="out.onnx",
        classes=CLASSES,
        tasks=[CLASSES[:3], [*CLASSES[3:], "ant"]],
        features=24,
        pixels=pixels,
        **{"model": {"method": "vpt-nsp2"}, **arguments},
    )
    return json.loads((tmp_path / "model.json").read_text())


def test_the_page_holds_what_a_user_needs_to_know(tmp_path):
    page = described(tmp_path, temperature=2.5, thresholds={"energy": {"at": 1.5}}, verified=True)
    assert page["lamina"] == __version__ and page["file"] == "out.onnx" and page["model"] == {"method": "vpt-nsp2"}
    assert page["classes"] == CLASSES and page["tasks"] == [CLASSES[:3], [*CLASSES[3:], "ant"]]
    assert page["temperature"] == 2.5 and page["thresholds"] == {"energy": {"at": 1.5}} and page["verified"] is True
    assert "softmax of logits / 2.5" in page["outputs"][0]["meaning"]
    assert described(tmp_path)["thresholds"] == {} and described(tmp_path)["verified"] is False


def test_names_and_shapes_of_the_page_are_those_of_the_file(exported, tmp_path):
    page = described(tmp_path)
    session = onnxruntime.InferenceSession(exported("vpt-nsp2"), providers=["CPUExecutionProvider"])
    (taken,) = session.get_inputs()
    assert (page["input"]["name"], page["input"]["shape"]) == (taken.name, taken.shape)
    assert taken.type == "tensor(float)" and page["input"]["type"] == "float32"
    given = [(output["name"], output["shape"], output["type"]) for output in page["outputs"]]
    assert given == [(output.name, output.shape, "float32") for output in session.get_outputs()]


def prepared(image, page):
    """Do to an image (3, height, width), uint8, what the page says, from its numbers alone."""
    steps = {step["step"]: step for step in page["preprocessing"]}
    assert list(steps) == ["decode", "resize", "crop", "scale", "normalise"]
    resize, (rows, columns) = steps["resize"], steps["crop"]["size"]
    if list(image.shape[1:]) != resize["skip_if_size"]:
        height, width = image.shape[1:]
        short = resize["shorter_side"]
        size = [short * height // min(height, width), short * width // min(height, width)]
        mode = InterpolationMode(resize["interpolation"])
        image = functional.resize(image, size, interpolation=mode, antialias=resize["antialias"])
        top, left = round((image.shape[1] - rows) / 2), round((image.shape[2] - columns) / 2)
        image = image[:, top : top + rows, left : left + columns]
    pixels = image.float() / steps["scale"]["divide_by"]
    assert steps["normalise"]["inside_the_file"] is True
    return pixels, (steps["normalise"]["mean"], steps["normalise"]["std"])


@pytest.mark.parametrize("pixels", [SPEC, InputSpec(40, (0.1, 0.2, 0.3), (0.4, 0.5, 0.6))])
@pytest.mark.parametrize("shape", [(50, 71), (97, 36), (32, 32), (40, 40), (20, 33)])
def test_its_numbers_prepare_an_image_as_lamina_does(shape, pixels, tmp_path):
    image = (torch.rand(3, *shape) * 256).to(torch.uint8)
    got, (mean, std) = prepared(image, described(tmp_path, pixels))
    plain = transform("plain", pixels)
    assert got.shape == (3, pixels.size, pixels.size)
    assert torch.equal(functional.normalize(got, mean, std)[None], plain.normalised(plain(image)[None]))


def test_its_words_say_the_same_as_its_numbers(tmp_path):
    steps = {step["step"]: step["words"] for step in described(tmp_path)["preprocessing"]}
    assert steps["decode"] == "to 8-bit RGB, turned upright by its EXIF tag, transparent parts on white"
    assert steps["resize"] == (
        "the shorter side to 36 pixels, the longer one in proportion, rounded down; bilinear with antialiasing, values "
        "rounded to bytes; not for a picture of 32 x 32"
    )
    assert steps["crop"] == (
        "the 32 x 32 pixels in the middle; from row round((height - 32) / 2) and column round((width - 32) / 2), "
        "halves to the even number"
    )
    assert steps["normalise"] == (
        "already inside the file, do not do it again: (pixels - mean) / std, channel by channel"
    )


# ── the backbone that ships ──────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
def test_the_small_backbone_in_bfloat16_becomes_a_file_in_float32(tmp_path):
    """After it was used, so that its weights are in oneDNN's layout."""
    models = []
    for dtype in (torch.bfloat16, torch.float32):
        backbone = load_backbone("lamina:vit-nano", dtype=dtype)
        for weight in backbone.tower.parameters():
            weight.data = weight.data.bfloat16().to(dtype)
        torch.manual_seed(3)
        model = method_class("vpt-deep")(length=3).build(backbone.tower).model.eval()
        model.begin_task(blobs().tasks[0])
        with torch.no_grad():
            model(Batch(torch.rand(2, 3, 64, 64)))
        models.append(model)
    pixels = {name: backbone.pixels[name] for name in ("size", "mean", "std")}
    assert export_onnx(models[0], tmp_path / "nano.onnx", **pixels) is True
    for count in (1, 3, 7):
        images = torch.rand(count, 3, 64, 64)
        wanted = expected(models[1], images, pixels, temperature=1.0)
        assert_agree(run(tmp_path / "nano.onnx", images), wanted)
