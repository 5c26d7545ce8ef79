"""Bayesian prompt learning: S 6 draws of a context of n 4 words, C 3 and 2 classes, B 7, W 40, F 24."""

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from lamina.backbones.clip import TextSide
from lamina.backbones.clip_text import TextTower
from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.heads.bayes import SampledTextHead, SampledTexts, divergence, mixture
from lamina.heads.text import TextHead
from lamina.heads.texts import ContextTexts
from lamina.learner import Phase
from lamina.methods.bayes_prompt import BayesPrompt
from lamina.training.objective import classify
from tests.backbones.clips import clip, close, tiny_clip, tokenizer
from tests.methods.by_hand import text_by_hand
from tests.streams import blobs, trainer_of

NAMES = ["cat", "lawn mower", "red panda", "aquarium fish", "x"]
LABELS = torch.tensor([0, 4, 2, 1, 3, 0, 2])

conditional = pytest.mark.parametrize("conditional", [False, True])


@pytest.fixture(scope="module")
def side():
    return TextSide(TextTower(clip()), tokenizer(), 20.0)


def head(side, seed=0, bound="mixture", wide=0.5, **settings):
    """A head that has met all classes, its distribution wide and, where images give it, different for each."""
    torch.manual_seed(seed)
    texts = SampledTexts(side, **{"samples": 6, **settings})
    out = SampledTextHead(texts, bound=bound)
    out.begin_task(0, NAMES[:3], [0, 1, 2])
    out.begin_task(1, NAMES[3:], [3, 4])
    with torch.no_grad():
        if texts.per_image:
            for network, scale in ((texts.residual.mean, wide), (texts.residual.log_variance, 1.0)):
                network[-1].weight.normal_(std=scale)
            texts.residual.log_variance[-1].bias.zero_()
        else:
            texts.residual.mean.normal_(std=wide)
            texts.residual.log_variance.normal_()
    return out


