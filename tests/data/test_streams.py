import numpy as np
import pytest

from lamina.config import assignments
from lamina.data import sources
from lamina.data.stream import Stream
from lamina.data.streams import STREAMS, StreamSettings, build_stream, resolved
from lamina.errors import ConfigError, DataError
from tests.streams import KNOWN_STREAMS


def built(**values) -> Stream:
    return build_stream(StreamSettings(**values))


@pytest.fixture
def folder(image_folder):
    """The name of a stream over 5 classes."""
    return f"folder:{image_folder()}"


def test_the_order_of_a_hundred_classes_under_seed_1993_is_the_published_one(image_folder):
    classes = [f"{label:03d}" for label in range(200)]
    root = image_folder(classes=classes, train_count=1, test_count=1)
    stream = built(name=f"folder:{root}", classes="odd", tasks=10)
    first = [68, 56, 78, 8, 23, 84, 90, 65, 74, 76]
    assert stream.tasks[0].classes == [classes[2 * place + 1] for place in first]
    assert stream.order_seed == 1993
    np.random.seed(1993)
    order = np.random.permutation(100)
    names = [name for task in stream for name in task.classes]
    assert names == [classes[2 * place + 1] for place in order]


@pytest.mark.parametrize(
    ("count", "seed", "first"),
    [
        (100, 2024, [55, 17, 75, 11, 2, 29, 49, 48, 41, 45]),
        (100, 2025, [79, 92, 13, 3, 76, 63, 64, 88, 48, 38]),
        (100, 2026, [16, 17, 97, 10, 91, 31, 12, 64, 84, 55]),
        (200, 2024, [192, 54, 163, 105, 170, 138, 69, 57, 36, 61]),
    ],
)
def test_pcg64_gives_the_orders_that_the_code_of_vpt_nsp2_uses(image_folder, count, seed, first):
    classes = [f"{label:03d}" for label in range(count)]
    name = f"folder:{image_folder(classes=classes, train_count=1, test_count=1)}"
    stream = built(name=name, tasks=10, order_seed=seed, order="pcg64")
    assert [int(each) for task in stream for each in task.classes][:10] == first
    assert len({each for task in stream for each in task.classes}) == count


def test_pcg64_shuffles_the_labels_that_are_kept():
    streams = [built(name="digits", tasks=1, classes="odd", order_seed=3, order=order) for order in ("pcg64", None)]
    orders = [stream.tasks[0].classes for stream in streams]
    assert orders[0] != orders[1] and sorted(orders[0]) == sorted(orders[1])
    legacy = built(name="digits", tasks=1, classes="odd", order_seed=3, order="legacy")
    assert legacy.fingerprint == streams[1].fingerprint != streams[0].fingerprint


def test_column_k_is_the_kth_class_to_arrive(folder):
    stream = built(name=folder, tasks=[1, 3, 1])
    assert [task.columns for task in stream] == [[0], [1, 2, 3], [4]]
    for task in stream:
        for split in (task.train, task.test):
            labels = split.images.labels[split.indices]
            names = ["abcde"[label] for label in labels]
            assert names == [task.classes[column - task.columns[0]] for column in split.columns]
            assert split.indices.dtype == split.columns.dtype == np.int64


def test_tasks_share_out_all_images_once(folder):
    stream = built(name=folder, tasks=3)
    indices = np.concatenate([task.train.indices for task in stream])
    assert sorted(indices.tolist()) == list(range(15))
    assert [len(task.train) for task in stream] == [6, 6, 3]
    assert [len(task.test) for task in stream] == [4, 4, 2]
    assert len(stream.merged().train) == 15


def test_a_number_that_does_not_divide_the_classes_makes_the_first_tasks_larger():
    stream = built(name="digits", tasks=4)
    assert [len(task.classes) for task in stream] == [3, 3, 2, 2]


def test_digits_come_as_five_tasks_of_two():
    stream = built(name="digits")
    assert [task.classes for task in stream] == [
        ["four", "two"],
        ["seven", "six"],
        ["zero", "three"],
        ["five", "eight"],
        ["nine", "one"],
    ]
    assert sum(len(task.train) for task in stream) == 1437


