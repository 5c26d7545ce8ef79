"""An early query: prompts are chosen by what the tower says half-way, in the same pass. 27 images, N 17, D 24, L 3."""

import pytest
import torch

from lamina.errors import ConfigError
from lamina.methods.l2p import L2P
from lamina.methods.l2p_pgp import L2PPGP
from lamina.model import Batch
from lamina.prompts.base import EarlyPass
from tests.conftest import make_tiny_vit
from tests.methods.test_l2p import IMAGES, SMALL, TASK, logits_of
from tests.streams import blobs, trainer_of

EARLY = {**SMALL, "query": "early", "entry": 2}


def built(tower, **changes):
    model = L2P(**{**EARLY, **changes}).build(tower).model
    model.begin_task(TASK)
    return model


def walked(tower, images, blocks):
    """What timm's own parts say after so many blocks, normalised and read at the class token."""
    model = tower.model
    x = model._pos_embed(model.patch_embed(images))
    for block in model.blocks[:blocks]:
        x = block(x)
    return model.norm(x)[:, 0]


@pytest.mark.parametrize("entry", [1, 2])
@torch.no_grad()
def test_the_query_is_what_the_frozen_blocks_before_the_prompts_say(tiny_vit, entry):
    model = built(tiny_vit, entry=entry)
    expected = walked(tiny_vit, IMAGES, entry)
    torch.testing.assert_close(model.query(Batch(IMAGES)), expected, rtol=1e-5, atol=1e-5)
    _, begun = model.look(Batch(IMAGES))
    assert torch.equal(begun.chosen, model.prompts.start(expected).chosen)


def test_one_pass_of_the_tower_is_enough(tiny_vit, monkeypatch):
    passes = []
    forward = type(tiny_vit).forward
    monkeypatch.setattr(type(tiny_vit), "forward", lambda *a, **k: passes.append(1) or forward(*a, **k))
    for query, entry, expected in (("early", 2, 1), ("frozen", 0, 2)):
        passes.clear()
        built(tiny_vit, query=query, entry=entry)(Batch(IMAGES[:4]))
        assert len(passes) == expected


def test_no_block_before_the_prompts_keeps_a_graph(tiny_vit):
    model, seen = built(tiny_vit), {}
    model.look(Batch(IMAGES[:4]), tap=lambda probe: seen.setdefault(probe.layer, probe.inputs.requires_grad))
    assert seen == {0: False, 1: False, 2: True}
    encoded, _ = model.look(Batch(IMAGES[:4]))
    assert encoded.prompts.requires_grad


@torch.no_grad()
def test_prompts_travel_from_the_block_they_enter_alone(tiny_vit):
    model, seen = built(tiny_vit, entry=1), {}
    model.look(Batch(IMAGES), tap=lambda probe: seen.setdefault(probe.layer, probe.to_prompts.shape[-1]))
    assert seen == {0: 0, 1: 6, 2: 6}


def test_keys_are_drawn_to_the_early_query_and_move_by_nothing_else(tiny_vit):
    model = built(tiny_vit)
    output = model(Batch(IMAGES[:4], torch.tensor([0, 1, 0, 1])), 0)
    query = walked(tiny_vit, IMAGES[:4], 2).detach()
    chosen = model.prompts.keys[output.chosen]
    cosines = torch.cosine_similarity(query[:, None], chosen, dim=-1)
    torch.testing.assert_close(output.terms["pull"], -0.1 * cosines.sum(-1).mean(), rtol=1e-5, atol=1e-6)
    (moved,) = torch.autograd.grad(output.logits.square().sum(), model.prompts.keys, allow_unused=True)
    assert moved is None or not moved.any()


def test_it_learns_and_a_prediction_is_the_same_alone_and_in_any_batch():
    stream = blobs()
    trainer = trainer_of(L2P(**EARLY), make_tiny_vit())
    begun = trainer.learner.model.prompts.values.detach().clone()
    trainer.run(stream)
    model = trainer.learner.model.eval()
    assert not torch.equal(model.prompts.values, begun)
    whole = logits_of(model, IMAGES)
    alone = torch.cat([logits_of(model, image[None]) for image in IMAGES])
    assert (alone - whole).abs().max() <= 1e-4 and torch.equal(alone.argmax(-1), whole.argmax(-1))


def test_what_projects_keys_looks_at_the_early_query():
    stream = blobs()
    trainer = trainer_of(L2PPGP(**EARLY), make_tiny_vit())
    trainer.run(stream)
    images = torch.cat([batch.images for task in stream for batch in trainer.feed.plain(task.train)])
    query = walked(trainer.learner.model.tower, images, 2).double()
    keys = trainer.learner.protections[1]
    torch.testing.assert_close(keys.moments[2][0], query.mT @ query, rtol=1e-4, atol=1e-3)


def test_nothing_of_a_batch_stays_on_the_prompts(tiny_vit):
    model = built(tiny_vit)
    before = set(vars(model.prompts))
    model(Batch(IMAGES[:4]))
    assert set(vars(model.prompts)) == before


def test_a_pass_that_was_never_run_has_no_losses(tiny_vit):
    assert EarlyPass(built(tiny_vit).prompts, tiny_vit.read, None).losses(None) == {}


@pytest.mark.parametrize("entry", [3, 7])
def test_a_block_that_the_backbone_has_not_is_refused(tiny_vit, entry):
    message = f"entry must be a block of the backbone, from 0 to 2; got {entry}"
    with pytest.raises(ConfigError, match=message):
        built(tiny_vit, entry=entry)


def test_an_early_query_before_the_first_block_is_refused():
    with pytest.raises(ConfigError, match='entry must be at least 1 with query="early"'):
        L2P(query="early")


def test_the_official_way_is_a_vote():
    assert L2P(parity="official").selection == "batch"
    assert L2P(parity="official", selection="image").selection == "image"
    assert L2P().selection == "image"
