"""Streams of domains: the same classes again and again, in images of another kind.

Digits come in 6 domains of 10 classes; folders in 3 domains of 4 classes, images of 11 x 13 pixels.
"""

import numpy as np
import pytest
from PIL import Image

from lamina.data.domains import DIGIT_DOMAINS, digit_domains
from lamina.data.pictures import hashed
from lamina.data.sources import digits
from lamina.data.streams import StreamSettings, build_stream
from lamina.errors import ConfigError, DataError

TRAIN, TEST = 1437, 360


def built(name="digits-domains", **values):
    return build_stream(StreamSettings(name=name, **values))


@pytest.fixture(scope="module")
def source():
    return digit_domains()


@pytest.fixture
def folder(tmp_path):
    """Return a maker of ROOT/{train,test}/DOMAIN/CLASS/*.png, 3 and 2 images each, every image one shade of grey."""

    def make(domains=("photo", "clip", "sketch"), classes="dbca", name="office", test="test"):
        root = tmp_path / name
        shade = iter(range(1, 256))
        for role, count in (("train", 3), (test, 2)):
            for domain in domains:
                for each in classes:
                    (root / role / domain / each).mkdir(parents=True)
                    for number in range(count):
                        pixels = np.full((11, 13, 3), next(shade), np.uint8)
                        Image.fromarray(pixels).save(root / role / domain / each / f"{number}.png")
        return root

    return make


def emptied(folder):
    for path in folder.iterdir():
        path.unlink()


# ── digits ───────────────────────────────────────────────────────────────────────────────────────────


def test_every_task_is_a_domain_with_all_classes_in_the_same_columns():
    stream = built()
    assert len(stream) == len(DIGIT_DOMAINS) == 6
    assert {tuple(task.columns) for task in stream} == {tuple(range(10))} and stream.columns == 10
    assert {tuple(task.classes) for task in stream} == {tuple(stream.tasks[0].classes)}
    assert [len(task.train) for task in stream] == [TRAIN] * 6 and [len(task.test) for task in stream] == [TEST] * 6
    assert (stream.kind, stream.details) == (
        "domain-incremental",
        {"domains": "plain, inverted, rotated, blurred, noisy, coarse"},
    )


def test_an_image_has_the_same_class_in_every_domain_as_in_the_digits():
    stream, plain = built(), digits()
    names = [plain.classes[label] for label in plain.train.labels]
    for task in stream:
        assert [task.classes[column] for column in task.train.columns] == names


