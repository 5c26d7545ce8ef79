"""CLAP's head: B 7, C 6 in tasks of 3, 1 and 2, S 5 draws, 4 templates, W 40, F 24, scale 20."""

import copy

import pytest
import torch
from torch.distributions import Normal, kl_divergence
from torch.nn import functional as F

from lamina.backbones.clip import TextSide
from lamina.backbones.clip_text import TextTower
from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.heads.attributes import AttributeTexts
from lamina.heads.clap import ClapHead, anchor
from lamina.heads.encoders import Encoders
from lamina.heads.guidance import Guidance
from lamina.heads.texts import ContextTexts, EachText
from lamina.learner import Phase
from lamina.training.objective import classify
from tests.backbones.clips import clip, close, tokenizer

TASKS = [(["cat", "lawn_mower", "red panda"], [0, 1, 2]), (["x"], [3]), (["aquarium fish", "snow"], [4, 5])]
NAMES = [name for names, _ in TASKS for name in names]
TASK_OF = [0, 0, 0, 1, 2, 2]
TEMPLATES = ["a photo of a {}.", "the {}, small", "a bad painting of the {}", "{}"]
LABELS = torch.tensor([4, 0, 2, 5, 1, 3, 0])
SEEN = Task(0, NAMES, list(range(6)), None, None)

every_context = pytest.mark.parametrize("context", ["image", "batch", "none"])


@pytest.fixture(scope="module")
def side():
    return TextSide(TextTower(clip()), tokenizer(), 20.0)


def drawn(*shape, seed=2):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


class Remembered(EachText):
    """Texts that are read once for all tests."""

    rows = {}

    def encode_each(self, columns):
        keys = [(self.classes[column], *self.templates) for column in columns]
        for key, column in zip(keys, columns, strict=True):
            if key not in self.rows:
                with torch.inference_mode(False), torch.no_grad():
                    self.rows[key] = super().encode_each([column])[0]
        return torch.stack([self.rows[key] for key in keys])


def made(side, *, texts=None, context="image", normed=False, spread=True, shared=False, templates=TEMPLATES, **options):
    torch.manual_seed(0)
    kind = {"coop": ContextTexts, "attriclip": AttributeTexts}.get(texts)
    lengths = {"coop": {"length": 3}, "attriclip": {"size": 4, "top": 2, "length": 3}}.get(texts, {})
    guidance = Guidance(24, 3, hidden=40, context=context) if context else None
    encoders = Encoders(24, normed=normed, learns_spread=spread, shared=shared)
    return ClapHead(
        kind(side, **lengths) if kind else None,
        Remembered(side, templates),
        options.pop("guidance", guidance),
        options.pop("encoders", encoders),
        **{"samples": 5, **options},
    )


def met(side, tasks=3, **options):
    """A head that has met three tasks, at rest, whose encoders tell classes and channels apart."""
    head = made(side, **options)
    for index, (names, columns) in enumerate(TASKS[:tasks]):
        head.begin_task(index, names, columns)
    torch.manual_seed(7)
    with torch.no_grad():
        for encoder in head.encoders.tasks if head.encoders is not None else ():
            encoder.mean.weight.normal_(std=0.1)
            if encoder.spread is not None:
                encoder.spread.weight.normal_(std=0.2)
        for name, value in head.texts.named_parameters():
            if "contexts" in name or "prompts" in name:
                value.normal_(std=0.5)
            if name == "keys":
                value.normal_()
    return head.eval()


