"""Telling pixels apart: images of 40 x 48, a tower of 32 x 32 with L 3 blocks, 5 classes; windows by hand."""

import json

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from torchmetrics.functional.classification import multiclass_jaccard_index

import lamina.data.scenes
from lamina.errors import ConfigError
from lamina.methods.gapt import GaPT
from lamina.methods.linear_probe import LinearProbe
from lamina.methods.vpt_deep import VPTDeep
from lamina.model import Batch
from lamina.registry import method_class
from lamina.results.pixels import class_ious, mean_iou, pixel_accuracy
from lamina.results.records import Record
from lamina.results.report import report
from lamina.results.tables import headline, usual_columns
from lamina.runs import execute, plan
from lamina.training.dense import DenseSettings
from lamina.training.feed import Feed
from lamina.training.launch import launch
from lamina.training.segmentation import Segmentation, confusion, groups
from lamina.training.trainer import Stopped
from lamina.training.windows import RATIOS, looked_at, over_scales, slid, starts, whole
from tests.conftest import make_tiny_vit
from tests.dense import boxes, dense_blobs, dense_trainer
from tests.streams import SPEC, blobs, trainer_of

DEEP = VPTDeep(length=4, epochs=2, batch_size=4, temperature=1.0)
TOGETHER = GaPT(length=2, epochs=2, batch_size=6, lr=0.05, dropout=0.0)  # SGD: of tiny gradients Adam makes more


# ── what is counted ──────────────────────────────────────────────────────────────────────────────────

#: class 3 is neither shown nor said
COUNTS = [[6, 2, 0, 0], [1, 3, 0, 0], [0, 1, 7, 0], [0, 0, 0, 0]]


def test_measures_of_a_confusion_matrix_made_by_hand():
    assert class_ious(COUNTS) == [6 / 9, 3 / 7, 7 / 8, None]
    assert mean_iou(COUNTS) == pytest.approx((6 / 9 + 3 / 7 + 7 / 8) / 3)
    assert pixel_accuracy(COUNTS) == 16 / 20


def pixels_of(counts):
    """Labels and answers, one pixel each, that make up a confusion matrix."""
    pairs = [(c, k) for c, row in enumerate(counts) for k, n in enumerate(row) for _ in range(n)]
    return torch.tensor(pairs).T.reshape(2, 1, 4, 5)


def test_pixels_are_counted_once_and_those_without_a_label_not_at_all():
    labels, said = pixels_of(COUNTS)
    scores = torch.nn.functional.one_hot(said, 4).permute(0, 3, 1, 2).float()
    assert confusion(scores, labels).tolist() == COUNTS
    wrong = torch.cat([scores, 1 - scores], dim=2)  # below, answers to pixels that have no label
    assert confusion(wrong, torch.cat([labels, torch.full_like(labels, 255)], dim=1)).tolist() == COUNTS


def test_the_mean_is_that_of_torchmetrics_over_the_whole_data_set():
    labels, said = torch.randint(4, (3, 6, 7)), torch.randint(4, (3, 6, 7))
    labels[1, 2] = 255
    counts = sum(confusion(torch.nn.functional.one_hot(s, 4)[None].movedim(-1, 1), x[None]) for s, x in
                 zip(said, labels, strict=True))  # fmt: skip
    usual = multiclass_jaccard_index(said, labels, num_classes=4, ignore_index=255)
    assert mean_iou(counts) == pytest.approx(usual.item(), rel=1e-6)


