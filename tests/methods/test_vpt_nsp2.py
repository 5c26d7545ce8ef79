"""VPT-NSP²: what the method promises, on a tower so small that every axis has a size of its own.

27 images, N 17 tokens, M 5 prompt tokens, D 24 channels, H 2 heads, L 3 blocks.
"""

import pytest
import torch

from lamina.errors import ConfigError
from lamina.methods.vpt_nsp2 import VPTNSP2
from lamina.model import Batch
from lamina.protections.spectrum import free_directions
from tests.streams import SPEC, blobs, trainer_of

SMALL = VPTNSP2(length=5, epochs=2, batch_size=8, eta=1.0, knee="code", temperature=1.0)


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
        channels = free_directions(null_space.channels(i), "code")
        tokens = free_directions(null_space.attention[i], "code")
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
        "free": SMALL.model_copy(update={"eta": 0.0, "moments": 0.0}),
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
    published = {"length": 4, "eta": 0.97, "moments": 1.0, "temperature": 28.0, "batch_size": 256, "lr": 0.01}
    settings = VPTNSP2()
    assert {name: getattr(settings, name) for name in published} == published
    assert (settings.epochs, settings.weight_decay, settings.knee) == (100, 5e-5, "paper")
    (phase,) = settings.phases(stream.tasks[0])
    factors = [phase.schedule(epoch / 10) for epoch in range(10)]
    assert factors == pytest.approx([1, 1, 1, 1, 1, 0.1, 0.1, 0.1, 0.01, 0.01])
    assert phase.classes == "task"


@pytest.mark.parametrize(
    ("setting", "value", "message"),
    [
        ("eta", 1.5, "VPTNSP2.eta must be between 0 and 1; got 1.5"),
        ("length", 2, "VPTNSP2.length must be at least 3; got 2"),
        ("epochs", "ten", "VPTNSP2.epochs must be a whole number; got 'ten' (str)"),
        ("knee", "best", "VPTNSP2.knee must be 'paper' or 'code'; got 'best'"),
        (
            "etaa",
            1.0,
            "VPTNSP2: no setting is called 'etaa'; did you mean 'eta'? Known: batch_size, epochs, eta, knee, length, "
            "lr, moments, temperature, weight_decay",
        ),
    ],
)
def test_a_wrong_setting_says_what_would_be_right(setting, value, message):
    with pytest.raises(ConfigError) as error:
        VPTNSP2(**{setting: value})
    assert str(error.value) == message


def test_the_feed_of_these_tests_shows_images_of_the_towers_size(tiny_vit):
    assert SPEC.size == 32 and tiny_vit.model.patch_embed.img_size == (32, 32)
