"""MaPLe: prompts in both towers, coupled. B 7, N 17, D 48, L 3; texts W 40, L 2; F 24, n 2 tokens, J 2, C 3 and 2."""

import copy

import pytest
import torch
from torch.nn import functional as F

from lamina.backbones.clip import ClipImageTower, TextSide
from lamina.backbones.clip_text import TextTower
from lamina.data.stream import Task
from lamina.errors import ConfigError
from lamina.methods.coop import CoOp
from lamina.methods.maple import MaPLe
from lamina.model import Batch
from lamina.prompts.contexts import encoded, worded
from lamina.prompts.stacked import FreePrompts
from tests.backbones.clips import clip, close, ids, images, tiny_clip, tokenizer
from tests.prompts.test_stacked import by_hand
from tests.streams import blobs, trainer_of

FIRST = Task(0, ["cat", "lawn_mower", "red panda"], [0, 1, 2], None, None)
SECOND = Task(1, ["aquarium fish", "x"], [3, 4], None, None)
NAMES = ["cat", "lawn mower", "red panda", "aquarium fish", "x"]


def met(tower=None, **values):
    model = MaPLe(**values).build(tower or tiny_clip()).model
    model.begin_task(FIRST)
    model.begin_task(SECOND)
    return model.eval()


def texts_by_hand(rows, prompt="X X of a {}."):
    """Features (C, F) of open_clip's own text tower, rows 1 to n replaced on entry to each of the first blocks."""
    theirs, row = clip(), ids(*[prompt.format(name) for name in NAMES])
    x = theirs.token_embedding(row) + theirs.positional_embedding
    for layer, block in enumerate(theirs.transformer.resblocks):
        if layer < len(rows):
            length = rows[layer].shape[0]
            entering = rows[layer] + (theirs.positional_embedding[1 : length + 1] if layer == 0 else 0)
            x = torch.cat([x[:, :1], entering.expand(len(x), -1, -1), x[:, length + 1 :]], dim=1)
        x = block(x, attn_mask=theirs.attn_mask)
    ended = theirs.ln_final(x)[torch.arange(len(x)), row.argmax(1)]
    return F.normalize(ended @ theirs.text_projection, dim=-1)


def loss(seen, said):
    return F.cross_entropy(20 * F.normalize(seen, dim=-1) @ said.T, torch.arange(7) % 5)


def test_features_logits_and_gradients_are_those_of_the_definition():
    model = met()
    texts, maps = model.head.texts, model.prompts.maps
    rows = [part.detach().clone().requires_grad_() for part in texts.rows()]
    theirs = copy.deepcopy(maps)
    seen = by_hand(clip(), [made(row) for made, row in zip(theirs, rows, strict=True)])
    said = texts_by_hand(rows)
    close(model.look(Batch(images()))[0].features, seen, 5e-6)
    close(texts(), said, 5e-6)
    output = model(Batch(images())).logits
    close(output, 20 * F.normalize(seen, dim=-1) @ said.T)
    F.cross_entropy(output, torch.arange(7) % 5).backward()
    loss(seen, said).backward()
    assert len(rows) == 2 and len(theirs) == 2
    for ours, other in zip([*texts.rows(), *maps.parameters()], [*rows, *theirs.parameters()], strict=True):
        size = other.grad.abs().max()
        assert size > 0
        close(ours.grad / size, other.grad / size, 5e-6)


def test_a_step_moves_every_prompt_and_every_map():
    """The released code of its continual use filters parameters by name, and leaves all but the context as drawn."""
    trainer = trainer_of(MaPLe(epochs=1, batch_size=27, warmup=0.0), tiny_clip())
    task = blobs().tasks[0]
    trainer._begin([task])
    before = {name: value.clone() for name, value in trainer.learner.model.state_dict().items()}
    trainer.learn(task)
    after = trainer.learner.model.state_dict()
    assert {name for name, value in after.items() if not torch.equal(value, before[name])} == {
        "head.texts.contexts.0",
        "head.texts.deep.0",
        *(f"prompts.maps.{i}.{kind}" for i in (0, 1) for kind in ("weight", "bias")),
    }


def test_what_is_learned_stands_once_in_the_state():
    learned = met().learned()
    shapes = {name: tuple(value.shape) for name, value in learned.items()}
    assert shapes == {
        "head.log_scale": (),
        "head.texts.contexts.0": (2, 40),
        "head.texts.deep.0": (2, 40),
        "prompts.maps.0.weight": (48, 40),
        "prompts.maps.0.bias": (48,),
        "prompts.maps.1.weight": (48, 40),
        "prompts.maps.1.bias": (48,),
    }


def test_with_one_block_texts_are_those_of_coop():
    model, coop = met(depth=1, length=4), CoOp(length=4, words="a photo of a").build(tiny_clip()).model
    coop.begin_task(FIRST)
    coop.begin_task(SECOND)
    close(model.head.texts(), coop.head.texts())
    close(model.head.texts().detach(), coop.head.texts().detach(), 1e-6)


@pytest.mark.parametrize("length", [1, 2, 4])
def test_without_prompts_it_is_the_plain_model(length):
    model = met(depth=1, length=length)
    model.prompts = None
    said = F.normalize(clip().encode_text(ids(*[f"a photo of a {name}." for name in NAMES])), dim=-1)
    seen = F.normalize(clip().encode_image(images()), dim=-1)
    close(model(Batch(images())).logits, 20 * seen @ said.T)