# ── windows ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("length", "crop"), [(12, 12), (13, 12), (19, 12), (20, 12), (41, 12), (700, 512)])
def test_windows_cover_every_pixel_and_stay_inside(length, crop):
    first = starts(length, crop, 2 * crop // 3)
    assert {pixel for start in first for pixel in range(start, start + crop)} == set(range(length))
    assert first[0] == 0 and first[-1] + crop == length and len(set(first)) == len(first)


def test_windows_of_the_published_size_slide_by_341():
    assert starts(1200, 512, 2 * 512 // 3) == [0, 341, 682, 688]


def test_a_window_larger_than_the_image_is_refused():
    with pytest.raises(ConfigError, match=r"^a window of 12 pixels is larger than a side of 11; make the image larger"):
        slid(lambda x: x, torch.zeros(1, 3, 11, 20), 12)


def by_place(windows):
    """Logits that depend on the whole window: what it shows, minus its mean."""
    return windows - windows.mean((2, 3), keepdim=True)


@pytest.mark.parametrize("most", [1, 5, 100])
def test_logits_are_averaged_where_windows_overlap(most):
    images, total, times = torch.randn(2, 3, 19, 31), torch.zeros(2, 3, 19, 31), torch.zeros(19, 31)
    for top in (0, 7):
        for left in (0, 8, 16, 19):
            window = images[:, :, top : top + 12, left : left + 12]
            total[:, :, top : top + 12, left : left + 12] += by_place(window)
            times[top : top + 12, left : left + 12] += 1
    assert times.min() == 1 and times.max() > 3
    torch.testing.assert_close(slid(by_place, images, 12, most=most), total / times)


def test_an_image_of_one_window_is_scored_whole():
    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(slid(by_place, images, 12), by_place(images))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("size", [(300, 400), (90, 700), (512, 512)])
def test_no_side_is_shorter_than_a_window_at_any_scale(size, ratio):
    height, width = looked_at(*size, 512, ratio)
    assert min(height, width) >= 512
    assert height / width == pytest.approx(size[0] / size[1], rel=0.01)


def test_mirror_images_are_turned_back():
    images = torch.randint(256, (2, 3, 12, 17), dtype=torch.uint8)
    plain, mirrored = (whole(lambda x: x, images, 12, torch.Tensor.float, mirrored=turned) for turned in (False, True))
    assert torch.equal(plain, mirrored) and torch.equal(plain, images.float())
    lopsided = torch.arange(12.0).expand(2, 3, 12, 12)  # a score of places, not of pixels
    said = whole(lambda x: lopsided, images[..., :12], 12, torch.Tensor.float, mirrored=True)
    assert torch.equal(said, lopsided.flip(-1))


def test_probabilities_not_logits_are_averaged_over_scales():
    images = torch.randint(256, (2, 3, 24, 30), dtype=torch.uint8)
    found = over_scales(by_place, images, 12, lambda x: x / 64, ratios=(1.0, 1.5))
    each = [
        whole(by_place, images, 12, lambda x: x / 64, ratio=ratio, mirrored=mirrored).softmax(1)
        for ratio in (1.0, 1.5)
        for mirrored in (False, True)
    ]
    torch.testing.assert_close(found, sum(each) / 4)
    torch.testing.assert_close(found.sum(1), torch.ones(2, 24, 30))


# ── runs ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_learns_pixels(tiny_vit):
    tiny_vit.model.patch_embed.proj.weight.data.mul_(50)  # else tokens say where they are, and little of the image
    settings, dense = LinearProbe(epochs=40, batch_size=4, lr=0.03), DenseSettings(channels=16, multi_scale=True)
    trainer = dense_trainer(settings, tiny_vit, dense=dense, augmentation="plain")
    trainer.run(dense_blobs(train=12))
    # all ground would be 0.13 and 0.67
    assert trainer.matrix[0][0] > 0.4 and trainer.figures["pixel_accuracy"] > 0.75
    assert trainer.figures["miou_multi_scale"] > 0.3
    assert list(trainer.by_class) == ["ground", "red", "green", "blue", "grey"]
    assert np.mean(list(trainer.by_class.values())) == pytest.approx(trainer.matrix[0][0])
    assert trainer.matrix_task_aware == trainer.calibration == trainer.usage == []


def test_what_is_learned_are_prompts_and_the_head_alone(tiny_vit):
    before = {name: value.clone() for name, value in tiny_vit.state_dict().items()}
    trainer = dense_trainer(DEEP, tiny_vit)
    first = trainer.learner.model.prompts.state_dict()
    first = {name: value.clone() for name, value in first.items()}
    trainer.run(dense_blobs())
    assert all(torch.equal(before[name], value) for name, value in tiny_vit.state_dict().items())
    assert all(
        not torch.equal(first[name], value) for name, value in trainer.learner.model.prompts.state_dict().items()
    )
    assert {name.split(".")[0] for name in trainer.learner.model.learned()} == {"prompts", "head"}


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_a_run_that_was_stopped_goes_on_as_if_nothing_had_happened(tmp_path, stop):
    whole_run = dense_trainer(DEEP, make_tiny_vit())
    whole_run.run(dense_blobs())
    stopped = dense_trainer(DEEP, make_tiny_vit(), run_dir=tmp_path)
    stopped.should_stop = lambda: stopped.position.step == stop
    with pytest.raises(Stopped):
        stopped.run(dense_blobs())
    again = dense_trainer(DEEP, make_tiny_vit(), run_dir=tmp_path)
    assert again.restore(dense_blobs())
    again.run(dense_blobs())
    assert again.matrix == whole_run.matrix and again.figures == whole_run.figures
    learned = whole_run.learner.model.learned()
    assert all(torch.equal(learned[name], value) for name, value in again.learner.model.learned().items())
    over = dense_trainer(DEEP, make_tiny_vit(), run_dir=tmp_path)
    over.restore(dense_blobs())
    over.run(dense_blobs())  # nothing is left to do, and nothing was forgotten
    assert (over.matrix, over.figures, over.by_class) == (again.matrix, again.figures, again.by_class)


def test_what_is_said_of_an_image_does_not_depend_on_the_others(tiny_vit):
    trainer = dense_trainer(DEEP, tiny_vit)
    stream = dense_blobs()
    trainer.run(stream)
    model = trainer.learner.model
    images = torch.stack([boxes(5).image(index)[:, :32, :32] for index in range(5)]) / 64 - 2
    together = model(Batch(images)).logits
    alone = torch.cat([model(Batch(image[None])).logits for image in images])
    torch.testing.assert_close(together, alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.flip(0), model(Batch(images.flip(0))).logits, atol=1e-5, rtol=1e-4)
    for eval_batch in (1, 2, 100):
        other = dense_trainer(DEEP, tiny_vit, eval_batch=eval_batch)
        other.learner.model = model
        other.evaluate(list(stream))
        assert other.matrix == trainer.matrix and other.by_class == trainer.by_class


def test_images_of_one_size_come_together_in_order_each_once(tiny_vit):
    split = dense_blobs(test=7).tasks[0].test
    share = dense_trainer(DEEP, tiny_vit).feed.share
    found = list(groups(split, share, 3))
    assert [len(group) for group in found] == [3, 3, 1]
    pixels = torch.cat(found)
    assert all(torch.equal(pixels[i, :3], split.images.image(i)) for i in range(7))
    assert all(torch.equal(pixels[i, 3], split.images.mask(i)) for i in range(7))


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("l2p", {"size": 5, "top": 2, "length": 1}),
        ("coda-prompt", {"length": 1, "components": 3}),
        ("vpt-nsp2", {}),
        ("joint", {}),
        ("full", {}),
        ("lspt", {}),
    ],
)
def test_other_methods_with_a_linear_head_learn_pixels_too(tiny_vit, method, settings):
    settings = method_class(method)(**settings, epochs=1, batch_size=6)
    trainer = dense_trainer(settings, tiny_vit)
    trainer.run(dense_blobs(train=7, test=3))
    assert 0 <= trainer.matrix[0][0] <= 1 and trainer.log is not None