def test_per_class_keeps_the_first_images_of_each_class(folder):
    stream = built(name=folder, tasks=2, per_class=2, test_per_class=1)
    assert sorted(index for task in stream for index in task.train.indices) == [
        0,
        1,
        3,
        4,
        6,
        7,
        9,
        10,
        12,
        13,
    ]
    assert sorted(index for task in stream for index in task.test.indices) == [0, 2, 4, 6, 8]


@pytest.mark.parametrize("classes, kept", [("odd", "bd"), ("even", "ace"), ("all", "abcde")])
def test_odd_and_even_are_labels_of_the_data_set(folder, classes, kept):
    stream = built(name=folder, classes=classes)
    assert sorted(stream.tasks[0].classes) == list(kept)
    labels = stream.tasks[0].train.images.labels[stream.tasks[0].train.indices]
    assert sorted({"abcde"[label] for label in labels}) == list(kept)


def test_another_order_seed_is_another_order_and_another_fingerprint():
    one, two, again = (built(name="digits", order_seed=seed) for seed in (1, 2, 1))
    assert one.tasks[0].classes != two.tasks[0].classes
    assert one.fingerprint != two.fingerprint
    assert one.fingerprint == again.fingerprint


def test_a_holdout_tests_on_the_last_training_images_of_each_class_and_on_no_test_image():
    whole, held = built(name="digits"), built(name="digits", holdout=0.25)
    for task, tuned in zip(whole, held, strict=True):
        both = np.sort(np.concatenate([tuned.train.indices, tuned.test.indices]))
        assert np.array_equal(both, task.train.indices)
        for column in task.columns:
            last = tuned.test.indices[tuned.test.columns == column]
            rest = tuned.train.indices[tuned.train.columns == column]
            assert len(last) == round(0.25 * (len(last) + len(rest))) and rest.max() < last.min()
    assert held.fingerprint != whole.fingerprint


@pytest.mark.parametrize("change", [{"tasks": 2}, {"per_class": 9}, {"test_per_class": 9}, {"classes": "odd"}])
def test_the_fingerprint_depends_on(change):
    assert built(**({"name": "digits", "tasks": 5} | change)).fingerprint != built(name="digits").fingerprint


def test_fingerprints_of_the_digits_are_pinned():
    # a checkpoint names it; a change here makes every saved run of digits refuse to resume
    assert built(name="digits").fingerprint == "e18a3d63c5897feb8d22f27e9e175317"


@pytest.mark.parametrize(
    "name, classes, per_class, tasks",
    [
        ("tiny-odd-10", "odd", 50, 10),
        ("tiny-odd-10-full", "odd", None, 10),
        ("tiny-odd-1x10", "odd", 10, 1),
        ("tiny-odd-1x50", "odd", 50, 1),
        ("tiny-even-10", "even", 50, 10),
        ("tiny-even-10-full", "even", None, 10),
    ],
)
def test_presets_are_pinned(name, classes, per_class, tasks):
    assert resolved(StreamSettings(name=name)).model_dump() == {
        "name": name,
        "tasks": tasks,
        "order_seed": 1993,
        "order": None,
        "classes": classes,
        "per_class": per_class,
        "test_per_class": None,
        "holdout": None,
        "test_on": None,
        "blurry": None,
        "domains": None,
        "duplicates": None,
        "skip_broken": False,
    }


def test_what_is_given_stands_above_the_preset():
    settings = resolved(StreamSettings(name="tiny-odd-10", per_class=7, classes="all", tasks=[150, 50]))
    assert (settings.per_class, settings.classes, settings.tasks) == (7, "all", [150, 50])


def test_settings_that_were_written_out_in_full_mean_the_same():
    settings = resolved(StreamSettings(name="tiny-odd-10"))
    assert resolved(settings) == settings
    unresolved = StreamSettings(name="tiny-odd-10")
    assert resolved(StreamSettings(**unresolved.model_dump())) == settings


