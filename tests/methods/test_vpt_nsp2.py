"""VPT-NSP²: what the method promises, on a tower so small that every axis has a size of its own.

27 images, N 17 tokens, M 5 prompt tokens, D 24 channels, H 2 heads, L 3 blocks.
"""

import pytest
import torch

from lamina.errors import ConfigError
from lamina.methods.vpt_nsp2 import VPTNSP2
from lamina.model import Batch
from lamina.protections.projector import Blend
from lamina.protections.spectrum import Cut
from tests.streams import SPEC, blobs, trainer_of

CHEAP = {"length": 5, "epochs": 2, "batch_size": 8, "temperature": 1.0}
SMALL = VPTNSP2(**CHEAP, eta1=1.0, eta2=1.0, knee="code")


@pytest.fixture
def stream():
    return blobs(tasks=2, per_task=3)


@pytest.fixture
def after_one_task(tiny_vit, stream):
    """A trainer whose learner has finished the first of two tasks."""
    trainer = trainer_of(SMALL, tiny_vit)
    trainer.learn(stream.tasks[0])
    return trainer


def parts(trainer):
    """The learner's prompts and protections, by name."""
    null_space, moments = trainer.learner.protections
    return trainer.learner.model.prompts, null_space, moments


def images_of(trainer, task):
    return torch.cat([batch.images for batch in trainer.feed.plain(task.train)])


# ── promises of the method ───────────────────────────────────────────────────────────────────────────


def test_the_first_task_is_free(tiny_vit):
    """Before any task is over there is nothing to protect."""
    null_space, moments = SMALL.build(tiny_vit).protections
    assert null_space.projections() == {}
    assert moments.terms(model=None) == {}


def test_the_first_task_is_learned_to_the_bit_as_without_protection(after_one_task, tiny_vit, stream):
    """Same prompts, same head; the protections neither act nor draw random numbers."""
    bare = trainer_of(SMALL, tiny_vit)
    bare.learner.protections = []
    bare.learn(stream.tasks[0])
    ours, theirs = (trainer.learner.model.learned() for trainer in (after_one_task, bare))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert torch.equal(value, theirs[name]), name


def test_a_step_has_no_part_that_old_images_use(after_one_task):
    """Whatever Adam proposes, what it takes is blind to the used channels and to the used tokens."""
    prompts, null_space, _ = parts(after_one_task)
    before = {i: prompts.value(i).detach().clone() for i in prompts.layers}
    optimizer = torch.optim.Adam(prompts.parameters(), lr=0.01)
    with null_space.guard(optimizer):
        sum(p.square().sum() for p in prompts.parameters()).backward()
        optimizer.step()
    for i in prompts.layers:
        step = (prompts.value(i).detach() - before[i]).double()  # (M, D)
        channels, tokens = (null_space.spectra(i)[side].free(Cut(knee="code")) for side in ("channels", "tokens"))
        assert step.norm() > 1e-4
        assert (step - step @ channels @ channels.T).norm() < 1e-4 * step.norm()
        assert (step - tokens @ tokens.T @ step).norm() < 1e-4 * step.norm()


def test_what_is_kept_of_old_images(after_one_task, stream, tiny_vit):
    """The two second moments of block 0, against their definition, from timm's own weights."""
    prompts, null_space, _ = parts(after_one_task)
    vit, block = tiny_vit.model, tiny_vit.model.blocks[0]
    query_weight, key_weight, _ = block.attn.qkv.weight.split(24)
    query_bias, key_bias, _ = block.attn.qkv.bias.split(24)
    channels, tokens = torch.zeros(24, 24), torch.zeros(5, 5)
    with torch.no_grad():
        for image in images_of(after_one_task, stream.tasks[0]):
            frozen = block.norm1(vit._pos_embed(vit.patch_embed(image[None])))[0]  # (17, 24)
            everything = torch.cat([frozen, block.norm1(prompts.value(0))])  # (22, 24)
            for head in (slice(0, 12), slice(12, 24)):
                q = frozen @ query_weight[head].T + query_bias[head]
                k = everything @ key_weight[head].T + key_bias[head]
                to_prompts = (q @ k.T / 12**0.5).softmax(-1)[:, 17:]  # (17, 5)
                channels += (q @ key_weight[head]).T @ (q @ key_weight[head])
                tokens += to_prompts.T @ to_prompts
    torch.testing.assert_close(null_space.channels(0).float(), channels, rtol=1e-4, atol=1e-3)
    torch.testing.assert_close(null_space.attention[0].float(), tokens, rtol=1e-4, atol=1e-3)


