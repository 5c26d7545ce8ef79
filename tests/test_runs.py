"""`plan`: from a method's name and some words to the settings of a run; recipes, overrides, folders."""

import json
import signal

import pytest
import torch

import lamina.runs
from lamina.config import write_toml
from lamina.errors import ConfigError, LaminaError, ResumeError
from lamina.model import PromptedModel
from lamina.registry import method_class, method_names
from lamina.runs import RECIPES, RunSettings, execute, plan, resumable

NAME = "digits"


@pytest.fixture
def recipes(tmp_path, monkeypatch):
    """One recipe: VPT-deep on digits."""
    folder = tmp_path / "recipes" / "vpt-deep"
    folder.mkdir(parents=True)
    (folder / "digits.toml").write_text(
        '# a recipe\nversion = 1\nmethod = "vpt-deep"\naugmentation = "flip"\nseed = 5\n'
        '[stream]\nname = "digits"\nper_class = 7\n[settings]\nlength = 6\nlr = 0.5\n'
    )
    monkeypatch.setattr(lamina.runs, "RECIPES", tmp_path / "recipes")
    return folder


def test_without_a_recipe_everything_has_its_default():
    run, path = plan("nearest-mean", "digits")
    assert path is None
    assert run == RunSettings(method="nearest-mean", stream={"name": "digits"})
    assert (run.backbone, run.seed, run.augmentation, run.settings) == ("lamina:vit-nano", 0, "crop-flip", {})


def test_the_recipe_for_method_and_stream_is_the_starting_point(recipes):
    run, path = plan("vpt-deep", "digits")
    assert path == recipes / "digits.toml"
    assert (run.augmentation, run.seed, run.stream.per_class) == ("flip", 5, 7)
    assert run.settings == {"length": 6, "lr": 0.5}


@pytest.mark.parametrize(("method", "stream"), [("vpt-nsp2", "digits"), ("vpt-deep", "cifar10")])
def test_a_recipe_is_for_its_own_method_and_stream(recipes, method, stream):
    run, path = plan(method, stream)
    assert path is None and run.settings == {} and run.augmentation == "crop-flip"


def test_no_recipe_is_used_when_none_is_wanted(recipes):
    run, path = plan("vpt-deep", "digits", recipe=False)
    assert path is None and run.settings == {} and run.seed == 0


def test_a_recipe_can_be_given_by_its_path_even_when_none_is_looked_up(recipes):
    by_path, path = plan(str(recipes / "digits.toml"), recipe=False)
    assert path == recipes / "digits.toml"
    assert by_path == plan("vpt-deep", "digits")[0]
    assert plan(str(path), "cifar10")[0].stream.name == "cifar10"


def test_overrides_have_the_last_word_and_leave_the_rest_of_the_recipe(recipes):
    overrides = {"seed": 8, "stream": {"test_per_class": 2, "order_seed": 4}, "lr": 0.25, "workers": 1}
    overrides["settings"] = {"epochs": 3}
    run, _ = plan("vpt-deep", "digits", overrides=overrides)
    assert (run.seed, run.workers, run.augmentation) == (8, 1, "flip")
    assert (run.stream.name, run.stream.per_class, run.stream.test_per_class) == ("digits", 7, 2)
    assert run.settings == {"length": 6, "lr": 0.25, "epochs": 3}
    run, _ = plan("vpt-deep", "digits", overrides={"stream": {"per_class": 9}, "settings": {"length": 8}})
    assert run.stream.per_class == 9 and run.settings == {"length": 8, "lr": 0.5}


def test_a_recipe_for_another_backbone_is_not_used(recipes):
    path = recipes / "digits.toml"
    path.write_text('backbone = "timm:vit_tiny_patch16_224@random"\n' + path.read_text())
    assert plan("vpt-deep", "digits")[0].backbone == "timm:vit_tiny_patch16_224@random"
    run, used = plan("vpt-deep", "digits", overrides={"backbone": "lamina:vit-nano"})
    assert used is None and run.settings == {} and run.backbone == "lamina:vit-nano"