@torch.no_grad()
def parts_by_hand(head, features):
    """What each class is around, and the mean and deviation of its draws, (B, C, F) each: a loop over everything."""
    images, rows = F.normalize(features, dim=-1), ([], [], [])
    said = head.bank.encode_each(range(6))
    for place, image in enumerate(images):
        if head.texts is head.bank:
            names = torch.stack([F.normalize(sum(each) / 4, dim=0) for each in said])
        elif head.texts.per_image:
            names = head.texts.of_images(features[[place]])[0]
        else:
            names = head.texts(range(6))
        around = torch.zeros(6, 24)
        for column, task in enumerate(TASK_OF):
            own = [other for other in range(6) if TASK_OF[other] == task]
            v = torch.zeros(len(own), 24)
            if head.guidance is not None and head.guidance.context != "none":
                seen = image[None] if head.guidance.context == "image" else images
                v = head.guidance.layer(names[own][None], seen[None])[0]
            elif head.guidance is not None:
                v = head.guidance(names[own], images, torch.zeros(len(own), len(own), dtype=torch.bool))[0]
            around[column] = names[column] + v[own.index(column)]
        rows[0].append(around)
        encoders = [head.encoders.tasks[0 if head.encoders.shared else task] for task in TASK_OF]
        inside = [(e.mean_norm(x) if e.mean_norm else x, e.spread_norm(x) if e.spread_norm else x)
                  for e, x in zip(encoders, around, strict=True)]  # fmt: skip
        rows[1].append(torch.stack([e.mean(x) for e, (x, _) in zip(encoders, inside, strict=True)]))
        if encoders[0].spread is not None:
            raw = torch.stack([e.spread(x) for e, (_, x) in zip(encoders, inside, strict=True)])
            rows[2].append(0.999 * F.softplus(raw) + 0.001)
    return tuple(torch.stack(row) if row else None for row in rows)


@torch.no_grad()
def scores_by_hand(head, features, noise):
    """Logits (S, B, C), one draw, one image and one class at a time."""
    around, mean, spread = parts_by_hand(head, features)
    out = torch.zeros(len(noise), len(features), 6)
    for s in range(len(noise)):
        for b in range(len(features)):
            for k in range(6):
                z = mean[b, k] + spread[b, k] * noise[s, k]
                seen = F.normalize(around[b, k] + z, dim=0) if head.cosine else around[b, k] + z
                out[s, b, k] = 20 * F.normalize(features[b], dim=0) @ seen
    return out


def learning(head):
    """In training, but for the attention, which drops nothing then."""
    if head.guidance is not None:
        head.guidance.requires_grad_(False)
    return head.train()


# ── scores ───────────────────────────────────────────────────────────────────────────────────────────


@every_context
@pytest.mark.parametrize("options", [{}, {"normed": True}, {"shared": True}, {"texts": "coop"}, {"cosine": True}])
def test_scores_are_those_of_draws_one_by_one(side, context, options):
    """In training new draws for every class, the same for all images; else those of the head."""
    head, features = met(side, context=context, **options), 3 * drawn(7, 24)
    with torch.no_grad():
        slow = scores_by_hand(head, features, head.noise(features.device))
        assert slow.std(0).max() > 1
        close(head.samples_of(features), slow)
        close(head(features).logits, slow.mean(0))
        head.average = "probabilities"
        close(head(features).logits.softmax(-1), slow.softmax(-1).mean(0))
        torch.manual_seed(5)
        found = learning(head)(features, LABELS).logits
        torch.manual_seed(5)
        noise = torch.randn(5, 6, 24)
        close(found, scores_by_hand(head, features, noise))


def test_texts_that_depend_on_the_image_are_read_for_each(side):
    head, features = met(side, texts="attriclip"), 3 * drawn(7, 24)
    with torch.no_grad():
        slow = scores_by_hand(head, features, head.noise(features.device))
        close(head.samples_of(features), slow)
        scores = head(features)
    close(scores.logits, slow.mean(0))
    assert len(scores.chosen.unique(dim=0)) > 1 and torch.equal(scores.chosen, head.texts.choose(features))
    assert head.pool_size == 4 and torch.equal(learning(head)(features).chosen, scores.chosen)
    assert met(side)(features).chosen is None


def test_draws_without_limit_have_the_mean_that_is_predicted_in_closed_form(side):
    head, features = met(side, samples=4000), 3 * drawn(7, 24)
    with torch.no_grad():
        around, mean, spread = parts_by_hand(head, features)
        images = F.normalize(features, dim=-1)
        limit = 20 * torch.einsum("bf,bcf->bc", images, around + mean)
        error = 20 * (images[:, None] * spread).square().sum(-1).sqrt() / 4000**0.5
        off = (head(features).logits - limit) / error
        assert off.abs().max() < 4.5 and off.std() > 0.5
        head.mc = "mean"
        close(head(features).logits, limit)
        head.average = "probabilities"
        close(head(features).logits, limit)