def test_every_block_is_looked_back_on_the_last_one_too(after_one_task):
    """The last block computes only the class token's row, yet all its queries count."""
    _, null_space, _ = parts(after_one_task)
    assert sorted(null_space.queries) == [0, 1, 2]
    rank = torch.linalg.matrix_rank(null_space.queries[2])
    assert rank.tolist() == [12, 12]


def test_old_images_feel_a_protected_step_less(after_one_task, stream):
    """Per unit of length, a projected step moves old features under half as far as a free one."""
    prompts, null_space, _ = parts(after_one_task)
    model, old = after_one_task.learner.model, Batch(images_of(after_one_task, stream.tasks[0]))
    moved = {}
    with torch.no_grad():
        rest = model.features(old)[0]
        for name, projections in {"free": {}, "protected": null_space.projections()}.items():
            torch.manual_seed(3)
            steps = {p: 0.01 * torch.randn_like(p) for p in prompts.parameters()}
            steps = {p: projections[p](s) if p in projections else s for p, s in steps.items()}
            for p, s in steps.items():
                p += s
            length = sum(s.square().sum() for s in steps.values()).sqrt()
            moved[name] = (model.features(old)[0] - rest).norm() / length
            for p, s in steps.items():
                p -= s
    assert moved["protected"] < 0.5 * moved["free"]


def test_moments_pull_back_to_the_last_task(after_one_task):
    """The loss is zero where the last task ended, and grows when a prompt's mean or scale drifts."""
    prompts, _, moments = parts(after_one_task)
    assert moments.terms(after_one_task.learner.model)["moments"] == 0
    with torch.no_grad():
        prompts.value(0).mul_(2.0)
    assert moments.terms(after_one_task.learner.model)["moments"] > 0


def test_heads_are_not_projected(after_one_task, stream):
    """Prompts alone are protected: every other parameter moves as Adam says."""
    prompts, null_space, _ = parts(after_one_task)
    assert set(null_space.projections()) == set(prompts.parameters())


def test_a_second_task_moves_the_prompts_and_leaves_the_old_head(after_one_task, stream):
    prompts, _, _ = parts(after_one_task)
    before = {name: value.clone() for name, value in after_one_task.learner.model.learned().items()}
    after_one_task.learn(stream.tasks[1])
    after = after_one_task.learner.model.learned()
    for name, value in before.items():
        assert torch.equal(value, after[name]) == name.startswith("head."), name


def test_it_forgets_less_than_the_same_prompts_without_protection(tiny_vit, stream):
    """Drift of old features over a second task, at the same settings."""
    drift = {}
    for name, settings in {
        "protected": SMALL,
        "free": SMALL.model_copy(update={"eta1": 0.0, "eta2": 0.0, "moments": 0.0}),
    }.items():
        trainer = trainer_of(settings, tiny_vit)
        trainer.learn(stream.tasks[0])
        old = Batch(images_of(trainer, stream.tasks[0]))
        before = trainer.learner.model.features(old)[0].detach()
        trainer.learn(stream.tasks[1])
        drift[name] = (trainer.learner.model.features(old)[0] - before).norm().item()
    assert drift["protected"] < 0.5 * drift["free"]


# ── settings ─────────────────────────────────────────────────────────────────────────────────────────


