"""Fixed views: 27 training images a task in batches of 5, 2 epochs of 2 repetitions, so 4 passes; 2 or 3 views."""

import itertools
import json
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric

from lamina.data.loader import Share, plain_batches
from lamina.data.memory import Memory
from lamina.data.stream import mixed
from lamina.data.transforms import InputSpec, transform
from lamina.data.views import View, fixed_views
from lamina.errors import ConfigError, ResumeError
from lamina.heads.linear import LinearHead
from lamina.learner import Learner, Phase
from lamina.methods.clap import CLAP
from lamina.methods.coop import CoOp
from lamina.methods.l2p import L2P
from lamina.methods.linear_probe import LinearProbe
from lamina.methods.nearest_mean import NearestMean
from lamina.model import PromptedModel
from lamina.runs import RunSettings, execute, plan, resumable
from lamina.seeds import seed_at
from lamina.training.feed import Feed
from lamina.training.replay import taking
from lamina.training.trainer import Stopped, Trainer
from tests.backbones.clips import tiny_clip
from tests.commands import BACKBONE, called
from tests.conftest import make_tiny_vit
from tests.streams import SPEC, blobs, trainer_of

PASSES, BATCH, SEED = 4, 5, 6
TWICE = Phase(epochs=2, batch_size=BATCH, optimizer=partial(torch.optim.SGD, lr=0.1), repeat=2)
VIEWS = ["flip", 3]
METHODS = {
    "linear-probe": (LinearProbe(epochs=4, batch_size=BATCH), make_tiny_vit),
    "coop": (CoOp(epochs=4, batch_size=BATCH, length=2), tiny_clip),
    "clap": (CLAP(epochs=4, batch_size=BATCH, samples=3, cosine=True, lr=0.1, memory=4), tiny_clip),
}


def feed_of(views, **values):
    return Feed(Fabric(accelerator="cpu", devices=1), SPEC, **{"seed": SEED, "eval_batch": 6, "views": views, **values})


def shown(feed, split, phase=TWICE, number=1):
    """Return the steps of a phase on some images."""
    return list(feed.train(replace(blobs().tasks[1], train=split), number, phase, 0))


def by_hand(image, index, number, views, augmentation="crop-flip"):
    """What an image shows in a pass: normalised pixels, written from the definition."""
    view = (number + index) % (2 if views == "flip" else views)
    if views == "flip":
        pixels = torch.flip(image, [2]) if view else image
    else:
        torch.manual_seed(seed_at(SEED, "view", view, index))
        pixels = transform(augmentation, SPEC)(image)
    return (pixels / 255 - 0.5) / 0.25


def numbered(split):
    """The same images, each in a column of its own, so that a batch says which they are."""
    return replace(split, columns=np.arange(len(split)))