def test_every_recipe_that_ships_can_be_planned():
    found = sorted(RECIPES.rglob("*.toml"))
    assert found
    for path in found:
        run, used = plan(str(path))
        assert used == path and run.method == path.parent.name
        assert method_class(run.method)(**run.settings)


@pytest.mark.parametrize(
    ("arguments", "overrides", "message"),
    [
        (
            ("vpt-nps2", "digits"),
            {},
            f"no method is called 'vpt-nps2'; did you mean 'vpt-nsp2'? Known: {', '.join(method_names())}",
        ),
        (("joint",), {}, "a run needs a stream: --stream NAME; `lamina list streams` shows what there is"),
        (
            ("vpt-deep", "digits"),
            {"lenght": 3},
            "VPTDeep: no setting is called 'lenght'; did you mean 'length'? Known: batch_size, depth, dropout, "
            "dropout_mode, epochs, head, layers, length, lr, projection, start, temperature, weight_decay",
        ),
        (("vpt-deep", "digits"), {"lr": 0}, "VPTDeep.lr must be above 0.0; got 0"),
        (("vpt-deep", "digits"), {"seed": -1}, "RunSettings.seed must be at least 0; got -1"),
        (("vpt-deep", "digits"), {"stream": {"per_class": 0}}, "StreamSettings.per_class must be at least 1; got 0"),
        (
            ("vpt-deep", "digits"),
            {"precision": "16"},
            "RunSettings.precision must be 'auto', 'bf16' or '32'; got '16'",
        ),
        (
            ("vpt-deep", "digits"),
            {"normalization": "units"},
            "RunSettings.normalization must be 'backbone', 'unit', 'half' or 'imagenet'; got 'units'",
        ),
    ],
)
def test_a_wrong_plan_says_what_would_be_right(arguments, overrides, message):
    with pytest.raises(ConfigError) as error:
        plan(*arguments, overrides=overrides)
    assert str(error.value) == message


@pytest.mark.parametrize("overrides", [{"stream": "digits"}, {"settings": 3}, {"stream": 3}])
def test_a_plain_value_where_settings_belong_is_our_error_or_understood(overrides):
    """As typed: `--set stream=digits`."""
    try:
        run, _ = plan("vpt-deep", "digits", overrides=overrides)
    except ConfigError as error:
        assert "\n" not in str(error)
    else:
        assert run.stream.name == "digits"


# ── folders ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("given", [{"lr": 0.1}, {"settings": {"lr": 0.1}}])
def test_a_setting_that_changes_nothing_is_refused_when_it_is_asked_for_and_let_be_in_a_recipe(given):
    message = "^lr changes nothing where length is 0, since nothing is trained; leave it out, or change that$"
    with pytest.raises(ConfigError, match=message):
        plan("strata", "digits", overrides=given)
    assert plan("strata", "digits", overrides={"length": 16} | given)[0].settings["lr"] == 0.1
    assert plan("strata", "digits")[0].settings["epochs"] == 5


def test_the_settings_of_a_run_come_back_from_its_folder(tmp_path):
    run, _ = plan("vpt-deep", "digits", overrides={"lr": 0.25, "stream": {"tasks": [4, 6]}})
    write_toml(tmp_path / "settings.toml", {"run": run.model_dump(), "command": "lamina run"})
    assert resumable(tmp_path) == run


def test_a_folder_without_a_run_cannot_be_resumed(tmp_path):
    with pytest.raises(ResumeError) as error:
        resumable(tmp_path)
    assert str(error.value) == (
        f"{tmp_path} holds no run: there is no settings.toml in it; start one with `lamina run`"
    )


def test_a_folder_of_folders_names_a_run_below_it(tmp_path):
    run, _ = plan("vpt-deep", "digits")
    for place in ("select/lr=0.1", "final/lr=0.1/seed-42"):
        write_toml(tmp_path / place / "settings.toml", {"run": run.model_dump()})
    with pytest.raises(ResumeError) as error:
        resumable(tmp_path)
    assert str(error.value).endswith(f"; name one that lies below it, as {tmp_path}/final/lr=0.1/seed-42")