def test_no_domain_trains_on_a_version_of_a_test_image(source):
    plain = digits()
    for pictures, half in ((source.train, plain.train), (source.test, plain.test)):
        for place, change in enumerate(DIGIT_DOMAINS.values()):
            own = pictures.pixels[pictures.labels // 10 == place]
            role = "train" if half is plain.train else "test"
            assert np.array_equal(own, change(half.pixels, role))


def test_a_holdout_takes_the_same_images_out_of_every_domain():
    stream = built(holdout=0.25)
    kept = {tuple((task.train.indices % TRAIN).tolist()) for task in stream}
    held = {tuple((task.test.indices % TRAIN).tolist()) for task in stream}
    assert len(kept) == len(held) == 1
    assert sorted([*kept.pop(), *held.pop()]) == list(range(TRAIN))


def at(image, row, column):
    return int(image[min(max(row, 0), 7)][min(max(column, 0), 7)])


SLOW = {
    "plain": lambda image, r, c: at(image, r, c),
    "inverted": lambda image, r, c: 255 - at(image, r, c),
    "rotated": lambda image, r, c: at(image, c, 7 - r),
    "blurred": lambda image, r, c: (
        sum((2 - abs(y)) * (2 - abs(x)) * at(image, r + y, c + x) for y in (-1, 0, 1) for x in (-1, 0, 1)) / 16
    ),
    "coarse": lambda image, r, c: sum(at(image, r // 2 * 2 + y, c // 2 * 2 + x) for y in (0, 1) for x in (0, 1)) / 4,
}


@pytest.mark.parametrize("name", SLOW)
def test_a_domain_is_what_its_definition_makes_of_each_pixel(name):
    pixels = np.random.default_rng(5).integers(0, 256, (3, 3, 8, 8), dtype=np.uint8)
    changed = DIGIT_DOMAINS[name](pixels, "train")
    assert changed.shape == pixels.shape and changed.dtype == np.uint8
    for before, after in zip(pixels.reshape(9, 8, 8), changed.reshape(9, 8, 8), strict=True):
        wanted = [[SLOW[name](before, row, column) for column in range(8)] for row in range(8)]
        assert np.abs(after - np.array(wanted)).max() <= 0.5


def test_noise_has_its_deviation_and_is_grey_and_another_for_every_image_and_role():
    grey = np.full((40, 3, 8, 8), 128, np.uint8)
    train, test = (DIGIT_DOMAINS["noisy"](grey, role).astype(int) - 128 for role in ("train", "test"))
    assert np.array_equal(train[:, 0], train[:, 1]) and np.array_equal(train[:, 0], train[:, 2])
    assert abs(train[:, 0].mean()) < 4 and 58 < train[:, 0].std() < 66  # a little is cut off at black and white
    images = np.concatenate([train[:, 0], test[:, 0]]).reshape(80, 64)
    assert np.abs(np.corrcoef(images) - np.eye(80)).max() < 0.7


def test_noise_belongs_to_an_image_and_not_to_what_else_there_is():
    grey = np.random.default_rng(1).integers(0, 256, (7, 3, 8, 8), dtype=np.uint8)
    assert np.array_equal(DIGIT_DOMAINS["noisy"](grey, "train")[:4], DIGIT_DOMAINS["noisy"](grey[:4], "train"))


def test_domains_are_chosen_and_put_in_order_by_name():
    stream = built(domains=["noisy", "plain"])
    assert len(stream) == 2 and stream.details == {"domains": "noisy, plain"}
    whole = built()
    for task, place in zip(stream, (4, 0), strict=True):
        assert np.array_equal(task.train.indices, whole.tasks[place].train.indices)
        image = int(task.train.indices[3])
        assert np.array_equal(task.train.images.image(image), whole.tasks[place].train.images.image(image))


def test_fingerprints_and_cache_keys_tell_domains_and_their_order_apart():
    streams = [built(), built(domains=["plain"]), built(domains=["noisy", "plain"]), built(domains=["plain", "noisy"])]
    assert len({stream.fingerprint for stream in streams}) == 4
    assert built().fingerprint == streams[0].fingerprint
    # of these two the key of cached features is made
    assert len({hashed(task.train.images.fingerprint, task.train.indices) for task in streams[0]}) == 6


def test_a_stream_of_domains_can_be_merged_for_the_upper_bound():
    merged = built(per_class=2, test_per_class=1).merged()
    assert (len(merged.train), len(merged.test), merged.columns) == (6 * 20, 6 * 10, list(range(10)))


def test_per_class_counts_in_every_domain():
    for task in built(per_class=3, test_per_class=2, classes="odd"):
        assert np.bincount(task.train.columns).tolist() == [3] * 5
        assert np.bincount(task.test.columns).tolist() == [2] * 5


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("test", ["test", "val"])
def test_a_folder_of_domains_gives_them_in_alphabetical_order(folder, test):
    stream = built(f"folder-domains:{folder(test=test)}")
    assert (stream.kind, stream.details) == ("domain-incremental", {"domains": "clip, photo, sketch"})
    assert [sorted(task.classes) for task in stream] == [list("abcd")] * 3
    assert [task.columns for task in stream] == [[0, 1, 2, 3]] * 3


def test_images_come_from_the_folder_of_their_domain_and_class(folder):
    root = folder()
    for task, domain in zip(built(f"folder-domains:{root}"), ["clip", "photo", "sketch"], strict=True):
        for role, split, count in (("train", task.train, 3), ("test", task.test, 2)):
            for column, name in zip(task.columns, task.classes, strict=True):
                found = [int(split.images.image(int(i))[0, 0, 0]) for i in split.indices[split.columns == column]]
                paths = [root / role / domain / name / f"{number}.png" for number in range(count)]
                assert found == [Image.open(path).getpixel((0, 0))[0] for path in paths]


def test_the_order_of_a_folders_domains_is_a_setting(folder):
    name = f"folder-domains:{folder()}"
    stream = built(name, domains=["sketch", "clip"])
    assert stream.details == {"domains": "sketch, clip"}
    assert stream.fingerprint != built(name, domains=["clip", "sketch"]).fingerprint


def test_a_class_that_only_domains_left_out_have_is_left_out_too(folder):
    root = folder()
    for role in ("train", "test"):
        (root / role / "photo" / "extra").mkdir()
        Image.new("RGB", (13, 11)).save(root / role / "photo" / "extra" / "0.png")
    name = f"folder-domains:{root}"
    assert sorted(built(name, domains=["sketch", "clip"]).tasks[0].classes) == list("abcd")
    with pytest.raises(DataError, match="domain 'clip' has no training image of class 'extra'"):
        built(name)


LACKS = (
    "stream 'folder-domains:{}': domain {} has no {} image of class {}; each domain needs images of every class to "
    "learn from and to test on: add some, or choose other domains with stream.domains"
)


@pytest.mark.parametrize(
    ("place", "words"),
    [
        ("train/photo/b", ("'photo'", "training", "'b'")),
        ("test/sketch/d", ("'sketch'", "test", "'d'")),
    ],
)
def test_a_domain_that_lacks_a_class_is_refused_and_can_be_left_out(folder, place, words):
    root = folder()
    emptied(root / place)
    for _ in range(2):  # with the empty folder and without it
        with pytest.raises(DataError) as error:
            built(f"folder-domains:{root}")
        assert str(error.value) == LACKS.format(root, *words)
        if (root / place).exists():
            (root / place).rmdir()
    others = [name for name in ("clip", "photo", "sketch") if name != place.split("/")[1]]
    assert len(built(f"folder-domains:{root}", domains=others)) == 2


def test_a_class_whose_images_of_a_domain_are_all_broken_is_refused(folder):
    root = folder()
    for path in (root / "train" / "clip" / "c").iterdir():
        path.write_bytes(b"no picture")
    with pytest.raises(DataError) as error:
        built(f"folder-domains:{root}", skip_broken=True)
    assert str(error.value) == LACKS.format(root, "'clip'", "readable training", "'c'")


def test_more_gaps_than_one_are_counted(folder):
    root = folder()
    for place in ("photo/b", "sketch/a", "sketch/c"):
        emptied(root / "train" / place)
    with pytest.raises(DataError, match=r"domain 'photo' has no training image of class 'b' \(and 2 more such gaps\)"):
        built(f"folder-domains:{root}")


def test_a_folder_without_domains_is_refused(folder, image_folder, tmp_path):
    layout = "a folder of domains holds train/DOMAIN/CLASS/* and test/DOMAIN/CLASS/* or val/DOMAIN/CLASS/*"
    plain = image_folder()
    (tmp_path / "half" / "train").mkdir(parents=True)
    (tmp_path / "none" / "train").mkdir(parents=True)
    (tmp_path / "none" / "val").mkdir()
    for root, what in (
        (plain, f"{plain / 'train' / 'a'} has no folders"),
        (tmp_path / "half", f"{tmp_path / 'half'} has no test/ or val/"),
        (tmp_path / "none", f"{tmp_path / 'none' / 'train'} has no folders"),
        (tmp_path / "gone", f"{tmp_path / 'gone'} is not a folder"),
    ):
        with pytest.raises(DataError) as error:
            built(f"folder-domains:{root}")
        assert str(error.value) == f"{what}; {layout}"


# ── wrong words ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "folder-domains:"}, "stream 'folder-domains:' needs the path of a folder, as in folder-domains:"
         "photos/birds"),
        ({"domains": ["plain", "nosy"]}, "stream 'digits-domains': no domain is called 'nosy'; did you mean 'noisy'? "
         "Known: blurred, coarse, inverted, noisy, plain, rotated"),
        ({"domains": "noisy"}, "StreamSettings.domains must be a list of different names, as in "
         "[\"plain\", \"noisy\"]; got 'noisy'"),
        ({"domains": ["noisy", "noisy"]}, "StreamSettings.domains must be a list of different names, as in "
         "[\"plain\", \"noisy\"]; got ['noisy', 'noisy']"),
        ({"domains": []}, "StreamSettings.domains must be a list of different names, as in [\"plain\", \"noisy\"]; "
         "got []"),
        ({"name": "digits", "domains": ["plain"]}, "stream.domains is for streams of domains (digits-domains, "
         "folder-domains:PATH); digits is none"),
        ({"tasks": 3}, "stream.tasks does not go with a stream of domains, where each domain is a task with all "
         "classes; digits-domains has 6, stream.domains chooses among them; got tasks=3"),
        ({"blurry": 0.25}, "stream.blurry does not go with a stream of domains, where each domain is a task with all "
         "classes; digits-domains has 6, stream.domains chooses among them; got blurry=0.25"),
    ],
)  # fmt: skip
def test_a_wrong_setting_of_domains_is_told_in_one_sentence(values, message):
    with pytest.raises(ConfigError) as error:
        built(**values)
    assert str(error.value) == message
