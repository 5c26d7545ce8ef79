"""Maps of what a model looks at: B 2, N 16 to 18 of which 3 x 5 are patches, M 4, D 24, H 2, L 3, C 7."""

import io
import json
import math
import re
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from lamina.audit import Lesson
from lamina.backbones.splice import Splice
from lamina.backbones.timm_vit import TimmTower
from lamina.backbones.tower import Grid
from lamina.confidence import Confidence, Known
from lamina.continual import ContinualModel
from lamina.data.streams import build_stream
from lamina.errors import DataError, ModelFileError, ResumeError, ShapeError
from lamina.explain.drawing import CELL, GAP, MARGIN, colours, grid, png, size_of, stretched, strip
from lamina.explain.maps import cosines, look, whose_attention
from lamina.explain.opened import open_model
from lamina.explain.page import page, write
from lamina.explain.seen import MOST, explain
from lamina.heads.linear import LinearHead
from lamina.heads.moments import ClassStatistics
from lamina.model import Batch, PromptedModel
from lamina.modelfile import ModelFile
from lamina.predictions import predict
from lamina.prompts.base import PromptModule, Scripted
from lamina.prompts.deep import DeepPrompts
from lamina.prompts.pool import PromptPool
from lamina.prompts.prefix import ExpertPrefixes
from lamina.results.records import Record
from lamina.runs import execute, plan, resumable
from tests.backbones.clips import images as clip_images, tiny_clip
from tests.backbones.conftest import tiny
from tests.commands import BACKBONE, pictures

H, W, M = 3, 5, 4
SIDES = {"img_size": (8 * H, 8 * W), "patch_size": 8}
#: name -> changes of the tiny tower, and how many rows stand before its patches
KINDS = {
    "class token": ({}, 1),
    "registers": ({"reg_tokens": 2}, 3),
    "mean of patches": ({"class_token": False, "global_pool": "avg"}, 0),
    "class token and mean of patches": ({"global_pool": "avg"}, 1),
}
every_kind = pytest.mark.parametrize("kind", KINDS)


def tower_of(kind="class token", dtype=torch.float32):
    return TimmTower(tiny(**SIDES, **KINDS[kind][0]), dtype=dtype)


def photos(count=2):
    return torch.randn(count, 3, 8 * H, 8 * W, generator=torch.Generator().manual_seed(1))


def with_prompts(tower, prompts):
    """A model that knows seven classes; prompts are as if they had been learned."""
    model = PromptedModel(tower, prompts, LinearHead(tower.features))
    model.head.begin_task(0, list("abcdefg"), range(7))
    return model.eval()


def deep(tower, layers=range(3), **more):
    return with_prompts(tower, DeepPrompts(layers, M, tower.width, **more))


class Travelling(PromptModule):
    """Tokens that enter block 1 and travel on; block 2 also gets a context of two tokens behind its first norm."""

    def __init__(self, width):
        super().__init__()
        self.entering, self.context = torch.randn(1, M, width), torch.randn(2, width)

    def start(self, query=None, task=None):
        def at(layer, tokens, carried):
            if layer == 1:
                return Splice(tokens=self.entering.expand(len(tokens), -1, -1))
            return Splice(context=self.context, context_normed=True) if layer == 2 else None

        return Scripted(at)


def probes(model, images):
    """What the blocks show of themselves, and the features that come out."""
    found = []
    model.requires_grad_(False)
    with torch.no_grad():
        features, _ = model.features(Batch(images), tap=found.append)
    return found, features


# ── the grid ─────────────────────────────────────────────────────────────────────────────────────────


@every_kind
def test_a_patch_stands_where_the_grid_says(kind):
    tower, images = tower_of(kind), photos(1)
    found = tower.grid(images)
    assert found == (KINDS[kind][1], H, W)
    changed = images.clone()
    changed[..., 8:16, 24:32] += 1  # the patch in row 1, column 3
    moved = (tower.embed(changed)[0] - tower.embed(images)[0]).abs().amax(-1)[0]
    assert moved.nonzero().flatten().tolist() == [found.before + 1 * W + 3]
    assert tower.embed(images)[0].shape[1] == found.before + H * W