def test_what_texts_share_is_computed_once_and_changes_nothing():
    texts = met().head.texts
    context, *deep = texts.rows()
    wording = worded(texts.side, NAMES, 2, words="of a")
    found = [F.normalize(encoded(texts.tower, wording, context[None], deep=deep, share=s)[0], dim=-1) for s in (0, 1)]
    close(found[0], found[1], 5e-6)
    close(texts(), found[1])


def test_texts_are_read_anew_when_a_deep_prompt_has_moved():
    texts = met().head.texts
    with torch.no_grad():
        before = texts()
        texts.deep[0].add_(torch.randn(2, 40))
        assert (texts() - before).abs().max() > 1e-3
        assert texts.encoded_classes == 10 and texts() is not None and texts.encoded_classes == 10


def test_prompts_of_their_own_are_the_same_program():
    coupled, free = met(), met(coupled=False)
    assert isinstance(free.prompts, FreePrompts)
    assert [tuple(value.shape) for value in free.prompts.values] == [(2, 48)] * 2
    assert (free(Batch(images())).logits - coupled(Batch(images())).logits).abs().max() > 1e-3
    with torch.no_grad():
        for value, row in zip(free.prompts.values, coupled.prompts.rows(), strict=True):
            value.copy_(row)
        for ours, theirs in zip(free.head.texts.rows(), coupled.head.texts.rows(), strict=True):
            ours.copy_(theirs)
        close(free(Batch(images())).logits, coupled(Batch(images())).logits)


def test_a_copy_of_a_model_is_coupled_to_its_own_texts():
    model = met()
    other = copy.deepcopy(model)
    with torch.no_grad():
        before = model.look(Batch(images()))[0].features
        other.head.texts.contexts[0].add_(1.0)
        assert torch.equal(model.look(Batch(images()))[0].features, before)
        assert (other.look(Batch(images()))[0].features - before).abs().max() > 1e-3


def test_the_first_words_are_learned_and_the_others_stay_or_all_are_learned():
    first, full = met(), met(word_init="full")
    words = first.head.texts.tower.words(ids("a photo of a")[0, 1:5])
    assert torch.equal(first.head.texts.contexts[0], words[:2]) and torch.equal(full.head.texts.contexts[0], words)
    assert full.head.texts.deep[0].shape == (4, 40)
    drawn = met(words="", length=3).head.texts
    assert drawn.contexts[0].shape == (3, 40) and drawn.contexts[0].std() < 0.03
    close(drawn(), texts_by_hand(drawn.rows(), "X X X {}."))
    with torch.no_grad():
        wide = full.head.texts
        close(wide(), texts_by_hand(wide.rows(), "X X X X {}."))


def test_a_length_that_is_no_number_of_whole_words_is_refused():
    with pytest.raises(ConfigError) as error:
        MaPLe(words="a photo of lawnmowers", length=5).build(tiny_clip())
    assert str(error.value) == (
        "the learned words start from whole words of 'a photo of lawnmowers', the first of which have 1, 2, 3, 6 "
        "tokens; got length=5: take one of these, or other words"
    )


def test_depth_is_9_or_what_both_towers_have_and_no_more():
    tower = ClipImageTower(clip())
    tower.text = TextSide(TextTower(clip()), tokenizer(), 20.0)
    assert len(met().prompts.maps) == len(met().head.texts.rows()) == 2
    assert len(met(depth=1).prompts.maps) == len(met(depth=1).head.texts.rows()) == 1
    tower.depth, tower.text.tower.depth = 12, 11
    assert len(MaPLe().build(tower).model.prompts.maps) == 9
    with pytest.raises(ConfigError) as error:
        MaPLe(depth=3).build(tiny_clip())
    assert str(error.value) == (
        "MaPLe.depth must be at most 2, since the image tower has 3 blocks and the text tower 2; got 3"
    )


def test_a_preview_scores_further_classes_and_images_stay_as_they_are():
    model = met()
    features = model.look(Batch(images()))[0].features.detach()
    seen = model.head.preview(["dog"])(features).logits
    assert seen.shape == (7, 6)
    close(seen[:, :5], model.head(features).logits)


def test_the_defaults_are_those_of_the_released_code():
    settings = MaPLe()
    assert (settings.depth, settings.length, settings.words, settings.word_init) == (None, 2, "a photo of a", "first")
    assert settings.coupled and (settings.epochs, settings.batch_size) == (5, 4)
    (phase,) = settings.phases(FIRST)
    optimizer = phase.optimizer([torch.nn.Parameter(torch.zeros(1))])
    assert type(optimizer) is torch.optim.SGD
    assert {"lr": 0.0035, "momentum": 0.9}.items() <= optimizer.defaults.items()
    rates = [0.0035 * phase.schedule(step / 100) for step in (0, 19, 20, 60, 100)]
    assert rates == pytest.approx([1e-5, 1e-5, 0.0035, 0.00175, 0.0])


def test_a_rate_below_that_of_the_warm_up_is_not_raised():
    (phase,) = MaPLe(lr=1e-6).phases(FIRST)
    assert phase.schedule(0.0) == 1.0
    (close_,) = MaPLe(memory=2, balance=1, lr=0.01).refine(FIRST)
    assert close_.schedule(0.1) * 0.001 == pytest.approx(1e-5)


def test_settings_without_an_effect_are_named():
    assert set(MaPLe().idle()) == {"balance", "choose"}
    assert set(MaPLe(words="", memory=1).idle()) == {"negatives", "word_init"}
    assert MaPLe(word_init="full").idle()["length"] == "with word_init=full, where words have a length"
