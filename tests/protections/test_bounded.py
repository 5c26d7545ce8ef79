"""A cut chosen by measurement: 9 images, F 24 features, M 5 prompt tokens, D 24 channels, L 3 blocks."""

import copy
import threading

import pytest
import torch

from lamina.errors import ShapeError
from lamina.heads.linear import LinearHead
from lamina.model import Batch, PromptedModel
from lamina.prompts.deep import DeepPrompts
from lamina.protections.bounded import BoundedNullSpace
from lamina.protections.projector import Blend, Spectrum
from lamina.protections.spectrum import Cut

LADDER = [0.5, 0.2, 0.1, 0.05, 0.02, 0.01, 5e-3, 2e-3, 1e-3, 5e-4, 2e-4, 1e-4, 5e-5, 2e-5, 1e-5, 5e-6, 2e-6, 1e-6, 0]


def alone(total):
    return total


def begun(tower, max_drift=0.05, **options):
    """A model and its protection, as they are made."""
    prompts = DeepPrompts(range(3), 5, 24, normed=True)
    return PromptedModel(tower, prompts, LinearHead(24)), BoundedNullSpace(
        tower, prompts, max_drift=max_drift, **options
    )


def moved(model, seed, length=0.3):
    """Move the prompts as a task would; return the move, by block."""
    generator = torch.Generator().manual_seed(seed)
    moves = {i: length * torch.randn(5, 24, generator=generator) for i in range(3)}
    for i, move in moves.items():
        model.prompts.value(i).data += move
    return moves


@torch.no_grad()
def looked(model, null_space, batches):
    null_space.begin_look()
    for batch in batches:
        model.features(batch, tap=null_space.see)
    null_space.end_look(alone)


@pytest.fixture
def batches():
    images = torch.randn(9, 3, 32, 32, generator=torch.Generator().manual_seed(4))
    return [Batch(images[:4]), Batch(images[4:])]


@pytest.fixture
def finished(tiny_vit, batches):
    """A first task is over and looked back on, and nothing measured yet."""
    model, null_space = begun(tiny_vit)
    moves = moved(model, seed=1)
    looked(model, null_space, batches)
    return model, null_space, moves


@torch.no_grad()
def features(model, batches):
    return torch.cat([model.features(batch)[0] for batch in batches]).double()


@torch.no_grad()
def drift_under(lost, model, null_space, moves, batches):
    """What the docstring defines, step by step: the drift of the projected move, as a share of the spread."""
    rest = features(model, batches)
    spread = torch.stack([(row - rest.mean(0)).square().sum() for row in rest]).mean().sqrt()
    before = {i: model.prompts.value(i).detach().clone() for i in moves}
    for i, move in moves.items():
        right, left = (
            Blend(normalize=False)(Spectrum.of(moment).free(Cut(knee="energy", kept=1 - lost)))
            for moment in (null_space.channels(i), null_space.attention[i])
        )
        model.prompts.value(i).data.copy_(before[i] + (left @ move.double() @ right).float())
    drift = (features(model, batches) - rest).square().sum(1).mean().sqrt() / spread
    for i, value in before.items():
        model.prompts.value(i).data.copy_(value)
    return float(drift)


@pytest.mark.parametrize("max_drift", [0.5, 0.1, 0.02])
def test_the_cut_is_the_loosest_under_which_the_first_move_drifts_no_further_than_the_bound(
    finished, batches, max_drift
):
    model, null_space, moves = finished
    null_space.max_drift = max_drift
    null_space.measure(model, batches, alone)
    drifts = [drift_under(lost, model, null_space, moves, batches) for lost in LADDER]
    place = next(place for place, drift in enumerate(drifts) if drift <= max_drift)
    assert null_space.cut == Cut(knee="energy", kept=1 - LADDER[place])
    assert null_space.drift == pytest.approx(drifts[place], rel=1e-4)
    assert 0 < null_space.drift <= max_drift


def test_the_bounds_of_that_test_are_met_at_different_cuts(finished, batches):
    model, null_space, _ = finished
    chosen = set()
    for null_space.max_drift in (0.5, 0.1, 0.02):
        null_space.measure(model, batches, alone)
        chosen.add(null_space.cut.kept)
    assert len(chosen) == 3


def test_a_handful_of_tries_finds_the_cut(finished, batches):
    model, null_space, _ = finished
    asked = []
    null_space.measure(model, batches, lambda total: asked.append(total) or total)
    assert 3 + 1 < len(asked) <= 3 + 6  # count, mean and spread once; then the drift of one cut at a time
    asked.clear()
    null_space.max_drift = 1e9
    null_space.measure(model, batches, lambda total: asked.append(total) or total)
    assert len(asked) == 3 + 1 and null_space.cut.kept == 0.5  # the loosest of all is tried first


def test_where_no_cut_keeps_the_bound_no_step_is_allowed(finished, batches):
    model, null_space, _ = finished
    null_space.max_drift = -1.0
    null_space.measure(model, batches, alone)
    assert null_space.cut is None and null_space.drift == 0 and "kept" not in null_space.state_dict()
    for projection in null_space.projections().values():
        assert not projection.left.any() and not projection.right.any()
    assert {room.used == room.size for room in null_space.room()} == {True}