def test_a_patch_of_clip_stands_where_the_grid_says():
    tower, images = tiny_clip(), clip_images()[:1]
    changed = images.clone()
    changed[..., 16:24, 8:16] += 1
    moved = (tower.embed(changed)[0] - tower.embed(images)[0]).abs().amax(-1)[0]
    assert tower.grid(images) == (1, 4, 4) and moved.nonzero().flatten().tolist() == [1 + 2 * 4 + 1]


def test_a_sequence_that_is_no_grid_of_patches_is_refused(monkeypatch):
    model = deep(tower_of())
    monkeypatch.setattr(model.tower, "grid", lambda images: Grid(1, H, W + 1))
    with pytest.raises(ShapeError, match=r"3 x 6 patches behind 1 rows are a sequence of 19; got 16"):
        look(model, photos(1))


# ── cosines ──────────────────────────────────────────────────────────────────────────────────────────


@every_kind
def test_maps_have_one_value_for_each_block_and_patch_and_cosines_are_cosines(kind):
    maps, _ = look(deep(tower_of(kind)), photos(1))
    assert maps.attention.shape == maps.cosine.shape == (3, H, W) and maps.on_prompts.shape == (3,)
    assert [own.shape for own in maps.each] == 3 * [(M, H, W)] and maps.tokens == 3 * [M]
    assert maps.cosine.abs().max() <= 1 and all(own.abs().max() <= 1 for own in maps.each)
    assert {maps.attention.dtype, maps.on_prompts.dtype, maps.cosine.dtype} == {torch.float32}
    assert maps.prefixes == maps.behind_norm == [0, 0, 0]


def test_rounding_takes_no_cosine_out_of_its_range():
    rows = torch.randn(500, 24)
    found = cosines(rows, torch.cat([rows, -rows]))
    assert found.max() == 1 and found.min() == -1 and found.dtype == torch.float64