def test_defaults_are_the_papers(stream):
    """Ten tasks of CIFAR-100 on a ViT-B/16: table and text of Lu et al."""
    settings = VPTNSP2()
    assert settings.model_dump() == {
        "length": 4, "epochs": 100, "batch_size": 256, "lr": 0.01, "weight_decay": 5e-5, "temperature": 28.0,
        "head": "linear", "layers": 1, "eta1": 0.97, "eta2": 0.97, "use_b1": True, "use_b2": True, "use_ln_loss": True,
        "moments": 1.0, "knee": "paper", "kept": 0.99, "multiple": 10.0, "normalize": True, "gain_control": False,
        "ln_correction": "none", "center": False, "parity": "paper",
    }  # fmt: skip
    (phase,) = settings.phases(stream.tasks[0])
    factors = [phase.schedule(epoch / 10) for epoch in range(10)]
    assert factors == pytest.approx([1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    assert (phase.classes, phase.epochs, phase.repeat) == ("task", 100, 1)


def sides(trainer, tower, **changes):
    """Left and right factor of block 1 under other settings, with the prompts and sums of a finished task."""
    prompts, null_space, _ = parts(trainer)
    learner = SMALL.model_copy(update=changes).build(tower)
    learner.model.prompts.load_state_dict(prompts.state_dict())
    other = learner.protections[0]
    other.load_state_dict(null_space.state_dict())
    projection = other.projections()[other.prompts.value(1)]
    return projection.left, projection.right


@pytest.mark.parametrize(
    ("changes", "left", "right"),
    [
        ({"eta1": 0.5}, "same", "other"),
        ({"eta2": 0.5}, "other", "same"),
        ({"use_b1": False}, "same", None),
        ({"use_b2": False}, None, "same"),
        ({"knee": "paper"}, "other", "other"),
        ({"knee": "energy", "kept": 0.9999999}, "other", "other"),
        ({"knee": "multiple", "multiple": 1e9}, "other", "other"),
        ({"normalize": False}, "other", "other"),
        ({"gain_control": True}, "other", "other"),
        ({"ln_correction": "affine"}, "other", "other"),
        ({"center": True}, "same", "other"),
    ],
    ids=str,
)
def test_a_setting_changes_the_factor_it_speaks_of_and_no_other(after_one_task, tiny_vit, changes, left, right):
    for block in tiny_vit.model.blocks:  # else its norms would do nothing but normalise
        block.norm1.weight.data = torch.linspace(0.1, 3, 24)
    usual = sides(after_one_task, tiny_vit)
    for found, ours, expected in zip(sides(after_one_task, tiny_vit, **changes), usual, (left, right), strict=True):
        said = None if found is None else "same" if torch.allclose(found, ours, rtol=0, atol=1e-4) else "other"
        assert said == expected


def test_the_numbers_of_a_rule_are_those_of_the_settings(tiny_vit):
    given = {"kept": 0.875, "multiple": 3.5, "eta1": 0.25, "eta2": 0.75, "normalize": False, "gain_control": True}
    for knee in ("paper", "code", "energy", "multiple"):
        null_space = VPTNSP2(knee=knee, **given).build(tiny_vit).protections[0]
        assert null_space.cut == Cut(knee=knee, kept=0.875, multiple=3.5)
        assert null_space.blends == {
            "channels": Blend(eta=0.25, normalize=False, gain_control=True),
            "tokens": Blend(eta=0.75, normalize=False, gain_control=True),
        }


@pytest.mark.parametrize(("changes", "weight"), [({}, 1.0), ({"moments": 0.5}, 0.5), ({"use_ln_loss": False}, 0.0)])
def test_the_loss_on_moments_has_its_weight_and_can_be_left_out(after_one_task, tiny_vit, changes, weight):
    moments = SMALL.model_copy(update=changes).build(tiny_vit).protections[1]
    moments.end_look(lambda total: total)
    with torch.no_grad():
        for value in moments.prompts.parameters():
            value.add_(0.25)
    terms = moments.terms(model=None)
    assert {name: term.item() for name, term in terms.items()} == (
        {"moments": pytest.approx(weight * 3 * 0.25, rel=1e-5)} if weight else {}
    )


# ── parity with the released code ────────────────────────────────────────────────────────────────────


def test_official_decays_after_four_and_seven_of_ten_passes_over_ten_shuffled_together(stream):
    settings = VPTNSP2(parity="official")
    (phase,) = settings.phases(stream.tasks[0])
    assert (phase.epochs, phase.repeat, phase.batch_size, phase.classes) == (10, 10, 256, "task")
    for count in (10, 1960):  # steps of a task
        factors = [phase.schedule(step / count) for step in range(0, count, count // 10)]
        assert factors == pytest.approx([1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01, 0.01])


@pytest.mark.parametrize("cached", [False, True])
def test_official_counts_the_steps_of_images_or_features_repeated_ten_times(tiny_vit, stream, cached):
    for parity, steps in (("official", 2 * 34), ("paper", 20 * 4)):  # 27 images, 8 at a time
        settings = VPTNSP2(**CHEAP | {"epochs": 20}, parity=parity)
        trainer = trainer_of(settings, tiny_vit)
        trainer.feed.features = tiny_vit if cached else None
        (phase,) = settings.phases(stream.tasks[0])
        fed = list(trainer.feed.train(stream.tasks[0], 0, phase, 0))
        assert trainer.feed.steps(stream.tasks[0].train, phase) == len(fed) == steps
        assert sum(each.images for each in fed) == 20 * 27


@pytest.mark.parametrize("head", ["linear", "statistics"])
def test_official_cuts_by_value_sums_means_of_batches_and_starts_heads_as_the_code_does(tiny_vit, head):
    learner = VPTNSP2(parity="official", kept=0.5, head=head).build(tiny_vit)
    null_space, _ = learner.protections
    assert null_space.cut == Cut(knee="official", kept=0.5) and null_space.batch_means
    layers = learner.model.head if head == "linear" else learner.model.head.trained
    assert layers.start == "released"
    plain = VPTNSP2(head=head).build(tiny_vit)
    assert not plain.protections[0].batch_means
    assert (plain.model.head if head == "linear" else plain.model.head.trained).start == "small"


def test_official_goes_through_two_tasks_and_warms_the_second_head(tiny_vit, stream):
    trainer = trainer_of(VPTNSP2(**CHEAP | {"epochs": 10}, parity="official"), tiny_vit)
    trainer.learn(stream.tasks[0])
    first = trainer.learner.model.head.blocks[0].weight.clone()
    trainer.learner.model.begin_task(stream.tasks[1])
    assert torch.equal(trainer.learner.model.head.blocks[1].weight, first)
    assert trainer.learner.protections[0].rows == 5  # 27 images in batches of 6


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, {"kept", "multiple"}),
        ({"knee": "energy"}, {"multiple"}),
        ({"knee": "multiple"}, {"kept"}),
        ({"use_b1": False}, {"kept", "multiple", "eta1", "center"}),
        ({"use_b2": False}, {"kept", "multiple", "eta2"}),
        (
            {"use_b1": False, "use_b2": False},
            {"kept", "multiple", "eta1", "eta2", "center", "ln_correction", "normalize", "knee"},
        ),
    ],
)
def test_settings_that_change_nothing_are_known(settings, idle):
    assert set(VPTNSP2(**settings).idle()) == idle


def test_official_settings_come_back_from_what_is_saved():
    settings = VPTNSP2(parity="official", epochs=50)
    assert settings.knee == "code" and VPTNSP2(**settings.model_dump()) == settings
    assert VPTNSP2(parity="official", knee="code", epochs=50) == settings


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"eta1": 1.5}, "VPTNSP2.eta1 must be between 0 and 1; got 1.5"),
        ({"eta2": -0.1}, "VPTNSP2.eta2 must be between 0 and 1; got -0.1"),
        ({"kept": 1.1}, "VPTNSP2.kept must be between 0 and 1; got 1.1"),
        ({"multiple": 0.5}, "VPTNSP2.multiple must be at least 1.0; got 0.5"),
        ({"length": 2}, "VPTNSP2.length must be at least 3; got 2"),
        ({"epochs": "ten"}, "VPTNSP2.epochs must be a whole number; got 'ten' (str)"),
        ({"knee": "best"}, "VPTNSP2.knee must be 'paper', 'code', 'energy' or 'multiple'; got 'best'"),
        ({"knee": "official"}, "VPTNSP2.knee must be 'paper', 'code', 'energy' or 'multiple'; got 'official'"),
        (
            {"parity": "official", "knee": "paper"},
            'knee must be left out or "code" with parity="official"; got \'paper\'',
        ),
        ({"parity": "official", "epochs": 25}, 'epochs must be a multiple of 10 with parity="official"; got 25'),
        (
            {"eta": 1.0},
            "VPTNSP2: no setting is called 'eta'; did you mean 'eta2'? Known: batch_size, center, epochs, eta1, eta2, "
            "gain_control, head, kept, knee, layers, length, ln_correction, lr, moments, multiple, normalize, parity, "
            "temperature, use_b1, use_b2, use_ln_loss, weight_decay",
        ),
    ],
    ids=str,
)
def test_a_wrong_setting_says_what_would_be_right(values, message):
    with pytest.raises(ConfigError) as error:
        VPTNSP2(**values)
    assert str(error.value) == message


def test_the_feed_of_these_tests_shows_images_of_the_towers_size(tiny_vit):
    assert SPEC.size == 32 and tiny_vit.model.patch_embed.img_size == (32, 32)