def test_cosines_of_means_alone_are_cosines_and_no_longer_than_the_scale(side):
    head, features = met(side, cosine=True, spread=False), 3 * drawn(7, 24)
    with torch.no_grad():
        around, mean, _ = parts_by_hand(head, features)
        expected = 20 * F.cosine_similarity(features[:, None], around + mean, dim=-1)
        close(head(features).logits, expected)
    assert expected.abs().max() <= 20


def test_cosines_have_no_mean_in_closed_form(side):
    with pytest.raises(ConfigError, match='take mc="sample" or cosine=false'):
        made(side, cosine=True, mc="mean")
    assert made(side, cosine=True, mc="mean", spread=False).mc == "mean"


def test_without_a_spread_draws_are_the_deterministic_variant(side, monkeypatch):
    monkeypatch.setattr("lamina.heads.encoders.LEAST", 0.0)
    head, plain, features = met(side), met(side, spread=False), 3 * drawn(7, 24)
    with torch.no_grad():
        for ours, theirs in zip(head.encoders.tasks, plain.encoders.tasks, strict=True):
            theirs.mean.load_state_dict(ours.mean.state_dict())
            ours.spread.weight.zero_()
            ours.spread.bias.fill_(-100.0)
        plain.guidance.load_state_dict(head.guidance.state_dict())
        expected = plain(features).logits
        close(head(features).logits, expected)
        close(head.samples_of(features), expected.expand(5, -1, -1))
        assert plain.samples_of(features) is None and learning(plain)(features).logits.shape == (7, 6)
    assert head.sampling and not plain.sampling
    assert learning(plain)(features).terms.keys() == {"language"}


def test_without_encoders_a_class_is_what_it_becomes_by_looking(side):
    head, features = met(side, encoders=None), 3 * drawn(7, 24)
    images, names = F.normalize(features, dim=-1), head.named(features)
    block = torch.tensor([[one != other for other in TASK_OF] for one in TASK_OF])
    expected = 20 * torch.einsum("bf,bcf->bc", images, names + head.guidance(names, images, block))
    close(head(features).logits, expected)
    scores = learning(head)(features)
    close(scores.logits, expected)
    assert scores.terms == {} and head.samples_of(features) is None and not head.sampling


def test_without_guidance_nothing_is_added_to_what_the_text_tower_says(side):
    head, features = met(side, context=None), 3 * drawn(7, 24)
    with torch.no_grad():
        close(head(features).logits, scores_by_hand(head, features, head.noise(features.device)).mean(0))


# ── draws ────────────────────────────────────────────────────────────────────────────────────────────


def test_draws_of_a_prediction_depend_on_the_place_of_a_class_alone(side):
    one, other = met(side), met(side, tasks=1)
    torch.manual_seed(4711)
    device = torch.device("cpu")
    early = other.noise(device).clone()
    assert early.shape == (5, 3, 24) and torch.equal(one.noise(device)[:, :3], early)
    assert torch.equal(one.noise(device), one.noise(device)) and one.noise(device).flatten().unique().numel() == 720
    assert one.noise(device).mean().abs() < 0.15 and abs(one.noise(device).std() - 1) < 0.1
    first, second = (one.train().noise(device) for _ in range(2))
    assert (first - second).abs().min() > 0


def test_what_a_prediction_draws_where_nothing_is_recorded_serves_where_something_is(side):
    head, features = met(side), 3 * drawn(7, 24)
    with torch.inference_mode():
        before = head(features).logits.clone()
    after = head(features).logits
    after.sum().backward()
    close(after.detach(), before, 1e-6)
    head.samples_of(features).sum().backward()


# ── which images matter ──────────────────────────────────────────────────────────────────────────────