def test_a_preset_builds_from_a_small_copy(tiny_parquet):
    stream = build_stream(StreamSettings(name="tiny-odd-10", tasks=2, per_class=4), tiny_parquet)
    # labels 1 and 3 of n01..n05, in the order of np.random.RandomState(1993).permutation(2)
    assert [task.classes for task in stream] == [["bee"], ["tub"]]
    assert [len(task.train) for task in stream] == [4, 4]


def test_every_stream_has_a_description_of_one_line():
    for name, row in STREAMS.items():
        assert row.description and "\n" not in row.description, name


@pytest.mark.parametrize(
    "values, message",
    [
        (
            {"name": "tiny-od-10"},
            f"no stream is called 'tiny-od-10'; did you mean 'tiny-odd-10'? Known: {KNOWN_STREAMS}",
        ),
        ({"name": "folder:"}, "stream 'folder:' needs the path of a folder, as in folder:photos/birds"),
        ({"name": "folder"}, "stream 'folder' needs the path of a folder, as in folder:photos/birds"),
        (
            {"name": "digits", "tasks": 11},
            "stream.tasks must be at most the number of classes; digits with classes='all' has 10, got 11",
        ),
        (
            {"name": "digits", "tasks": [2, 2], "classes": "odd"},
            "stream.tasks must add up to the number of classes; digits with classes='odd' has 5, got [2, 2], in all 4",
        ),
        (
            {"name": "digits", "tasks": 0},
            "StreamSettings.tasks must be a whole number from 1 up, or a list of them; got 0",
        ),
        (
            {"name": "digits", "tasks": [5, True]},
            "StreamSettings.tasks must be a whole number from 1 up, or a list of them; got [5, True]",
        ),
        (
            {"name": "digits", "tasks": []},
            "StreamSettings.tasks must be a whole number from 1 up, or a list of them; got []",
        ),
        (
            {"name": "digits", "classes": "prime"},
            "StreamSettings.classes must be 'all', 'odd' or 'even'; got 'prime'",
        ),
        ({"name": "digits", "per_class": 0}, "StreamSettings.per_class must be at least 1; got 0"),
        ({"name": "digits", "order_seed": -1}, "StreamSettings.order_seed must be at least 0; got -1"),
    ],
)
def test_a_wrong_setting_is_told_in_one_sentence(values, message):
    with pytest.raises(ConfigError) as error:
        built(**values)
    assert str(error.value) == message


def test_settings_come_from_the_command_line():
    settings = StreamSettings(**assignments(["name=digits", "tasks=[4, 6]", "classes=all"]))
    assert settings.tasks == [4, 6]


@pytest.fixture
def real(real_root):
    path = sources.tiny_imagenet_path(real_root)
    if path is None:
        pytest.skip(f"Tiny-ImageNet does not lie in {real_root}; set LAMINA_DATA to where it does")
    return real_root


@pytest.mark.data
def test_tiny_odd_10_is_what_it_says(real):
    stream = build_stream(StreamSettings(name="tiny-odd-10"), real)
    assert [len(task.classes) for task in stream] == [10] * 10
    assert [len(task.train) for task in stream] == [500] * 10
    assert [len(task.test) for task in stream] == [500] * 10
    labels = np.concatenate([task.train.images.labels[task.train.indices] for task in stream])
    assert sorted(set(labels.tolist())) == list(range(1, 200, 2))
    assert stream.tasks[0].classes[:3] == ["projectile", "lampshade", "suspension bridge"]
    assert stream.tasks[0].train.images.image(int(stream.tasks[0].train.indices[0])).shape == (3, 64, 64)


@pytest.mark.data
def test_odd_and_even_tiny_imagenet_share_no_class(real):
    names = []
    for half in ("odd", "even"):
        stream = build_stream(StreamSettings(name=f"tiny-{half}-10", per_class=1, test_per_class=1), real)
        names.append({name for task in stream for name in task.classes})
    assert len(names[0]) == len(names[1]) == 100
    assert not names[0] & names[1]


def test_a_stream_without_its_data_set_is_refused():
    with pytest.raises(DataError, match="tiny-imagenet was not found; looked for"):
        built(name="tiny-odd-10")