# ── which view, and how it looks ─────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("views", VIEWS)
def test_an_image_shows_its_views_in_turn_and_begins_with_the_one_of_its_index(views):
    split = numbered(blobs().tasks[1].train)
    seen = {row: [] for row in range(27)}
    for place, fed in enumerate(shown(feed_of(views), split)):
        for row, image in zip(fed.batch.labels.tolist(), fed.batch.images, strict=True):
            seen[row].append((place // 11, image))  # an epoch has two passes in 11 batches
    for row, found in seen.items():
        index = int(split.indices[row])
        source = split.images.image(index)
        expected = [by_hand(source, index, number, views) for number in range(PASSES)]
        assert [epoch for epoch, _ in found] == [0, 0, 1, 1]
        for epoch in range(2):  # repetitions are shuffled together, so the second one may come first
            ours = [image for place, image in found if place == epoch]
            wanted = expected[2 * epoch : 2 * epoch + 2]
            assert any(
                all(torch.allclose(a, b, atol=1e-6) for a, b in zip(ours, order, strict=True))
                for order in itertools.permutations(wanted)
            )


def test_two_views_are_the_plain_image_and_its_mirror_image_where_images_are_cropped():
    spec = InputSpec(20, (0.5,) * 3, (0.25,) * 3, crop_pct=0.8)
    plain, mirrored = fixed_views("flip", "crop-flip", spec, seed=SEED)
    image = torch.randint(0, 256, (3, 31, 44), dtype=torch.uint8)
    seen = transform("plain", spec)(image)
    assert torch.equal(plain.transform(image), seen)
    assert torch.equal(mirrored.transform(image), seen[:, :, range(19, -1, -1)])
    assert not torch.equal(mirrored.transform(image), seen)


@pytest.mark.parametrize("views", VIEWS)
def test_a_batch_shows_several_views(views):
    split, feed = blobs().tasks[1].train, feed_of(views)
    count = len(feed.fixed)
    for row in range(4):
        several = split.take(np.arange(row, row + count))
        once = replace(TWICE, epochs=1, repeat=1)
        (fed,) = shown(feed, numbered(several), once)
        rows = fed.batch.labels.tolist()
        found = set()
        for place, image in zip(rows, fed.batch.images, strict=True):
            index = int(several.indices[place])
            source = several.images.image(index)
            found |= {v for v in range(count) if torch.allclose(image, by_hand(source, index, v - index, views))}
        assert found == set(range(count))


def test_draws_of_an_image_and_of_images_differ():
    split = blobs().tasks[1].train
    looks = [
        torch.cat([part.images for part in plain_batches(split, view.transform, batch_size=4, draw=view.address)])
        for view in feed_of(3).fixed
    ]
    for one, other in itertools.combinations(looks, 2):
        assert (one - other).abs().flatten(1).mean(1).min() > 0.01
    same = replace(split, indices=np.array([7, 7, 8]), columns=np.zeros(3, np.int64))
    view = feed_of(3).fixed[1]
    first, again, _ = next(plain_batches(same, view.transform, batch_size=4, draw=view.address)).images
    assert torch.equal(first, again)


@pytest.mark.parametrize("views", VIEWS)
def test_workers_and_images_of_several_sizes_change_nothing(views):
    split = blobs().tasks[1].train

    class OneByOne:
        labels, fingerprint, image = split.images.labels, "one by one", split.images.image

        def __len__(self):
            return len(self.labels)

    expected = shown(feed_of(views), split)
    for steps in (shown(feed_of(views, workers=2), split), shown(feed_of(views), replace(split, images=OneByOne()))):
        assert len(steps) == len(expected)
        assert all(torch.equal(a.batch.images, b.batch.images) for a, b in zip(steps, expected, strict=True))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("views", VIEWS)
def test_processes_share_the_views_of_each_batch(tiny_vit, views, cached):
    split, more = blobs().tasks[1].train, {"features": tiny_vit} if cached else {}
    whole = shown(feed_of(views, **more), split)
    parts = []
    for rank in range(2):
        feed = feed_of(views, **more)
        feed.share = Share(rank, 2)
        parts.append(shown(feed, split))
    for step, *mine in zip(whole, *parts, strict=True):
        for rank, part in enumerate(mine):
            name = "features" if cached else "images"
            all_of_them = getattr(step.batch, name)
            expected = all_of_them[rank::2] if len(all_of_them) > rank else all_of_them[:1]
            assert torch.equal(getattr(part.batch, name), expected)


def test_what_is_not_trained_on_stays_plain(tiny_vit):
    split = blobs().tasks[1].train
    for more in ({}, {"features": tiny_vit}, {"queries": tiny_vit}):
        for views in VIEWS:
            pairs = zip(feed_of(views, **more).plain(split), feed_of(None, **more).plain(split), strict=True)
            for ours, theirs in pairs:
                for a, b in zip(ours, theirs, strict=True):
                    assert a is b is None or torch.equal(a, b)


def test_without_views_every_pass_draws_anew_and_cached_features_are_plain(tiny_vit):
    split = numbered(blobs().tasks[1].train)
    seen = {row: set() for row in range(27)}
    for fed in shown(feed_of(None), split, replace(TWICE, epochs=3)):
        for row, image in zip(fed.batch.labels.tolist(), fed.batch.images, strict=True):
            seen[row].add(image.numpy().tobytes())
    assert min(len(found) for found in seen.values()) > 3  # of 6; crops of a tiny image may agree
    feed = feed_of(None, features=tiny_vit)
    plain = torch.cat([batch.features for batch in feed.plain(split)])
    assert all(torch.equal(fed.batch.features, plain[fed.batch.labels]) for fed in shown(feed, split))


# ── what is computed once ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("views", VIEWS)
def test_cached_features_are_those_of_the_images_that_uncached_training_shows(tiny_vit, views):
    split = blobs().tasks[1].train
    cached, images = (shown(feed_of(views, **more), split) for more in ({"features": tiny_vit}, {}))
    assert len(cached) == len(images) == 22
    for ours, theirs in zip(cached, images, strict=True):
        assert ours.batch.labels.tolist() == theirs.batch.labels.tolist() and ours.weight == theirs.weight
        with torch.no_grad():
            expected = tiny_vit(theirs.batch.images).features
        torch.testing.assert_close(ours.batch.features, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("views", VIEWS)
def test_queries_of_fixed_views_are_those_of_the_frozen_tower(tiny_vit, views):
    for fed in shown(feed_of(views, queries=tiny_vit), blobs().tasks[1].train):
        with torch.no_grad():
            expected = tiny_vit(fed.batch.images).features
        torch.testing.assert_close(fed.batch.query, expected, rtol=1e-4, atol=1e-5)


def test_l2p_learns_the_same_from_queries_that_were_computed_once(tiny_vit):
    stream, found = blobs(tasks=2), []
    for queries in (True, False):
        trainer = method_of(L2P(size=5, top=2, length=1, epochs=3, batch_size=BATCH), tiny_vit, 3)
        assert trainer.feed.queries is tiny_vit
        trainer.feed.queries = tiny_vit if queries else None
        trainer.run(stream)
        found.append(learned(trainer))
    assert_close(*found)


def test_every_view_is_computed_once_and_kept_under_all_that_it_depends_on(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    split, met = blobs().tasks[1].train, set()
    few = replace(split, indices=split.indices[3:], columns=split.columns[3:])

    def new(views, images=split, **more):
        """How many arrays a phase adds."""
        shown(feed_of(views, features=tiny_vit, **more), images)
        found = {path.name for path in (tmp_path / "features").iterdir()}
        count = len(found - met)
        met.update(found)
        return count

    assert new(None) == 1
    assert new("flip") == 1  # the plain view is there
    assert new("flip", seed=SEED + 1, augmentation="flip") == 0
    assert new(3) == 3 and new(3) == 0
    assert new(5) == 2  # draws are those of before, and two more
    assert new(3, seed=SEED + 1) == 3
    assert new(3, augmentation="pad-crop-flip") == 3
    assert new(1, augmentation="plain") == 0
    assert new(3, few) == 3
    monkeypatch.setattr("lamina.training.feed.plain_batches", None)
    assert [new(None), new("flip"), new(5)] == [0, 0, 0]


# ── the same image elsewhere ─────────────────────────────────────────────────────────────────────────


def two_sources():
    """A task of 25 images, and a task of another stream of which three come again."""
    own, old = blobs(tasks=1, train=25, seed=1).tasks[0], blobs(tasks=3, seed=2).tasks[0]
    return own, old, mixed([own.train, old.train.take(np.array([20, 3, 8]))])


@pytest.mark.parametrize("views", VIEWS)
def test_an_old_image_of_another_source_has_the_views_that_it_had_in_its_task(tiny_vit, views):
    own, old, both = two_sources()
    assert both.first_indices.tolist() == [*own.train.indices.tolist(), 20, 3, 8]
    assert both.indices[-3:].tolist() == [25 + 20, 25 + 3, 25 + 8]
    looks = [[], []]
    for place, split in enumerate((old.train, both)):
        once = replace(TWICE, epochs=1, repeat=1)  # in one pass, so that it begins with the same view, too
        for fed in shown(feed_of(views), numbered_as(split, old), once):
            for row, image in zip(fed.batch.labels.tolist(), fed.batch.images, strict=True):
                looks[place].append((row, image.numpy().tobytes()))
    assert {look for look in looks[1] if look[0] in (20, 3, 8)} == {look for look in looks[0] if look[0] in (20, 3, 8)}
    cached, images = (shown(feed_of(views, **more), both) for more in ({"features": tiny_vit}, {}))
    for ours, theirs in zip(cached, images, strict=True):
        with torch.no_grad():
            expected = tiny_vit(theirs.batch.images).features
        torch.testing.assert_close(ours.batch.features, expected, rtol=1e-4, atol=1e-5)


def numbered_as(split, old):
    """Images in columns by their place in the old task; -1 for others."""
    rows = np.arange(27) if split is old.train else np.array([-1] * 25 + [20, 3, 8])
    numbered = replace(split, columns=rows)
    return numbered._from(split.origins)


def test_an_image_has_the_same_views_in_another_task_and_phase():
    images = blobs().tasks[0].train.images
    looks = []
    for task, number, start in ((0, 1, 0), (1, 3, 4)):
        split = replace(blobs().tasks[0].train, indices=np.arange(start, 12), columns=np.arange(start, 12))
        assert split.images.fingerprint == images.fingerprint
        feed, seen = feed_of(3), set()
        for fed in feed.train(replace(blobs().tasks[task], train=split), number, TWICE, 0):
            rows = zip(fed.batch.labels.tolist(), fed.batch.images, strict=True)
            seen |= {(row, image.numpy().tobytes()) for row, image in rows}
        looks.append({look for look in seen if look[0] >= 4})
    assert looks[0] == looks[1] and len(looks[0]) == 8 * 3


def test_views_of_old_images_are_looked_up_and_not_computed_anew(tiny_vit, tmp_path, monkeypatch):
    monkeypatch.setenv("LAMINA_CACHE", str(tmp_path))
    stream, memory, feed = blobs(), Memory(per_class=2), feed_of(3, features=tiny_vit)
    memory.keep(stream.tasks[0], 0)
    for task in stream:
        shown(feed, task.train)
    monkeypatch.setattr("lamina.training.feed.plain_batches", None)
    phase = replace(TWICE, classes="seen", data="task+memory")
    both = taking(phase, stream.tasks[1], memory, stream.tasks)
    assert sum(fed.images for fed in shown(feed, both.train, phase)) == (27 + 6) * PASSES


# ── whole runs ───────────────────────────────────────────────────────────────────────────────────────


def method_of(settings, tower, views, cache=None, **arguments):
    torch.manual_seed(0)
    learner = settings.build(tower)
    learner.cache = cache or learner.cache
    fabric = Fabric(accelerator="cpu", devices=1)
    feed = Feed.to(learner, fabric, SPEC, seed=SEED, eval_batch=6, views=views)
    return Trainer(learner, feed, fabric, seed=SEED, **arguments)


def learned(trainer):
    return {name: value.clone() for name, value in trainer.learner.model.learned().items()}


def assert_close(ours, theirs):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-4, msg=name)


@pytest.mark.parametrize("views", VIEWS)
@pytest.mark.parametrize("name", METHODS)
def test_cached_training_learns_what_training_on_the_same_views_learns(name, views):
    settings, tower = METHODS[name]
    found = []
    for cache, some in (("features", views), ("off", views), ("features", None)):
        trainer = method_of(settings, tower(), some, cache)
        assert (trainer.feed.features is None) == (cache == "off")
        trainer.run(blobs())
        found.append(learned(trainer))
    assert_close(*found[:2])
    with pytest.raises(AssertionError):
        assert_close(found[0], found[2])


@pytest.mark.parametrize("cache", ["features", "off"])
@pytest.mark.parametrize("views", VIEWS)
def test_a_run_that_was_stopped_goes_on_exactly(tiny_vit, tmp_path, views, cache):
    settings = METHODS["linear-probe"][0]
    whole = method_of(settings, tiny_vit, views, cache)
    whole.run(blobs())
    first = method_of(settings, tiny_vit, views, cache, run_dir=tmp_path)
    first.should_stop = lambda: first.position == (1, 0, 9)
    with pytest.raises(Stopped):
        first.run(blobs())
    second = method_of(settings, tiny_vit, views, cache, run_dir=tmp_path)
    assert second.restore(blobs()) and second.position == (1, 0, 9)
    second.run(blobs())
    assert second.matrix == whole.matrix
    assert all(torch.equal(value, learned(whole)[name]) for name, value in learned(second).items())


SMALL = {"stream": {"per_class": 3, "test_per_class": 1, "tasks": 2}, "backbone": BACKBONE, "precision": "32"}


def planned(method, views, **values):
    return plan(method, "digits", recipe=False, overrides={**SMALL, "views": views, "epochs": 2, **values})[0]


@pytest.mark.parametrize(
    ("method", "values", "said"),
    [
        ("linear-probe", {}, "none (cached features)"),
        ("linear-probe", {"views": "flip"}, "plain and mirrored (cached features)"),
        ("linear-probe", {"views": 4}, "crop-flip, 4 fixed views (cached features)"),
        ("linear-probe", {"views": 1, "augmentation": "flip"}, "flip, 1 fixed view (cached features)"),
        ("vpt-deep", {}, "crop-flip"),
        ("vpt-deep", {"views": "flip"}, "plain and mirrored"),
        ("vpt-deep", {"views": 2}, "crop-flip, 2 fixed views"),
    ],
)
def test_a_record_says_what_training_images_looked_like(tmp_path, method, values, said):
    run = planned(method, **{"views": None, **values})
    assert execute(run, tmp_path / "run").protocol["augmentation"] == said
    assert resumable(tmp_path / "run") == run


def test_a_run_goes_on_with_the_views_that_it_began_with(tmp_path):
    run = planned("linear-probe", "flip")
    record = execute(run, tmp_path)
    assert execute(run, tmp_path, resume=True).matrix == record.matrix
    with pytest.raises(ResumeError) as error:
        execute(run.model_copy(update={"views": None}), tmp_path, resume=True)
    assert str(error.value) == f"{tmp_path / 'state.pt'} was made with views = 'flip'; this run has None"


@pytest.mark.parametrize(("word", "said"), [("flip", "plain and mirrored"), ("3", "crop-flip, 3 fixed views")])
def test_the_command_takes_views(tmp_path, monkeypatch, capfd, word, said):
    words = ["--backbone", BACKBONE, "--set", "stream.per_class=2", "--set", "stream.test_per_class=1", "--views", word]
    words += ["--set", "epochs=1", "--out", tmp_path / "new", "--json"]
    code, out, _ = called(monkeypatch, capfd, "run", "linear-probe", "--stream", "digits", *words)
    assert (code, json.loads(out)["protocol"]["augmentation"]) == (0, f"{said} (cached features)")


# ── refusals ─────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("views", "augmentation", "message"),
    [
        (0, "crop-flip", "views must be 'flip' or a whole number from 1 up; got 0"),
        ("mirror", "crop-flip", "views must be 'flip' or a whole number from 1 up; got 'mirror'"),
        (True, "crop-flip", "views must be 'flip' or a whole number from 1 up; got True"),
        (2.0, "crop-flip", "views must be 'flip' or a whole number from 1 up; got 2.0"),
        (
            2,
            "plain",
            "augmentation 'plain' draws nothing, so 2 views of an image would all be one; take views=flip, or another "
            "augmentation",
        ),
    ],
)
def test_views_that_there_are_not_are_refused_before_anything_is_loaded(views, augmentation, message):
    stream = {"name": "digits"}
    for ask in (
        lambda: RunSettings(method="linear-probe", stream=stream, augmentation=augmentation, views=views),
        lambda: feed_of(views, augmentation=augmentation),
    ):
        with pytest.raises(ConfigError) as error:
            ask()
        assert str(error.value) == message


@pytest.mark.parametrize("views", VIEWS)
def test_views_that_no_phase_would_show_are_refused(tiny_vit, views):
    drawing = replace(TWICE, draws=4, classes="seen")
    nothing = Learner(PromptedModel(tiny_vit, None, LinearHead(24)), lambda task: [drawing], cache="features")
    for learner in (NearestMean().build(tiny_vit), nothing):
        fabric = Fabric(accelerator="cpu", devices=1)
        trainer = Trainer(learner, Feed.to(learner, fabric, SPEC, views=views), fabric)
        with pytest.raises(ConfigError) as error:
            trainer.run(blobs())
        assert str(error.value) == f"views={views} changes nothing where no phase trains on images; leave it out"
        assert not trainer.met
    trainer_of(NearestMean(), tiny_vit).check(blobs())


def test_a_random_transform_without_an_address_is_no_view():
    view = View(transform("crop-flip", SPEC))
    with pytest.raises(ConfigError, match="^evaluation needs a transform without randomness: 'plain'; got 'crop-flip'"):
        plain_batches(blobs().tasks[0].train, view.transform, batch_size=3, draw=view.address)