@every_kind
def test_cosines_are_those_of_what_enters_a_block_token_by_token(kind):
    model, images = deep(tower_of(kind)), photos(1)
    maps, _ = look(model, images)
    before = KINDS[kind][1]
    for layer, probe in enumerate(probes(model, images)[0]):
        for token in range(M):
            for place in range(H * W):
                prompt, patch = model.prompts.value(layer)[token], probe.inputs[0, before + place]
                expected = float(prompt @ patch / (prompt.norm() * patch.norm()))
                got = float(maps.each[layer][token, place // W, place % W])
                assert got == pytest.approx(expected, abs=1e-5), (layer, token, place)
        mean = sum(maps.each[layer][token] for token in range(M)) / M
        torch.testing.assert_close(maps.cosine[layer], mean, atol=1e-6, rtol=0)


@pytest.mark.parametrize("kind", [*KINDS, "clip"])
def test_a_prompt_that_copies_a_patch_has_its_maximum_there(kind):
    tower = tiny_clip() if kind == "clip" else tower_of(kind)
    model, images = deep(tower), clip_images()[:1] if kind == "clip" else photos(1)
    place, found = 7, tower.grid(images)
    for layer in range(3):
        entering = probes(model, images)[0][layer].inputs[0]
        model.prompts.value(layer).data[2] = 3 * entering[found.before + place]
        own = look(model, images)[0].each[layer][2]
        assert int(own.flatten().argmax()) == place and own.flatten()[place] == pytest.approx(1, abs=1e-6)


def test_tokens_that_travel_are_compared_as_they_enter_each_block():
    model, images = with_prompts(tower_of(), Travelling(24)), photos(1)
    maps, _ = look(model, images)
    assert maps.tokens == [0, M, M + 2] and maps.behind_norm == [0, 0, 2]
    assert maps.cosine[0].isnan().all() and maps.cosine[1:].isfinite().all()
    shown, block = probes(model, images)[0], model.tower.blocks()[2]
    patches = shown[2].inputs[0, 1:]
    assert not torch.allclose(shown[2].entering[0, :M], shown[1].entering[0])
    travelled = F.cosine_similarity(shown[2].entering[0, :M, None], patches, dim=-1)
    behind = F.cosine_similarity(model.prompts.context[:, None], block.norm(patches), dim=-1)
    expected = torch.cat([travelled, behind]).view(M + 2, H, W)
    torch.testing.assert_close(maps.each[2], expected, atol=1e-5, rtol=1e-4)


def test_behind_the_norm_prompts_and_patches_are_both_normed():
    model, images = deep(tower_of()), photos(1)
    maps, _ = look(model, images, post_norm=True)
    for layer, probe in enumerate(probes(model, images)[0]):
        norm = model.tower.blocks()[layer].norm
        expected = F.cosine_similarity(norm(model.prompts.value(layer))[:, None], norm(probe.inputs[0, 1:]), dim=-1)
        torch.testing.assert_close(maps.each[layer], expected.view(M, H, W), atol=1e-5, rtol=1e-4)
    assert (maps.cosine - look(model, images)[0].cosine).abs().max() > 1e-3
    torch.testing.assert_close(maps.attention, look(model, images)[0].attention)


@pytest.mark.parametrize("post_norm", [False, True])
def test_prompts_that_enter_behind_the_norm_are_compared_there_whatever_is_asked(post_norm):
    model, images = deep(tower_of()), photos(1)
    other = deep(model.tower, normed=True)
    for layer in range(3):
        other.prompts.value(layer).data = model.tower.blocks()[layer].norm(model.prompts.value(layer)).detach()
    plain, normed = look(model, images, post_norm=True)[0], look(other, images, post_norm=post_norm)[0]
    torch.testing.assert_close(normed.cosine, plain.cosine, atol=1e-5, rtol=1e-4)
    assert normed.behind_norm == [M, M, M]


def test_prefixes_have_no_token_to_compare_and_get_weight_all_the_same():
    tower = tower_of()
    prompts = ExpertPrefixes((1,), (2,), 5, 6, tower.width, tower.features)
    prompts.begin_task(0)
    maps, _ = look(with_prompts(tower, prompts), photos(1))
    assert maps.tokens == [0, 0, 0] and maps.prefixes == [0, 5, 6] and maps.cosine.isnan().all()
    assert maps.on_prompts[0] == 0 and (maps.on_prompts[1:] > 0).all()


# ── attention ────────────────────────────────────────────────────────────────────────────────────────


@every_kind
def test_attention_is_the_softmax_written_out(kind):
    """Of the rows that features are read from, over all keys; averaged over heads; patches are cut out of it."""
    model, images = deep(tower_of(kind)), photos(1)
    maps, _ = look(model, images)
    before, read = KINDS[kind][1], slice(0, 1) if "mean" not in kind else slice(KINDS[kind][1], None)
    for layer, probe in enumerate(probes(model, images)[0]):
        block = model.tower.blocks()[layer]
        keys, _ = block.keys_values(block.norm(model.prompts.value(layer))[None])
        keys = torch.cat([probe.keys, keys], dim=2).double()[0]
        logits = probe.queries[0].double() @ keys.mT / math.sqrt(12)
        weights = logits.exp() / logits.exp().sum(-1, keepdim=True)  # (H, N, N + M)
        row = weights.mean(0)[read].mean(0)
        assert float((weights.sum(-1) - 1).abs().max()) < 1e-6
        torch.testing.assert_close(
            maps.attention[layer].flatten().double(), row[before : before + H * W], atol=1e-6, rtol=0
        )
        assert float(maps.on_prompts[layer]) == pytest.approx(float(row[-M:].sum()), abs=1e-6)
        left = float(row[:before].sum())
        assert float(maps.attention[layer].sum() + maps.on_prompts[layer]) + left == pytest.approx(1, abs=1e-6)


@every_kind
def test_rows_of_weights_sum_to_one_and_give_the_features_of_the_fused_kernel(kind):
    model, images = deep(tower_of(kind)), photos()
    found, tapped = probes(model, images)
    assert all(float((probe.attention.double().sum(-1) - 1).abs().max()) < 1e-6 for probe in found)
    with torch.inference_mode():
        fused, _ = model.features(Batch(images))
    torch.testing.assert_close(tapped, fused, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(look(model, images[:1])[1], fused[:1], atol=1e-5, rtol=1e-4)


def test_it_is_said_whose_attention_is_shown():
    assert whose_attention(deep(tower_of())) == "the class token"
    assert whose_attention(deep(tower_of("mean of patches"))) == "the patches, averaged"


def test_without_prompts_there_is_attention_alone():
    maps, _ = look(with_prompts(tower_of(), None), photos(1))
    assert maps.tokens == [0, 0, 0] and maps.on_prompts.eq(0).all() and maps.cosine.isnan().all()
    assert maps.attention.sum((1, 2)).le(1).all() and maps.attention.gt(0).all()


def test_a_pool_is_asked_without_a_look_at_its_query():
    tower = tower_of()
    model = with_prompts(tower, PromptPool(6, 2, M, tower.width, tower.features, readout="backbone"))
    maps, _ = look(model, photos(1))
    assert maps.tokens == [2 * M, 2 * M, 2 * M] and len(maps.each) == 3


def test_a_look_leaves_nothing_behind_on_the_tower():
    model = deep(tower_of())
    before = look(model, photos(1))[0]
    assert not model.tower._forward_pre_hooks
    torch.testing.assert_close(look(model, photos(1))[0].cosine, before.cosine, atol=0, rtol=0)


def test_a_tower_in_bfloat16_gives_maps_in_float32_near_those_in_float32():
    model, half = deep(tower_of()), deep(tower_of(dtype=torch.bfloat16))
    half.prompts.load_state_dict(model.prompts.state_dict())
    fine, coarse = look(model, photos(1))[0], look(half, photos(1))[0]
    assert coarse.attention.dtype == torch.float32
    torch.testing.assert_close(coarse.cosine, fine.cosine, atol=0.02, rtol=0)
    torch.testing.assert_close(coarse.attention, fine.attention, atol=0.02, rtol=0)


# ── runs and model files ─────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def shop(tmp_path_factory):
    """Seven classes, six pictures of each to learn from and five others to test on."""
    root, names = tmp_path_factory.mktemp("shop"), ["yak", "zebra", "ant", "bee", "emu", "fox", "newt"]
    pictures(root / "train", names, count=6)
    pictures(root / "test", names, count=5, seed=9)
    return root


def learn(shop, folder, method, **settings):
    fixed = {"backbone": BACKBONE, "precision": "32", "normalization": "unit"}
    overrides = {**fixed, "stream": {"tasks": [3, 4]}, "settings": settings}
    execute(plan(method, f"folder:{shop}", overrides=overrides)[0], folder)
    return folder


@pytest.fixture(scope="module")
def run(shop, tmp_path_factory):
    """vpt-deep, four prompts in each of six blocks."""
    return learn(shop, tmp_path_factory.mktemp("runs") / "deep", "vpt-deep", length=M, epochs=2, batch_size=6)


@pytest.fixture(scope="module")
def pool(shop, tmp_path_factory):
    """L2P whose images vote: what it says of one depends on its batch."""
    small = {"epochs": 1, "batch_size": 6, "size": 5, "top": 2, "length": 3, "selection": "batch"}
    return learn(shop, tmp_path_factory.mktemp("runs") / "pool", "l2p", **small)


def some(shop, *names):
    return [str(sorted((shop / "test" / name).glob("*.png"))[0]) for name in names]


@pytest.mark.parametrize(
    ("method", "settings"), [("joint", {"epochs": 1}), ("ranpac", {"width": 40}), ("nearest-mean", {})]
)
def test_a_run_that_is_opened_classifies_as_it_did_when_it_was_tested(method, settings, shop, tmp_path):
    check_accuracy(learn(shop, tmp_path / "run", method, **settings))


def test_a_run_with_prompts_that_is_opened_classifies_as_it_did_when_it_was_tested(run):
    check_accuracy(run)


def check_accuracy(folder):
    opened, record = open_model(folder), Record.read(folder / "results.json")
    stream = build_stream(resumable(folder).stream, None, max_side=opened.plain.spec.max_side)
    for task, expected in zip(stream, record.matrix[-1], strict=True):
        pixels = torch.stack([opened.plain(task.test.images.image(int(index))) for index in task.test.indices])
        with torch.inference_mode():
            logits = opened.model(Batch(opened.plain.normalised(pixels))).logits
        named = [opened.classes[column] for column in logits.argmax(-1).tolist()]
        true = [dict(zip(task.columns, task.classes, strict=True))[column] for column in task.test.columns.tolist()]
        assert np.mean([a == b for a, b in zip(named, true, strict=True)]) == pytest.approx(expected)
    assert opened.classes == list(dict.fromkeys(name for names in record.classes for name in names))


def test_maps_of_an_image_do_not_depend_on_the_others(run, pool, shop):
    yak, emu, fox = some(shop, "yak", "emu", "fox")
    for opened in map(open_model, (run, pool)):
        alone, together = explain(opened, [emu]).images[0], explain(opened, [yak, emu, fox]).images[1]
        assert (alone.path, alone.name, alone.probability) == (together.path, together.name, together.probability)
        assert torch.equal(alone.maps.attention, together.maps.attention)
        assert all(torch.equal(a, b) for a, b in zip(alone.maps.each, together.maps.each, strict=True))


def test_a_vote_is_told(pool, shop):
    found = explain(open_model(pool), some(shop, "yak"))
    assert "The classifier reads what became of the prompts, not the class token." in found.notes
    assert "The model lets the images of a batch decide together; here each was alone in its batch." in found.notes


def as_file(run, path):
    """Write what a run has learned into a model file, as if it had been learned in lessons."""
    record, learned = Record.read(run / "results.json"), load_file(run / "learned.safetensors")
    columns = {name: place for place, name in enumerate(name for names in record.classes for name in names)}
    lessons = tuple(
        Lesson(
            name=None,
            date="2026-01-01T00:00:00Z",
            method=record.method,
            classes=names,
            columns=[columns[name] for name in names],
            images=1,
            held_out=0,
            skipped=0,
            seconds=None,
            accuracy=None,
            drift=None,
            data="x",
            base=None,
        )
        for names in record.classes
    )
    opened = open_model(run)
    statistics = ClassStatistics(opened.model.width)
    statistics.grow(len(columns))
    ModelFile(
        method=record.method,
        settings=record.settings,
        backbone=record.backbone,
        precision="float32",
        seed=0,
        run={},
        confidence=Confidence(tasks=[Known(images=9, temperature=3.0)]).model_dump(),
        lessons=lessons,
        learned=learned,
        memory=[statistics.state_dict()],
    ).write(path)
    return path


def test_a_model_file_shows_what_the_run_that_it_came_from_shows(run, shop, tmp_path):
    here, there = open_model(run), open_model(as_file(run, tmp_path / "deep.lamina"))
    here = replace(here, plain=there.plain)  # the run had pixels of its own; a kept model has the backbone's
    a, b = (explain(opened, some(shop, "bee", "newt")) for opened in (here, there))
    for name, array in a.arrays().items():
        if name != "probability":  # a run and a kept model have their own temperatures
            np.testing.assert_array_equal(array, b.arrays()[name], err_msg=name)
    assert (b.facts["model"], a.facts["model"]) == ("deep.lamina", "deep")
    assert {**a.facts, "model": ""} == {**b.facts, "model": ""}


def test_a_kept_models_class_and_probability_are_those_of_predict(run, shop, tmp_path):
    path, images = as_file(run, tmp_path / "deep.lamina"), some(shop, "bee", "newt", "fox")
    said = list(predict(ContinualModel.load(path), images))
    for seen, prediction in zip(explain(open_model(path), images).images, said, strict=True):
        assert seen.name == prediction.top[0][0]
        assert seen.probability == pytest.approx(prediction.top[0][1], abs=1e-5)


def test_a_runs_probabilities_are_those_of_its_loss(run, shop):
    opened = open_model(run)
    assert opened.temperature == 28 and opened.precision == "float32"
    assert opened.plain.spec.mean == (0, 0, 0) and opened.plain.spec.std == (1, 1, 1)
    seen = explain(opened, some(shop, "bee")).images[0]
    with torch.inference_mode():
        logits = opened.model(Batch(opened.plain.normalised(seen.pixels[None]))).logits
    assert seen.probability == pytest.approx(float((logits / 28).softmax(-1).max()), abs=1e-6)


# ── what is left behind ──────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def found(run, shop):
    return explain(open_model(run), some(shop, "yak", "emu"))


def test_arrays_come_back_as_they_were_written(found):
    arrays = found.arrays()
    back = np.load(io.BytesIO(found.npz()), allow_pickle=False)
    assert list(back) == list(arrays)
    for name, array in arrays.items():
        np.testing.assert_array_equal(back[name], array)
        assert back[name].dtype == array.dtype
    maps = found.images[1].maps
    height, width = maps.attention.shape[1:]
    assert back["attention"].shape == back["cosine"].shape == (2, 6, height, width)
    assert back["on_prompts"].shape == (2, 6) and back["cosine_5"].shape == (2, M, height, width)
    for name in ("attention", "on_prompts", "cosine"):
        np.testing.assert_array_equal(back[name][1], getattr(maps, name).numpy())
    np.testing.assert_array_equal(back["cosine_3"][1], maps.each[3].numpy())
    assert back["path"].tolist() == [seen.path for seen in found.images]
    assert found.npz() == found.npz()


def test_the_picture_has_a_strip_for_each_image_and_room_for_every_block(found):
    assert size_of(6, 2) == (2 * MARGIN + 7 * CELL + 6 * GAP, 2 * MARGIN + 16 + 2 * (CELL + 32))
    assert size_of(6, 1) == (size_of(6, 2)[0], 2 * MARGIN + 16 + (CELL + 32) + 16)
    strips = [strip(found, seen) for seen in found.images]
    assert [each.size for each in strips] == 2 * [size_of(6, 2)]
    whole = Image.open(io.BytesIO(png(grid(strips))))
    assert whole.size == (size_of(6, 2)[0], 2 * size_of(6, 2)[1]) and whole.mode == "RGB"
    assert np.array_equal(np.asarray(whole)[size_of(6, 2)[1] :], np.asarray(strips[1]))


def cells(sheet):
    """The cells of a strip, (rows, 7) arrays: the image, then blocks."""
    pixels = np.asarray(sheet).astype(int)
    lefts = [MARGIN + place * (CELL + GAP) for place in range(7)]
    tops = range(MARGIN + 32, pixels.shape[0] - CELL, CELL + 32)
    return [[pixels[top : top + CELL, left : left + CELL] for left in lefts] for top in tops]


def test_the_image_is_at_the_left_and_blocks_follow_from_left_to_right(found):
    seen = found.images[0]
    shape = seen.maps.attention.shape
    values = torch.zeros(shape)
    for block in range(6):  # a bright spot that moves on with the block
        values[block].view(-1)[block] = 1 + block
    pixels = torch.full_like(seen.pixels, 90)
    pixels[0] = 200
    drawn = strip(found, replace(seen, pixels=pixels, maps=replace(seen.maps, attention=values)))
    _, attention = cells(drawn)
    assert (cells(drawn)[0][0] == [200, 90, 90]).all()
    for block in range(6):
        light = attention[block + 1].sum(-1)
        row, column = np.unravel_index(light.argmax(), light.shape)
        place = (row * shape[1] // CELL, column * shape[2] // CELL)
        assert place == divmod(block, shape[2])
    peaks = {attention[block + 1].sum(-1).max() for block in range(6)}
    assert max(peaks) - min(peaks) < 60  # each map is stretched by itself, whatever its values


def test_a_block_without_tokens_has_a_plain_cell(found):
    seen = found.images[0]
    cosine = seen.maps.cosine.clone()
    cosine[2] = torch.nan
    first, _ = cells(strip(found, replace(seen, maps=replace(seen.maps, cosine=cosine))))
    flat = [len(np.unique(cell.reshape(-1, 3), axis=0)) == 1 for cell in first]
    assert flat == [False, False, False, True, False, False, False]


def test_maps_without_cosines_are_one_row(shop, tmp_path):
    found = explain(open_model(learn(shop, tmp_path / "run", "nearest-mean")), some(shop, "yak"))
    assert not found.compared and found.notes == ["No prompt enters a block: there is attention alone."]
    assert strip(found, found.images[0]).size == size_of(6, 1)
    assert not any(name.startswith("cosine_") for name in found.arrays())


def test_stretching_keeps_order_and_a_flat_map_is_dark():
    values = np.array([[-0.5, 0.25], [1.5, 0.0]])
    assert stretched(values).tolist() == [[0, 0.375], [1, 0.25]]
    assert stretched(np.full((2, 3), 0.7)).tolist() == [[0, 0, 0], [0, 0, 0]]


def test_colours_grow_lighter_from_little_to_much():
    light = colours() @ np.array([0.2126, 0.7152, 0.0722])
    assert colours().shape == (256, 3) and (np.diff(light) > -0.6).all() and light[-1] - light[0] > 200
    assert (np.diff(light[::8]) > 0).all()


def test_the_page_needs_nothing_from_elsewhere_and_runs_nothing(found):
    text = page(found, [strip(found, seen) for seen in found.images])
    assert "http" not in text.replace("http-equiv", "") and "<script" not in text
    assert "default-src 'none'" in text and "img-src data:" in text and text.count("data:image/png;base64,") == 2
    for seen in found.images:
        assert seen.path in text and seen.said in text
    assert all(note in text for note in found.notes)


def test_names_cannot_steer_the_page(found):
    seen = replace(found.images[0], path="a<b>\x1b[2J.png", name="<script>alert(1)</script>")
    odd = replace(found, images=[seen], facts={**found.facts, "model": "<i>"})
    text = page(odd, [strip(odd, seen)])
    assert "<script" not in text and "<b>\x1b" not in text and "a&lt;b&gt;" in text and "<i>" not in text


def test_a_head_that_labels_pixels_has_no_class_to_tell(found):
    seen = replace(found.images[0], name=None, probability=None)
    odd = replace(found, images=[seen])
    assert seen.said == "" and odd.as_dict()["images"][0]["class"] is None
    assert np.isnan(odd.arrays()["probability"]).all() and odd.arrays()["class"].tolist() == [""]
    assert strip(odd, seen).size == size_of(6, 2)
    assert np.load(io.BytesIO(odd.npz()), allow_pickle=False)["class"].tolist() == [""]


def test_three_files_are_written_and_say_the_same(found, tmp_path):
    written = write(found, tmp_path / "new" / "out")
    assert [path.name for path in written] == ["maps.html", "maps.png", "maps.npz"]
    assert Image.open(written[1]).size == (size_of(6, 2)[0], 2 * size_of(6, 2)[1])
    assert np.load(written[2])["class"].tolist() == [seen.name for seen in found.images]
    assert sorted(path.name for path in (tmp_path / "new" / "out").iterdir()) == sorted(p.name for p in written)
    json.dumps(found.as_dict(), allow_nan=False)


# ── bad input ────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def copied(run, tmp_path):
    return shutil.copytree(run, tmp_path / "copy")


def refused(error, path, says):
    with pytest.raises(error, match=re.escape(says)) as raised:
        open_model(path)
    assert "\n" not in str(raised.value)


def test_what_is_no_model_and_no_run_is_refused(copied, tmp_path):
    refused(ModelFileError, tmp_path / "no", "no does not exist; name a model file, or the folder of a finished run")
    (tmp_path / "empty").mkdir()
    refused(ResumeError, tmp_path / "empty", "empty holds no run: there is no settings.toml in it")
    (tmp_path / "text").write_text("hello")
    refused(ModelFileError, tmp_path / "text", "is damaged or no model file")


@pytest.mark.parametrize("missing", ["results.json", "learned.safetensors"])
def test_a_run_that_is_not_finished_is_refused(missing, copied):
    (copied / missing).unlink()
    refused(ResumeError, copied, f"the run in {copied} is not finished; go on with `lamina resume {copied}`")


def test_what_was_learned_must_fit_its_run(copied):
    path = copied / "learned.safetensors"
    learned = load_file(path)
    name = next(iter(learned))
    save_file({key: value for key, value in learned.items() if key != name}, path)
    refused(ResumeError, copied, f"holds other tensors than the run needs; the first is {name!r}")
    save_file({**learned, name: torch.zeros(3, 2)}, path)
    refused(ResumeError, copied, "learned.safetensors does not fit the run in")
    path.write_bytes(b"no tensors")
    refused(ResumeError, copied, "learned.safetensors does not fit the run in")


def test_another_backbone_than_the_run_had_is_refused(copied):
    path = copied / "results.json"
    record = json.loads(path.read_text())
    record["backbone"]["fingerprint"] = "0123"
    path.write_text(json.dumps(record))
    refused(ResumeError, copied, "with fingerprint 0123; the one found here has")


def test_two_classes_of_one_name_are_refused(copied):
    path = copied / "results.json"
    record = json.loads(path.read_text())
    record["classes"][1][0] = record["classes"][0][0]
    path.write_text(json.dumps(record))
    refused(ResumeError, copied, "the run learned 7 classes, and 6 names are written down")


def test_images_that_cannot_be_looked_at_are_refused(run, shop, tmp_path):
    opened = open_model(run)
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(DataError, match=r"text.png cannot be read: cannot identify image file; mend it, or name"):
        explain(opened, [*some(shop, "yak"), str(tmp_path / "text.png")])
    with pytest.raises(DataError, match=r"^an image cannot be read: the name is empty"):
        explain(opened, [""])
    with pytest.raises(DataError, match=rf"^at most {MOST} images are drawn at once; name fewer$"):
        explain(opened, [str(shop)])
    with pytest.raises(DataError, match=r"^there is no image to look at; name one or more$"):
        explain(opened, ["-"], [])