@every_context
@torch.no_grad()
def test_a_prediction_depends_on_other_images_where_names_look_at_a_batch_and_nowhere_else(side, context):
    head, features = met(side, context=context), 3 * drawn(7, 24)
    whole, order = head(features).logits, torch.tensor([3, 0, 6, 2, 1, 5, 4])
    close(head(features[order]).logits, whole[order])
    alone = torch.cat([head(row[None]).logits for row in features])
    assert head.transductive == (context == "batch") == bool((alone - whole).abs().max() > 1e-2)
    if context != "batch":
        close(alone, whole)


@every_context
def test_images_go_a_few_at_a_time_where_they_do_not_look_at_one_another(side, monkeypatch, context):
    head, features, sizes = met(side, context=context), 3 * drawn(7, 24), []
    with torch.no_grad():
        whole = head(features).logits
        monkeypatch.setattr("lamina.heads.clap.TOGETHER", 13)
        predicted = head.predicted
        head.predicted = lambda some: sizes.append(len(some)) or predicted(some)
        close(head(features).logits, whole)
    assert sizes == ([7] if context == "batch" else [2, 2, 2, 1])


# ── growing ──────────────────────────────────────────────────────────────────────────────────────────


@every_context
@pytest.mark.parametrize("average", ["logits", "probabilities"])
@torch.no_grad()
def test_a_task_that_begins_leaves_the_scores_of_earlier_classes_as_they_are(side, context, average):
    head, features = met(side, tasks=2, context=context), 3 * drawn(7, 24)
    before, draws = head(features).logits, head.samples_of(features)
    head.begin_task(2, *TASKS[2])
    after = head.eval()(features).logits
    assert before.shape == (7, 4) and after.shape == (7, 6)
    close(after[:, :4], before, 1e-6)
    close(head.samples_of(features)[..., :4], draws, 1e-6)


@pytest.mark.parametrize("start", ["language", "zero", "default"])
def test_only_the_encoder_of_the_new_task_starts_and_as_it_is_told(side, start):
    head = met(side, tasks=2, start=start)
    before = copy.deepcopy(head.encoders.state_dict())
    torch.manual_seed(5)
    head.begin_task(2, *TASKS[2])
    after, new = head.encoders.state_dict(), head.encoders.tasks[2]
    assert all(torch.equal(value, after[name]) for name, value in before.items()) and len(after) == 12
    said = head.bank.encode_each(range(6))  # of all classes met, not of the new ones alone
    if start == "language":
        means, variances = said.mean(1), said.var(1)
        close(new.mean.weight, means.T @ means / 24, 1e-6)
        torch.testing.assert_close(new.spread.weight, variances.T @ variances / 24, rtol=1e-4, atol=1e-10)
    elif start == "zero":
        assert not new.mean.weight.any() and not new.spread.weight.any()
    else:
        torch.manual_seed(5)
        plain = Encoders(24)
        plain.grow()
        assert torch.equal(new.mean.weight, plain.tasks[0].mean.weight)
        assert torch.equal(new.spread.weight, plain.tasks[0].spread.weight)


def test_one_encoder_for_all_starts_once(side):
    head = met(side, tasks=1, shared=True)
    before = copy.deepcopy(head.encoders.state_dict())
    for index in (1, 2):
        head.begin_task(index, *TASKS[index])
    after = head.encoders.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(value, after[name]) for name, value in before.items())


def test_a_task_of_classes_that_were_met_brings_no_encoder(side):
    head, features = met(side), 3 * drawn(7, 24)
    before = head(features).logits
    head.begin_task(3, ["x", "cat"], [3, 0])
    assert len(head.encoders.tasks) == 3 and torch.equal(head(features).logits, before)
    head.begin_task(4, ["snow", "dog"], [5, 6])
    assert len(head.encoders.tasks) == 4 and head.eval()(features).logits.shape == (7, 7)