def learn_in_each_process(fabric, folder):
    torch.set_num_threads(1)
    trainer = dense_trainer(TOGETHER, make_tiny_vit(), fabric=fabric)
    trainer.run(dense_blobs(train=11, test=7))
    torch.save([trainer.learner.model.learned(), trainer.matrix, trainer.figures], folder / f"{fabric.global_rank}.pt")
    return fabric.world_size


def test_two_processes_learn_and_count_what_one_does(tmp_path):
    """Batches of 6 and 5 images, so shares of 3 and 3, and 3 and 2; images to test on are shared 4 and 3."""
    assert launch(learn_in_each_process, tmp_path, accelerator="cpu", devices=2) == 2
    trainer = dense_trainer(TOGETHER, make_tiny_vit())
    trainer.run(dense_blobs(train=11, test=7))
    mine = trainer.learner.model.learned()
    for rank in (0, 1):
        learned, matrix, figures = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert learned.keys() == mine.keys()
        for name, value in learned.items():
            torch.testing.assert_close(value, mine[name], atol=1e-5, rtol=1e-4, msg=name)
        assert matrix[0] == pytest.approx(trainer.matrix[0], abs=1e-3)
        assert figures == pytest.approx(trainer.figures, abs=1e-3)


def test_the_log_has_the_auxiliary_loss(tmp_path, tiny_vit):
    dense_trainer(DEEP, tiny_vit, run_dir=tmp_path).run(dense_blobs())
    line = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    assert line["auxiliary"] > 0 and line["loss"] == pytest.approx(line["classify"] + line["auxiliary"], rel=1e-5)


# ── what does not go together ────────────────────────────────────────────────────────────────────────


def refused(settings, tower=None, stream=None, **dense):
    with pytest.raises(ConfigError) as raised:
        trainer = dense_trainer(settings, tower or make_tiny_vit(), dense=DenseSettings(channels=7, **dense))
        trainer.check(stream or dense_blobs())
    return str(raised.value)