def drawn(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def coop_logits(side, images):
    coop = ContextTexts(side, 4, words="a photo of a")
    coop.begin_task(0, NAMES, range(5))
    with torch.no_grad():
        return TextHead(coop)(images).logits


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────


@conditional
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("predict", ["samples", "mean"])
def test_without_spread_it_is_coop(side, conditional, training, predict):
    ours, images = head(side, conditional=conditional, predict=predict).train(training), drawn(7, 24)
    with torch.no_grad():
        for part in ours.texts.residual.parameters():
            part.zero_()
        (ours.texts.residual.log_variance[-1].bias if conditional else ours.texts.residual.log_variance).fill_(-60.0)
        close(ours(images).logits, coop_logits(side, images), 1e-5)


@conditional
def test_scores_are_those_of_the_mean_over_draws_each_written_and_read_by_hand(side, conditional):
    ours, images = head(side, conditional=conditional).eval(), drawn(7, 24)
    texts, expected = ours.texts, []
    for image in images:
        mean, log_variance = texts.residual(image[None])
        likely = []
        for noise in texts.noise:
            context = texts.contexts[0] + (mean.view(40) + log_variance.view(40).exp().sqrt() * noise)
            said = torch.stack([text_by_hand(f"X X X X {name}.", context) for name in NAMES])
            likely.append((20 * said @ F.normalize(image, dim=0)).softmax(0))
        expected.append(torch.stack(likely).mean(0))
    expected = torch.stack(expected).detach()
    close(ours(images).logits.detach().softmax(-1), expected, 1e-5)
    with torch.no_grad():
        close(ours(images).logits.softmax(-1), expected, 1e-5)
        close(torch.cat([ours(image[None]).logits for image in images]).softmax(-1), expected, 1e-5)
    assert (expected - coop_logits(side, images).softmax(-1)).abs().max() > 0.01


def test_the_mean_context_predicts_where_that_is_asked_for(side):
    ours, images = head(side, predict="mean").eval(), drawn(7, 24)
    texts = ours.texts
    with torch.no_grad():
        logits = ours(images).logits
        texts.contexts[0].add_(texts.residual.mean)
        texts.residual.mean.zero_()
        texts.residual.log_variance.fill_(-60.0)
        close(ours(images).logits, logits, 1e-5)
    assert texts.noise.shape == (1, 40) and ours.train()._modules["texts"].draw().shape == (6, 4, 40)


def test_a_mixture_shows_the_mean_of_what_its_parts_show():
    logits = 5 * drawn(6, 7, 5)
    close(mixture(logits).softmax(-1), logits.softmax(-1).mean(0), 1e-6)
    close(mixture(logits).logsumexp(-1), logits.logsumexp(-1).mean(0), 1e-6)
    close(mixture(logits[:1]), logits[0], 1e-6)


# ── draws ────────────────────────────────────────────────────────────────────────────────────────────


@conditional
def test_predictions_take_the_same_draws_always_and_training_takes_new_ones(side, conditional):
    ours, images = head(side, conditional=conditional), drawn(7, 24)
    with torch.no_grad():
        first, second = (ours.eval()(images).logits for _ in range(2))
        assert torch.equal(first, second)
        first, second = (ours.train()(images).logits for _ in range(2))
        assert (first - second).abs().max() > 1e-3
        torch.manual_seed(5)
        again = ours(images).logits
        torch.manual_seed(5)
        assert torch.equal(ours(images).logits, again)


@conditional
def test_draws_come_from_the_seed_and_go_with_the_state(side, conditional):
    ours, theirs = (head(side, seed=seed, conditional=conditional).eval() for seed in (0, 1))
    assert torch.equal(ours.texts.noise, head(side, seed=0, conditional=conditional).texts.noise)
    images = drawn(7, 24)
    with torch.no_grad():
        assert (ours(images).logits - theirs(images).logits).abs().max() > 1e-3
        theirs.load_state_dict(ours.state_dict())
        assert torch.equal(ours(images).logits, theirs(images).logits)


def test_texts_are_computed_once_until_something_moves(side):
    ours, images = head(side).eval(), drawn(7, 24)
    with torch.no_grad():
        ours(images), ours(images[:2])
        assert ours.texts.encoded_classes == 5
        for number, part in enumerate([*ours.texts.residual.parameters(), *ours.texts.contexts, ours.texts.noise]):
            before = ours(images).logits
            part.mul_(1.5)
            assert (ours(images).logits - before).abs().max() > 1e-4
            assert ours.texts.encoded_classes == 5 * (number + 2)


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────


def losses(model, images, columns=(0, 1, 2, 3, 4)):
    """What is minimised, but for the divergence, and the likelihood of each draw, (S, B)."""
    torch.manual_seed(6)
    loss = classify(model(images).logits, LABELS, Task(0, NAMES, list(columns), None, None), Phase(1, 1, None, "seen"))
    torch.manual_seed(6)
    logits = model.scale * model.cosines(images, None)
    return loss, logits.log_softmax(-1)[:, torch.arange(7), LABELS]


@conditional
def test_the_loss_is_of_the_mean_likelihood_over_draws_or_the_mean_of_theirs(side, conditional):
    images, found = drawn(7, 24), {}
    for bound in ("mixture", "elbo"):
        loss, likely = losses(head(side, bound=bound, conditional=conditional).train(), images)
        assert likely.shape == (6, 7) and likely.std(0).max() > 0.01
        slow = -likely.exp().mean(0).log().mean() if bound == "mixture" else -likely.mean()
        close(loss, slow, 1e-5)
        assert loss >= -likely.amax(0).mean()
        found[bound] = loss
    assert found["mixture"] < found["elbo"]


def test_the_gradient_reaches_context_and_distribution_and_no_tower(side):
    ours = head(side).train()
    losses(ours, drawn(7, 24))[0].backward()
    reached = {name for name, p in ours.named_parameters() if p.grad is not None and p.grad.abs().max() > 0}
    assert reached == {"texts.contexts.0", "texts.residual.mean", "texts.residual.log_variance"}


def test_the_divergence_from_the_standard_normal_is_that_of_torch():
    mean, log_variance = drawn(40), 3 * drawn(40).flip(0)
    slow = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(torch.zeros(40), torch.ones(40))).mean()
    torch.testing.assert_close(divergence(mean, log_variance), slow, rtol=1e-6, atol=1e-6)
    assert divergence(torch.zeros(40), torch.zeros(40)) == 0


@conditional
def test_the_divergence_is_a_loss_in_training(side, conditional):
    ours, images = head(side, conditional=conditional, divergence=0.3), drawn(7, 24)
    slow = torch.stack([divergence(*ours.texts.residual(image[None])) for image in images]).mean()
    close(ours.train()(images).terms["divergence"], 0.3 * slow, 1e-6)
    assert ours.eval()(images).terms == {}