@pytest.mark.parametrize("options", [{"start": "zero"}, {"start": "default"}, {"spread": False}, {"encoders": None}])
def test_one_template_is_enough_where_no_variance_is_asked_for(side, options):
    head, features = made(side, templates=["{}"], **options), 3 * drawn(7, 24)
    for index, (names, columns) in enumerate(TASKS):
        head.begin_task(index, names, columns)
    scores = learning(head)(features, LABELS)
    assert all(torch.isfinite(value).all() for value in (scores.logits, *scores.terms.values()))
    assert torch.isfinite(head.eval()(features).logits).all()


def test_one_template_has_no_variance_to_start_from(side):
    with pytest.raises(ConfigError) as error:
        made(side, templates=["a photo of a {}."])
    assert str(error.value) == (
        "encoders start from the variance of what templates say of a class, which takes two templates; got "
        "'a photo of a {}.' alone: give more, or another start"
    )


# ── losses ───────────────────────────────────────────────────────────────────────────────────────────


@torch.no_grad()
def losses_by_hand(head, features, noise, divergent, anchored):
    """The divergence and the language-aware loss, over tasks, images, draws, templates and classes."""
    _, mean, spread = parts_by_hand(head, features)
    said, terms = head.bank.encode_each(range(6)), {"divergence": 0.0, "language": 0.0}
    for task in range(3):
        own = [column for column in range(6) if TASK_OF[column] == task]
        for b in range(len(features)):
            if task in divergent:
                each = kl_divergence(Normal(mean[b, own], spread[b, own]), Normal(torch.zeros(24), torch.ones(24)))
                terms["divergence"] += 0.3 * each.sum(-1).mean() / len(features)
            if task in anchored:
                rows = torch.zeros(len(own), len(own))
                for i, a in enumerate(own):
                    for j, k in enumerate(own):
                        products = [u @ (mean[b, k] + spread[b, k] * e) for u in said[a] for e in noise[:, k]]
                        rows[i, j] = sum(products) / len(products)
                terms["language"] += 4.0 * F.cross_entropy(rows, torch.arange(len(own))) / len(features)
    return terms


@every_context
@pytest.mark.parametrize(
    ("anchored", "moves", "divergent", "tasks"),
    [
        ("learning", "newest", [2], [2]),
        ("learning", "all", [0, 1, 2], [0, 1, 2]),
        ("past", "newest", [2], [0, 1]),
        ("all", "newest", [2], [0, 1, 2]),
    ],
)
def test_losses_are_those_of_each_draw_template_and_image(side, context, anchored, moves, divergent, tasks):
    """With one task learning or all of them; a class alone in its task has nobody to be told from."""
    head = learning(met(side, context=context, anchored=anchored, weights=(0.3, 4.0)))
    if moves == "all":
        head.encoders.requires_grad_(True)
    features = 3 * drawn(7, 24)
    torch.manual_seed(5)
    scores = head(features, LABELS)
    torch.manual_seed(5)
    noise = torch.randn(5, 6, 24)
    expected = losses_by_hand(head, features, noise, divergent, tasks)
    assert scores.terms.keys() == expected.keys()
    close(scores.terms["divergence"], expected["divergence"])
    close(scores.terms["language"], expected["language"])
    loss = classify(scores.logits, LABELS, SEEN, Phase(1, 1, None, "seen"))
    slow = scores_by_hand(head, features, noise)
    parts = [-slow[s, b].log_softmax(-1)[LABELS[b]] for s in range(5) for b in range(7)]
    close(loss, sum(parts) / 35)


def test_one_encoder_for_all_is_held_and_anchored_for_every_task(side):
    head, features = learning(met(side, shared=True, weights=(0.3, 4.0))), 3 * drawn(7, 24)
    torch.manual_seed(5)
    terms = head(features).terms
    torch.manual_seed(5)
    expected = losses_by_hand(head, features, torch.randn(5, 6, 24), [0, 1, 2], [0, 1, 2])
    for name, value in expected.items():
        close(terms[name], value)


@pytest.mark.parametrize(
    ("weights", "names"), [((0.0, 4.0), {"language"}), ((0.3, 0.0), {"divergence"}), ((0, 0), set())]
)
def test_a_loss_without_weight_is_not_there(side, weights, names):
    assert learning(met(side, weights=weights))(drawn(7, 24)).terms.keys() == names
    assert met(side, weights=weights)(drawn(7, 24)).terms == {}