def test_before_anything_was_measured_no_step_is_allowed(finished):
    _, null_space, _ = finished
    assert not any(projection.right.any() for projection in null_space.projections().values())


def test_projectors_are_not_normalised(finished, batches):
    model, null_space, _ = finished
    null_space.measure(model, batches, alone)
    for projection in null_space.projections().values():
        torch.testing.assert_close(projection.right @ projection.right, projection.right, rtol=0, atol=1e-5)
        assert projection.right.trace() > 1.5


def test_measuring_leaves_the_prompts_as_they_were_even_when_it_fails(finished, batches):
    model, null_space, _ = finished
    before = {name: value.clone() for name, value in model.state_dict().items()}
    null_space.measure(model, batches, alone)

    def broken(total):
        if not torch.equal(model.prompts.value(0), before["prompts.values.0"]):
            raise KeyboardInterrupt
        return total

    with pytest.raises(KeyboardInterrupt):
        null_space.measure(model, batches, broken)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert null_space.cut is None


def test_the_wish_is_what_the_first_task_did_and_stays_so(finished, batches):
    model, null_space, moves = finished
    null_space.measure(model, batches, alone)
    moved(model, seed=2)
    looked(model, null_space, batches)
    null_space.measure(model, batches, alone)
    for i, move in moves.items():
        torch.testing.assert_close(null_space.wish[i], move, rtol=0, atol=1e-6)
    assert null_space.start == {}


def test_two_processes_with_a_part_of_the_images_each_measure_what_one_does(finished, batches):
    model, null_space, _ = finished
    parts, meet, shared = [copy.deepcopy((model, null_space)) for _ in batches], threading.Barrier(2, timeout=20), {}
    null_space.measure(model, batches, alone)

    def work(rank):
        def reduce(total):
            shared[rank] = total
            meet.wait()
            added = shared[0] + shared[1]
            meet.wait()
            return added

        parts[rank][1].measure(parts[rank][0], [batches[rank]], reduce)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for _, other in parts:
        assert other.cut == null_space.cut and other.drift == pytest.approx(null_space.drift, rel=1e-4)


def test_a_process_without_images_takes_part(finished, batches):
    """It adds nothing to sums; here the other one's come from a list."""
    model, null_space, _ = finished
    totals = []
    null_space.measure(model, batches, lambda total: totals.append(total) or total)
    cut, drift, told = null_space.cut, null_space.drift, iter(totals)
    null_space.measure(model, [], lambda total: total + next(told))
    assert (null_space.cut, null_space.drift) == (cut, drift)


def test_the_split_into_batches_does_not_matter(finished, batches):
    model, null_space, _ = finished
    null_space.measure(model, batches, alone)
    cut, drift = null_space.cut, null_space.drift
    null_space.measure(model, [Batch(torch.cat([batch.images for batch in batches]))], alone)
    assert null_space.cut == cut and null_space.drift == pytest.approx(drift, rel=1e-3)


# ── memory ───────────────────────────────────────────────────────────────────────────────────────────


def test_a_run_that_resumes_makes_the_same_projections(tiny_vit, finished, batches):
    model, null_space, _ = finished
    null_space.measure(model, batches, alone)
    other, again = begun(tiny_vit)
    other.load_state_dict(model.state_dict(), strict=False)
    again.load_state_dict(null_space.state_dict())
    assert (again.cut, again.drift, again.start) == (null_space.cut, null_space.drift, {})
    for i in range(3):
        assert torch.equal(again.wish[i], null_space.wish[i])
        ours, theirs = (p.projections()[p.prompts.value(i)] for p in (null_space, again))
        assert torch.equal(ours.left, theirs.left) and torch.equal(ours.right, theirs.right)


def test_a_first_task_that_resumes_remembers_where_it_began(tiny_vit, batches):
    model, null_space = begun(tiny_vit)
    kept = null_space.state_dict()
    moves = moved(model, seed=1)
    other, again = begun(tiny_vit)  # begins elsewhere
    assert not torch.equal(again.start[0], kept["start"][0])
    other.prompts.load_state_dict(model.prompts.state_dict())
    again.load_state_dict(kept)
    looked(other, again, batches)
    again.measure(other, batches, alone)
    for i, move in moves.items():
        torch.testing.assert_close(again.wish[i], move, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"wish": {0: torch.ones(5, 24)}},
            "wish must be there for blocks [0, 1, 2]; got [0]",
        ),
        (
            {"start": dict.fromkeys(range(3), torch.ones(24, 5))},
            "start of block 0 must have shape (5, 24); got (24, 5)",
        ),
        (
            {"wish": None},
            "what is remembered does not say how far the first task moved; let `kept` stay as it was",
        ),
    ],
)
def test_a_memory_that_does_not_fit_is_refused(tiny_vit, finished, batches, change, message):
    model, null_space, _ = finished
    null_space.measure(model, batches, alone)
    state = {name: value for name, value in (null_space.state_dict() | change).items() if value is not None}
    with pytest.raises(ShapeError) as error:
        begun(tiny_vit)[1].load_state_dict(state)
    assert str(error.value) == message