# ── the start, previews, settings ────────────────────────────────────────────────────────────────────


def test_it_starts_as_wide_as_words_are_or_as_the_released_code(side):
    torch.manual_seed(0)
    made = {start: SampledTexts(side, start=start).residual for start in ("tokens", "paper")}
    assert all(not part.mean.any() for part in made.values())
    close(made["tokens"].log_variance.exp().sqrt(), torch.full((40,), 0.02))
    paper = made["paper"].log_variance
    assert 0 <= paper.min() < 0.3 and 0.7 < paper.max() <= 1
    for start in ("tokens", "paper"):
        mean, log_variance = SampledTexts(side, start=start, conditional=True).residual(drawn(7, 24))
        alike = (log_variance - log_variance[:1]).abs().max() < 1e-6 and not mean.any()
        assert mean.shape == log_variance.shape == (7, 40) and alike == (start == "tokens")
    close(SampledTexts(side, conditional=True).residual(drawn(1, 24))[1].exp().sqrt(), torch.full((1, 40), 0.02))


@conditional
def test_a_preview_scores_further_classes(side, conditional):
    ours, images = head(side, conditional=conditional).eval(), drawn(7, 24)
    with torch.no_grad():
        before = ours(images).logits
        seen = ours.preview(["cat", "dog"])(images).logits
        assert seen.shape == (7, 6) and torch.equal(ours(images).logits, before)
        close(seen[:, :5].softmax(-1), before.softmax(-1), 0.2)
        ours.begin_task(2, ["dog"], [5])
        close(ours(images).logits, seen, 1e-5)


@conditional
def test_only_context_and_distribution_move(conditional):
    settings = BayesPrompt(words="a photo", samples=2, epochs=1, batch_size=9, conditional=conditional, lr=1.0)
    trainer = trainer_of(settings, tiny_clip())
    model, stream = trainer.learner.model, blobs(tasks=2)
    model.begin_task(stream.tasks[0])
    before = {name: value.clone() for name, value in model.state_dict().items()}
    trainer.learn(stream.tasks[0])
    moved = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert moved and all(name.startswith(("head.texts.contexts.0", "head.texts.residual.")) for name in moved)
    trainer.learn(stream.tasks[1])
    assert len(model.head.texts.contexts) == 1


def test_defaults_are_the_papers_but_for_the_spread_and_the_plan():
    assert BayesPrompt().model_dump() == {
        "negatives": "task",
        "memory": 0,
        "memory_total": 0,
        "choose": "random",
        "balance": 0,
        "epochs": 5,
        "batch_size": 32,
        "lr": 0.002,
        "momentum": 0.9,
        "names": {},
        "words": "a photo of a",
        "length": 4,
        "samples": 10,
        "predict": "samples",
        "conditional": False,
        "start": "tokens",
        "bound": "mixture",
        "divergence": 0.001,
    }


def test_settings_reach_the_texts():
    settings = BayesPrompt(
        words="", length=3, samples=7, predict="mean", conditional=True, start="paper", bound="elbo", divergence=0.2
    )
    head = settings.build(tiny_clip()).model.head
    texts = head.texts
    assert (texts.length, texts.samples, texts.per_image, texts.weight, head.bound) == (3, 7, True, 0.2, "elbo")
    assert texts.residual.mean[-1].weight.any() and texts.noise.shape == (1, 40)
    assert BayesPrompt(words="the picture").build(tiny_clip()).model.head.texts.length == 2


@pytest.mark.parametrize(
    ("settings", "idle"),
    [
        ({}, {"balance", "choose", "length"}),
        ({"words": ""}, {"balance", "choose"}),
        ({"samples": 1}, {"balance", "choose", "length", "bound"}),
    ],
)
def test_settings_that_change_nothing_are_named(settings, idle):
    assert BayesPrompt(**settings).idle().keys() == idle


def test_a_context_that_leaves_no_room_for_a_name_is_refused_when_it_is_built():
    with pytest.raises(ConfigError) as error:
        BayesPrompt(words="", length=74).build(tiny_clip())
    assert str(error.value) == (
        "a text has 77 tokens, so that 73 of them can be learned words; got length=74: take fewer"
    )