def test_nothing_of_the_past_is_anchored_in_the_first_task(side):
    assert learning(met(side, tasks=1, anchored="past"))(drawn(7, 24)).terms.keys() == {"divergence"}


def test_draws_alone_are_anchored_and_are_told_apart_by_what_templates_say(side):
    said, draws = drawn(3, 10), drawn(7, 3, 10, seed=3)
    slow = [-(draws[b] @ said[a]).log_softmax(0)[a] for b in range(7) for a in range(3)]
    close(anchor(said, draws), sum(slow) / 21)
    same = drawn(1, 3, 10, seed=3)
    close(anchor(said, same), anchor(said, same.expand(7, -1, -1)))


# ── who learns ───────────────────────────────────────────────────────────────────────────────────────


def reached(head, loss):
    head.zero_grad()
    loss.backward()
    return {name for name, p in head.named_parameters() if p.grad is not None and p.grad.any()}


@pytest.mark.parametrize("texts", [None, "coop"])
def test_a_task_teaches_the_attention_through_old_encoders_which_learn_nothing(side, texts):
    head, features = met(side, texts=texts).train(), 3 * drawn(7, 24)
    scores = head(features, LABELS)
    found = reached(head, scores.logits[..., :3].square().sum())  # scores of the first task's classes alone
    words = {"texts.contexts.0"} if texts else set()
    attention = {name for name, _ in head.guidance.named_parameters(prefix="guidance")}
    assert found == attention | words
    assert all(p.grad is None for encoder in head.encoders.tasks[:2] for p in encoder.parameters())
    scores = head(features, LABELS)
    newest = {
        name for name, _ in head.encoders.named_parameters(prefix="encoders") if name.startswith("encoders.tasks.2")
    }
    assert reached(head, scores.logits.square().sum()) == attention | newest | words
    for term in ("divergence", "language"):
        found = reached(head, head(features, LABELS).terms[term])
        assert found - {"guidance.layer.multihead_attn.in_proj_bias"} >= newest and found <= attention | newest | words


def test_no_tower_and_no_template_gets_a_gradient(side):
    head = met(side, texts="coop").train()
    scores = head(drawn(7, 24), LABELS)
    (scores.logits.sum() + sum(scores.terms.values())).backward()
    assert all(p.grad is None for p in (*head.bank.parameters(), *side.tower.parameters()))
    assert not head.bank().requires_grad and "log_scale" not in dict(head.named_parameters())


# ── classes to come ──────────────────────────────────────────────────────────────────────────────────


@every_context
@pytest.mark.parametrize("future", [True, False])
@pytest.mark.parametrize("texts", [None, "coop"])
@torch.no_grad()
def test_a_class_to_come_has_the_newest_encoder_or_no_draws(side, context, future, texts):
    """Here the last of three tasks is to come: its classes look at one another, and not at those before."""
    head, features = met(side, tasks=2, context=context, future=future, texts=texts), 3 * drawn(7, 24)
    before = head(features).logits
    coming = head.preview(["snow", "cat", "aquarium fish"])
    seen, draws = coming(features).logits, coming.samples_of(features)
    assert seen.shape == (7, 6) and torch.equal(head(features).logits, before) and len(head.texts.classes) == 4
    close(seen[:, :4], before)
    other = met(side, tasks=2, context=context, texts=texts)
    other.begin_task(2, ["snow", "aquarium fish"], [4, 5])
    other.encoders.tasks[2].load_state_dict(head.encoders.tasks[1].state_dict())
    if future:
        close(seen, other.eval()(features).logits)
        assert draws[..., 4:].std(0).min() > 1e-3
    else:
        other.encoders = None
        close(seen[:, 4:], other(features).logits[:, 4:])
        assert draws[..., 4:].std(0).max() < 1e-4 and draws[..., :4].std(0).min() > 1e-3
    assert torch.equal(head.preview([])(features).logits, before)