def test_settings_that_a_crash_cut_short_are_our_error(tmp_path):
    """The first thing that a run writes; a kill in that moment may leave an empty file."""
    (tmp_path / "settings.toml").write_text("")
    with pytest.raises(LaminaError) as error:
        resumable(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="module")
def small():
    return plan("nearest-mean", "digits", overrides={"stream": {"per_class": 2, "test_per_class": 1}})[0]


@pytest.fixture
def moving():
    """Prompts over two tasks in float32, with drift measured."""
    small = {"stream": {"per_class": 2, "test_per_class": 3, "tasks": 2}, "precision": "32", "accelerator": "cpu"}
    return plan("vpt-deep", "digits", recipe=False, overrides={**small, "epochs": 1, "measure_drift": True})[0]


def test_drift_is_part_of_the_record_where_it_was_asked_for(moving, tmp_path):
    record = execute(moving, tmp_path / "run")
    depth = len(record.drift[0][0])
    assert depth > 1 and [len(row) for row in record.drift] == [1, 2]
    assert record.drift[0] == [[0.0] * depth] and record.drift[1][1] == [0.0] * depth
    assert min(record.drift[1][0][1:]) > 0
    assert [value > 0 for value in record.seconds["measure_drift"]] == [True, True]


def test_what_was_learned_at_once_has_no_drift_and_needs_no_spread(tmp_path):
    small = {"stream": {"per_class": 2, "test_per_class": 1, "tasks": [1, 9]}, "epochs": 1, "measure_drift": True}
    record = execute(plan("joint", "digits", recipe=False, overrides=small)[0], tmp_path / "run")
    assert record.drift == [] and record.at_once and "measure_drift" not in record.seconds


def test_a_run_is_resumed_with_the_meter_it_was_begun_with(moving, tmp_path):
    """A checkpoint of a run that measures nothing looks like one from before there was a meter."""
    for measured, says in ((True, "True; this run has None"), (False, "None; this run has True")):
        folder = tmp_path / says[:4]
        execute(moving.model_copy(update={"measure_drift": measured}), folder)
        assert ("measure_drift" in torch.load(folder / "state.pt", weights_only=True)["identity"]) == measured
        with pytest.raises(ResumeError) as error:
            execute(moving.model_copy(update={"measure_drift": not measured}), folder, resume=True)
        assert str(error.value) == f"{folder / 'state.pt'} was made with measure_drift = {says}"


# ── pixels ───────────────────────────────────────────────────────────────────────────────────────────


def fed_otherwise(run, name):
    return run.model_copy(update={"normalization": name})


@pytest.fixture(scope="module")
def fed(small, tmp_path_factory):
    """Folders and records of the same run with pixels of three kinds."""
    folders = {name: tmp_path_factory.mktemp(name) for name in ("backbone", "unit", "half")}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LAMINA_CACHE", str(tmp_path_factory.mktemp("cache")))  # one cache for all three
        return {name: (folder, execute(fed_otherwise(small, name), folder)) for name, folder in folders.items()}


@pytest.fixture
def pixels_seen(monkeypatch):
    """The ranges of pixels that a tower with prompts sees, one per batch."""
    seen, embed = [], PromptedModel.look

    def look(self, batch, **more):
        seen.append((batch.images.min().item(), batch.images.max().item()))
        return embed(self, batch, **more)

    monkeypatch.setattr(PromptedModel, "look", look)
    return seen


@pytest.mark.parametrize(("name", "low", "high"), [("unit", 0, 1), ("imagenet", -2.2, 2.7)])
def test_a_run_feeds_pixels_as_it_was_told_in_training_and_in_evaluation(tmp_path, pixels_seen, name, low, high):
    stream = {"per_class": 1, "test_per_class": 1, "tasks": 1}
    execute(plan("vpt-deep", "digits", overrides={"stream": stream, "epochs": 1, "normalization": name})[0], tmp_path)
    assert len(pixels_seen) == 2
    assert all(low <= least and most <= high for least, most in pixels_seen)
    assert max(least for least, _ in pixels_seen) < low + 0.3 and min(most for _, most in pixels_seen) > high - 0.7