def test_what_cannot_tell_pixels_is_refused_in_one_line():
    tower = make_tiny_vit()
    tower.first_patch = None
    assert refused(DEEP, tower) == (
        "pixels are told apart by tokens of patches, and a TimmTower has no grid of them; take another backbone"
    )
    assert refused(VPTDeep(head="statistics")) == (
        "a head for pixels cannot take the place of a Discriminant, which is part of how the method learns; take a "
        "method, or a setting of it, with a linear head"
    )
    assert refused(VPTDeep(layers=2)) == "layers=2 changes nothing where pixels are told apart; leave it out"
    assert refused(DEEP, stream=blobs()) == "stream blobs has a label for each image, and none for pixels"


def test_a_trainer_of_whole_images_refuses_label_maps(tiny_vit):
    with pytest.raises(ConfigError, match="^stream boxes has a label for each pixel, and one for each image is what"):
        trainer_of(DEEP, tiny_vit).check(dense_blobs())


def test_fixed_views_are_refused():
    kind = Segmentation()
    with pytest.raises(
        ConfigError, match=r"^images with label maps have no fixed views; got views=flip: leave it out$"
    ):
        Feed(Fabric(accelerator="cpu", devices=1), SPEC, views="flip", transform=kind.transform)


# ── from the command line to the report ──────────────────────────────────────────────────────────────


@pytest.fixture
def few_scenes(monkeypatch):
    monkeypatch.setattr(lamina.data.scenes, "_TRAIN", 9)
    monkeypatch.setattr(lamina.data.scenes, "_TEST", 5)
    lamina.data.scenes.digit_scenes.cache_clear()
    yield
    lamina.data.scenes.digit_scenes.cache_clear()


def test_segment_digits_runs_from_end_to_end(few_scenes, tmp_path):
    overrides = {"epochs": 1, "batch_size": 4, "length": 3, "precision": "32", "dense": {"channels": 8}}
    run, _ = plan("vpt-deep", "segment-digits", overrides=overrides | {"accelerator": "cpu"})
    record = execute(run, tmp_path / "run")
    assert record == Record.read(tmp_path / "run" / "results.json")
    assert record.measure == "mIoU" and record.protocol["kind"] == "segmentation"
    assert record.matrix == [[record.metrics["accuracy"]]] and record.calibration == record.matrix_task_aware == []
    assert 0 <= record.metrics["pixel_accuracy"] <= 1 and len(record.by_class) == 11
    assert record.protocol["dense.channels"] == 8
    row = headline([record], usual_columns([record]))[0]
    assert list(row) == ["method", "mIoU (%)", "pixel accuracy (%)", "n"]
    page = report([record])
    assert "mIoU on each task" in page and "Intersection over union" in page and page.count("background") >= 2
    assert "Accuracy on each task" not in page
    again = execute(run, tmp_path / "run", resume=True)
    assert again.matrix == record.matrix and again.by_class == record.by_class


def test_a_backbone_of_another_size_reads_windows_of_its_own(few_scenes, tmp_path):
    overrides = {"epochs": 1, "batch_size": 4, "length": 3, "precision": "32", "dense": {"channels": 8}}
    run, _ = plan("vpt-deep", "segment-digits", overrides=overrides | {"backbone": "lamina:vit-nano#32px"})
    record = execute(run, tmp_path / "run")
    assert record.protocol["image_size"] == 32 and record.backbone["name"] == "lamina:vit-nano#32px"


@pytest.mark.parametrize(
    ("stream", "overrides", "message"),
    [
        (
            "digits",
            {"dense": {"channels": 8}},
            "dense.channels is for streams whose images have label maps, and digits is none; got 8: leave it out",
        ),
        (
            "segment-digits",
            {"measure_drift": True},
            "measure_drift compares tasks, and a stream of label maps has one; leave it out",
        ),
        (
            "segment-digits",
            {"settings": {"head": "cosine"}},
            "head=cosine changes nothing where pixels are told apart, since a decoder takes the head's place; leave it "
            "out",
        ),
        (
            "segment-digits",
            {"augmentation": "pad-crop-flip"},
            "no transform of images with label maps is called 'pad-crop-flip'; did you mean 'crop-flip'? Known: "
            "crop-flip, crop-flip-color, plain",
        ),
    ],
)
def test_settings_that_do_not_fit_the_stream_are_refused(few_scenes, tmp_path, stream, overrides, message):
    run, _ = plan("vpt-deep", stream, recipe=False, overrides={**overrides, "accelerator": "cpu"})
    with pytest.raises(ConfigError) as raised:
        execute(run, tmp_path / "run")
    assert str(raised.value) == message