def test_features_that_are_kept_from_run_to_run_belong_to_one_normalisation(fed):
    states = {name: torch.load(folder / "state.pt", weights_only=True) for name, (folder, _) in fed.items()}
    learned = {name: state["learned"] for name, state in states.items()}
    for name, same in (("unit", False), ("half", True)):  # half is what this backbone was trained with
        assert all(torch.equal(value, learned[name][key]) for key, value in learned["backbone"].items()) == same


def test_the_protocol_names_a_normalisation_that_is_not_the_backbones_own(fed):
    protocol = fed["backbone"][1].protocol
    assert "normalization" not in protocol
    for name in ("unit", "half"):
        assert fed[name][1].protocol == protocol | {"normalization": name}


@pytest.mark.parametrize(
    ("name", "other", "says"),
    [("unit", "backbone", "'unit'; this run has None"), ("backbone", "unit", "None; this run has 'unit'")],
)
def test_a_run_is_resumed_with_the_pixels_it_was_begun_with(fed, small, name, other, says):
    """A checkpoint from before there was a choice looks like one of a run with the backbone's own."""
    folder, record = fed[name]
    assert ("normalization" in torch.load(folder / "state.pt", weights_only=True)["identity"]) == (name == "unit")
    assert resumable(folder).normalization == name
    assert execute(resumable(folder), folder, resume=True).matrix == record.matrix
    with pytest.raises(ResumeError) as error:
        execute(fed_otherwise(small, other), folder, resume=True)
    assert str(error.value) == f"{folder / 'state.pt'} was made with normalization = {says}"


def test_settings_from_before_there_was_a_choice_mean_the_backbones_own(small, tmp_path):
    values = {name: value for name, value in small.model_dump().items() if name != "normalization"}
    write_toml(tmp_path / "settings.toml", {"run": values, "command": ""})
    assert resumable(tmp_path).normalization == "backbone"


@pytest.mark.parametrize(
    ("recipe", "name"),
    [
        ("l2p", "unit"),
        ("dualprompt", "unit"),
        ("coda-prompt", "unit"),
        ("cprompt", "imagenet"),
        ("vpt-nsp2", "backbone"),
    ],
)
def test_recipes_for_cifar100_feed_pixels_as_the_authors_did(recipe, name):
    assert plan(recipe, "cifar100")[0].normalization == name
    assert plan(recipe, "cifar100", overrides={"normalization": "half"})[0].normalization == "half"


def test_a_method_without_room_for_all_tasks_is_refused_before_there_is_a_run(tmp_path):
    run, _ = plan(
        "coda-prompt",
        "digits",
        recipe=False,
        overrides={"components": 39, "epochs": 1, "stream": {"per_class": 2, "test_per_class": 1}},
    )
    for _ in range(2):  # the same --out can be given again
        with pytest.raises(ConfigError) as error:
            execute(run, tmp_path / "run")
        assert str(error.value) == (
            "components of all tasks must be orthogonal to each other, so there is room for 192; got 5 tasks of 39, "
            "195 in all: set components=38 or fewer"
        )
        assert not list(tmp_path.glob("run/*"))


def test_a_run_leaves_signals_as_it_found_them(small, tmp_path):
    """Else a notebook that ran lamina can no longer be asked to end."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)]
    try:
        execute(small, tmp_path / "run")
        assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)] == before
    finally:
        for number, handler in zip((signal.SIGTERM, signal.SIGUSR1), before, strict=True):
            signal.signal(number, handler)


def test_the_record_that_is_returned_is_the_one_in_the_folder(small, tmp_path):
    record = execute(small, tmp_path / "run", command="some words")
    assert json.loads((tmp_path / "run" / "results.json").read_text()) == record.as_dict()
    assert record.command == "some words" and record.finished


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("normalisation", "no setting is called 'normalisation'; did you mean 'normalization', a setting of runs?"),
        ("blurry", "blurry is a setting of streams: give it as stream.blurry"),
    ],
)
def test_a_setting_of_runs_or_streams_that_was_given_to_the_method_is_shown_its_place(name, message):
    with pytest.raises(ConfigError) as error:
        plan("l2p", "digits", overrides={name: 1})
    assert str(error.value) == message
