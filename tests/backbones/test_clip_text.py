"""The text tower of CLIP: parity with open_clip, prompts in slots, parts of texts, what is refused."""

import itertools

import open_clip
import pytest
import torch
from open_clip.model import convert_to_custom_text_state_dict
from torch import nn

from lamina.backbones.clip import ClipImageTower
from lamina.backbones.clip_text import SharedPrefix, TextTower
from lamina.backbones.splice import Encoded, Splice
from lamina.backbones.tower import Tower
from lamina.errors import ConfigError, ShapeError, UnsupportedBackbone
from lamina.prompts.base import Scripted
from tests.backbones.clips import KINDS, clip, close, ids, images, tokenizer

LEARNED = ["X X X X cat.", "X X X X lawn mower.", "X X X X aquarium fish."]
CONTEXT = slice(1, 5)
VALUES = torch.randn(2, 4, 40, generator=torch.Generator().manual_seed(2))


def whole(model, text, edit=lambda layer, x: x, parts=None):
    """open_clip's walk through all 77 rows, with a hand in it on entry to every block."""
    side = parts or model
    x = side.token_embedding(text) + side.positional_embedding
    for layer, block in enumerate(side.transformer.resblocks):
        x = block(edit(layer, x), attn_mask=side.attn_mask)
    return side.ln_final(x)[torch.arange(len(text)), text.argmax(1)] @ side.text_projection


def replaced(values, rows=CONTEXT):
    """Overwrite rows of the sequence at every block that has new ones."""

    def edit(layer, x):
        if layer not in values:
            return x
        middle = values[layer].expand(len(x), -1, -1)
        return torch.cat([x[:, : rows.start], middle, x[:, rows.stop :]], dim=1)

    return edit


def spliced(values):
    """The same as tokens of a splice."""
    return Scripted(
        lambda layer, x, _: Splice(tokens=values[layer].expand(len(x), -1, -1)) if layer in values else None
    )


# ── without prompts ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tapped", [False, True])
@pytest.mark.parametrize("kind", [kind for kind in KINDS if "patch" not in kind and "pre-norm" not in kind])
def test_without_prompts_it_is_open_clip(kind, tapped):
    model = clip(kind)
    text = ids(length=model.context_length)
    tower, tap = TextTower(clip(kind)), (lambda probe: None) if tapped else None
    expected = model.encode_text(text)
    close(tower(text, tap=tap).features, expected)
    close(tower(text, tap=tap, all_rows=True).features, expected)
    assert expected.shape == (6, tower.features) and (tower.width, tower.depth) == (40, 2)
    assert tower.features == (40 if kind == "no projection" else 24)


def test_the_tokenizer_gives_the_published_ids():
    rows = ids("a photo of a cat", "X", "lawn_mower and lawn mower.")
    assert rows.dtype == torch.int64 and rows.shape == (3, 77)
    assert rows[0, :8].tolist() == [49406, 320, 1125, 539, 320, 2368, 49407, 0]
    assert rows[1, :4].tolist() == [49406, 343, 49407, 0]
    assert rows[2].argmax() == 8  # an underscore is a token of its own
    assert ids("cat.").tolist() == ids("cat .").tolist() and tokenizer().vocab_size == 49408


def test_rows_behind_the_longest_text_are_never_computed():
    tower, seen = TextTower(clip()), []
    tower(ids(), tap=lambda probe: seen.append(probe.inputs.shape))
    assert seen == [(6, 11, 40)] * 2  # start, nine words, end
    longest = ids(" ".join(["x"] * 90))
    close(tower(longest).features, clip().encode_text(longest))
    assert tower.embed(longest)[0].shape == (1, 77, 40)


def test_the_last_block_computes_one_row_a_text():
    tower, rows = TextTower(clip()), []
    for view in tower.blocks():
        view.attended = lambda x, mixed, attended=view.attended: (rows.append(x.shape[1]), attended(x, mixed))[1]
    tower(ids())
    slotted = tower.with_slots(CONTEXT)
    slotted(ids(*LEARNED), spliced({0: VALUES[0], 1: VALUES[1]}))
    tower(ids(), all_rows=True)
    assert rows == [11, 1, 9, 1, 11, 11]


def test_features_of_several_blocks_are_read_where_each_text_ends():
    model, tower = clip(), TextTower(clip())
    x = model.token_embedding(ids()) + model.positional_embedding
    first = model.transformer.resblocks[0](x, attn_mask=model.attn_mask)
    first = model.ln_final(first)[torch.arange(6), ids().argmax(1)] @ model.text_projection
    close(tower(ids(), layers=2).features, torch.cat([first, model.encode_text(ids())], dim=1))
    with pytest.raises(ShapeError) as error:
        tower.read(tower.embed(ids())[0])
    assert str(error.value) == "a text tower pools the one row where a text ends; got 11 rows: give picks"


def test_features_before_the_final_norm_are_the_row_where_a_text_ends():
    tower = TextTower(clip())
    unnormed = tower.unnormed()
    close(clip().ln_final(unnormed(ids()).features) @ clip().text_projection, clip().encode_text(ids()))
    assert (unnormed.features, unnormed.stack) == (40, tower.stack)
    assert unnormed.fingerprint == f"{tower.fingerprint}-unnormed"


def test_features_of_a_text_do_not_depend_on_its_batch():
    tower = TextTower(clip())
    close(tower(ids()).features, torch.cat([tower(row[None]).features for row in ids()]), 2e-6)


def test_a_tower_in_bfloat16_stays_in_it_and_is_close_to_the_one_in_float32():
    tower, half, dtypes = TextTower(clip()), TextTower(clip(), dtype=torch.bfloat16), []
    values = VALUES.clone().requires_grad_()

    def at(layer, tokens, carried):
        dtypes.append(tokens.dtype)
        return Splice(tokens=values[0].expand(3, -1, -1)) if layer == 0 else Splice(context=values[1])

    got, want = (t.with_slots(CONTEXT)(ids(*LEARNED), Scripted(at)).features for t in (half, tower))
    assert dtypes == [torch.bfloat16] * 2 + [torch.float32] * 2
    assert got.dtype == torch.float32 and 0 < (got - want).norm() / want.norm() < 5e-2
    assert half.words(ids()[0]).dtype == half.position(CONTEXT).dtype == torch.float32
    got.sum().backward()
    assert values.grad.dtype == torch.float32 and values.grad.abs().amin(dim=(1, 2)).gt(0).all()
    assert all(p.grad is None and not p.requires_grad for p in half.parameters())


# ── prompts in slots ───────────────────────────────────────────────────────────────────────────────


def test_a_context_of_words_is_the_text_of_these_words():
    tower = TextTower(clip())
    words = tower.words(ids("a photo of a")[0, CONTEXT]) + tower.position(CONTEXT)
    said = [text.replace("X X X X", "a photo of a") for text in LEARNED]
    got = tower.with_slots(CONTEXT)(ids(*LEARNED), spliced({0: words})).features
    close(got, clip().encode_text(ids(*said)), 1e-6)
    assert (got - clip().encode_text(ids(*LEARNED))).abs().max() > 1e-2


@pytest.mark.parametrize("kind", ["quick", "own attention"])
@pytest.mark.parametrize("where", [{0}, {0, 1}, {1}])
def test_tokens_overwrite_their_slots_and_travel_on_from_there(kind, where):
    values = {layer: VALUES[layer] for layer in where}
    tower = TextTower(clip(kind)).with_slots(CONTEXT)
    expected = whole(clip(kind), ids(*LEARNED), replaced(values))
    close(tower(ids(*LEARNED), spliced(values)).features, expected)
    close(tower(ids(*LEARNED), spliced(values), tap=lambda probe: None).features, expected)
    assert (expected - clip(kind).encode_text(ids(*LEARNED))).abs().max() > 1e-2


def test_slots_without_tokens_are_plain_rows():
    tower = TextTower(clip())
    slotted = tower.with_slots(CONTEXT)
    assert torch.equal(slotted(ids(*LEARNED)).features, tower(ids(*LEARNED)).features)
    assert slotted.table is tower.table and slotted.stack is tower.stack and tower.slots is None
    assert slotted.fingerprint == tower.fingerprint


def test_every_text_may_have_a_context_of_its_own():
    tower = TextTower(clip()).with_slots(CONTEXT)
    own = torch.randn(3, 4, 40)
    together = tower(ids(*LEARNED), Scripted(lambda layer, *_: Splice(tokens=own) if layer == 0 else None)).features
    alone = [tower(ids(text), spliced({0: one[None]})).features for text, one in zip(LEARNED, own, strict=True)]
    close(together, torch.cat(alone))


def test_what_comes_back_is_what_became_of_the_slots():
    tower, met = TextTower(clip()).with_slots(CONTEXT), []

    def at(layer, tokens, carried):
        met.append((tokens, carried))
        return Splice(tokens=VALUES[0].expand(3, -1, -1)) if layer == 0 else None

    encoded = tower(ids(*LEARNED), Scripted(at))
    assert met[0][1] is None and encoded.prompts is None
    assert torch.equal(met[1][1], met[1][0][:, CONTEXT])
    with_mask = clip().transformer.resblocks[0](
        replaced({0: VALUES[0]})(0, tower.embed(ids(*LEARNED))[0]), attn_mask=clip().attn_mask[:9, :9]
    )
    close(met[1][0], with_mask)


def test_a_tap_sees_slots_among_the_prompts():
    tower, seen = TextTower(clip()).with_slots(CONTEXT), []
    extra = torch.randn(3, 40)
    rows = {0: VALUES[0].expand(3, -1, -1)}
    pass_ = Scripted(lambda layer, *_: Splice(tokens=rows.get(layer), context=extra if layer == 0 else None))
    tower(ids(*LEARNED), pass_, tap=seen.append)
    assert seen[0].to_prompts.shape == (3, 5, 9, 7) and seen[1].to_prompts.shape == (3, 5, 9, 4)
    assert torch.equal(seen[0].inputs[:, CONTEXT], rows[0])
    x, block = seen[0].inputs, clip().transformer.resblocks[0]
    wide = block.ln_1(torch.cat([x, extra.expand(3, -1, -1)], dim=1))
    q, k, _ = (
        rows.unflatten(-1, (5, 8)).transpose(1, 2)
        for rows in nn.functional.linear(wide, block.attn.in_proj_weight, block.attn.in_proj_bias).chunk(3, -1)
    )
    mask = torch.cat([torch.full((9, 9), float("-inf")).triu(1), torch.zeros(9, 3)], dim=1)
    weights = (q[:, :, :9] @ k.mT / 8**0.5 + mask).softmax(-1)
    close(seen[0].to_prompts, torch.cat([weights[..., CONTEXT], weights[..., 9:]], dim=-1))
    close(seen[0].keys, k[:, :, :9])


def test_frozen_only_hides_context_from_slots_inside():
    tower = TextTower(clip()).with_slots(CONTEXT)

    def run(extra, hide):
        met = []

        def at(layer, tokens, carried):
            met.append(tokens)
            return Splice(tokens=VALUES[0].expand(3, -1, -1), context=extra, frozen_only=hide) if layer == 0 else None

        tower(ids(*LEARNED), Scripted(at))
        return met[1]

    without, hidden, shown = run(None, False), run(torch.ones(3, 40), True), run(torch.ones(3, 40), False)
    close(hidden[:, CONTEXT], without[:, CONTEXT])
    for rows in (slice(0, 1), slice(5, 9)):
        assert (hidden[:, rows] - without[:, rows]).abs().max() > 1e-2
        close(hidden[:, rows], shown[:, rows])
    assert (shown[:, CONTEXT] - without[:, CONTEXT]).abs().max() > 1e-2


def test_gradients_are_those_of_finite_differences():
    tower = TextTower(clip(), dtype=torch.float64).with_slots(CONTEXT)
    start, way, weights = VALUES.double(), torch.randn(2, 4, 40).double(), torch.randn(3, 24).double()
    values = start.clone().requires_grad_()
    (tower(ids(*LEARNED), spliced(dict(enumerate(values)))).features * weights).sum().backward()
    ahead, back = (
        tower(ids(*LEARNED), spliced(dict(enumerate(start + step * way)))).features for step in (1e-5, -1e-5)
    )
    slope = ((ahead - back) * weights).sum() / 2e-5
    torch.testing.assert_close((values.grad * way).sum(), slope, rtol=1e-7, atol=1e-7)


# ── parts of texts ─────────────────────────────────────────────────────────────────────────────────


def gradient(features, values):
    weights = torch.randn(features.shape, generator=torch.Generator().manual_seed(3))
    return torch.autograd.grad((features * weights).sum(), values, retain_graph=True)[0]


@pytest.mark.parametrize("deep", [False, True])
@pytest.mark.parametrize("kind", ["plain", "own attention"])
def test_a_tail_behind_a_recorded_opening_is_the_whole_text(kind, deep):
    values = VALUES.clone().requires_grad_()
    chosen = {0: values[0], 1: values[1]} if deep else {0: values[0]}
    slotted = TextTower(clip(kind)).with_slots(CONTEXT)
    expected = whole(clip(kind), ids(*LEARNED), replaced(chosen))
    slow = slotted(ids(*LEARNED), spliced(chosen)).features

    prefix = SharedPrefix()
    slotted.opening(5)(ids(LEARNED[0]), spliced(chosen), prefix.record)
    fast = slotted.tail(5)(ids(*LEARNED), prefix).features
    for features in (slow, fast):
        close(features, expected)
        close(gradient(features, values), gradient(expected, values), 1e-4)
    assert gradient(fast, values)[0].abs().max() > 1e-2


def test_a_tail_computes_rows_of_its_own_alone():
    tower, prefix, shapes = TextTower(clip()), SharedPrefix(), []
    tower.opening(5)(ids(LEARNED[0]), tap=prefix.record)
    tower.tail(5)(ids(*LEARNED), prefix, tap=lambda probe: shapes.append((probe.inputs.shape, probe.to_prompts.shape)))
    assert shapes == [((3, 4, 40), (3, 5, 4, 5))] * 2


def test_openings_of_several_groups_serve_their_own_texts():
    slotted, prefix = TextTower(clip()).with_slots(CONTEXT), SharedPrefix()
    groups = torch.randn(2, 4, 40)
    slotted.opening(5)(
        ids(LEARNED[0], LEARNED[0]),
        Scripted(lambda layer, *_: Splice(tokens=groups) if layer == 0 else None),
        prefix.record,
    )
    got = slotted.tail(5)(ids(*LEARNED, *LEARNED), prefix).features
    expected = [slotted(ids(*LEARNED), spliced({0: group})).features for group in groups]
    close(got, torch.cat(expected))
    with pytest.raises(ShapeError) as error:
        slotted.tail(5)(ids(*LEARNED), prefix)
    assert str(error.value) == "2 openings cannot be shared evenly by 3 texts; give as many texts for each"


def test_slots_may_lie_in_a_tail():
    """Class position "front": start of text, name, context. The start alone is shared."""
    tower, rows, prefix = TextTower(clip()), slice(3, 7), SharedPrefix()
    text = ids("train cat X X X X.", "red fish X X X X.")
    expected = whole(clip(), text, replaced({0: VALUES[0]}, rows))
    tower.opening(1)(text[:1], tap=prefix.record)

    def at(layer, tokens, carried):
        shared = prefix.at(layer, tokens, carried).prefix
        return Splice(tokens=VALUES[0].expand(2, -1, -1) if layer == 0 else None, prefix=shared)

    for tail in (tower.with_slots(rows).tail(1), tower.tail(1).with_slots(rows)):
        assert tail.slots == slice(2, 6)
        close(tail(text, Scripted(at)).features, expected)
    assert torch.equal(tower.tail(1).position(rows), clip().positional_embedding[rows])


def test_parts_share_weights_and_have_fingerprints_of_their_own():
    tower = TextTower(clip())
    parts = [tower, tower.opening(5), tower.tail(5), tower.opening(6), tower.tail(5).opening(9)]
    assert all(part.stack is tower.stack and part.table is tower.table for part in parts)
    assert len({part.fingerprint for part in parts}) == 5
    assert (tower.start, tower.stop, tower.slots) == (0, 77, None)


def test_a_fingerprint_is_of_all_weights_of_the_tower_and_of_what_they_do_not_tell():
    def of(change=None, **how):
        model = clip()
        with torch.no_grad():
            if change is not None:
                change(model)
        return TextTower(model, **how).fingerprint

    changes = [
        lambda m: m.token_embedding.weight[49000, 5].add_(1e-3),
        lambda m: m.positional_embedding[76, 5].add_(1e-3),
        lambda m: m.text_projection[3, 5].add_(1e-3),
        lambda m: m.ln_final.bias[3].add_(1e-3),
        lambda m: m.transformer.resblocks[1].mlp.c_fc.bias[7].add_(1e-3),
        lambda m: setattr(m.transformer.resblocks[1].mlp, "gelu", open_clip.transformer.QuickGELU()),
        lambda m: setattr(m.transformer.resblocks[1].attn, "num_heads", 8),
    ]
    assert len({of(), *map(of, changes)}) == 8
    same = clip("custom text")
    same.load_state_dict(convert_to_custom_text_state_dict(clip().state_dict()))
    assert of(lambda m: m.visual.proj.zero_()) == of() == of(dtype=torch.bfloat16) == TextTower(same).fingerprint


# ── bad input ──────────────────────────────────────────────────────────────────────────────────────


def test_texts_must_be_ids():
    tower = TextTower(clip("short"))
    for bad, got in [
        (torch.zeros(3, 20, dtype=torch.int64), "int64 (3, 20)"),
        (torch.zeros(0, 19, dtype=torch.int64), "int64 (0, 19)"),
        (torch.zeros(3, 19), "float32 (3, 19)"),
        (torch.zeros(19, dtype=torch.int64), "int64 (19,)"),
    ]:
        with pytest.raises(ShapeError) as error:
            tower(bad)
        assert str(error.value) == (
            f"texts must be token ids (B, n), int64, one text or more, n from 1 to 19; got {got}"
        )


def test_a_text_that_ends_inside_its_slots_or_its_opening_is_refused():
    tower, text = TextTower(clip()), ids("a photo of a cat", "X X X", "a photo of a dog")
    said = (
        "text 1 ends in row 4, but rows up to 4 are prompt slots or an opening that texts share; write placeholder "
        "words there, such as 'X X X name'"
    )
    for part in (tower.with_slots(CONTEXT), tower.tail(5), tower.opening(5)):
        with pytest.raises(ShapeError) as error:
            part(text)
        assert str(error.value) == said
    for part in (tower.with_slots(slice(1, 4)), tower.tail(4), tower.opening(4)):
        part(text)


def test_tokens_that_do_not_fit_their_slots_are_refused():
    tower = TextTower(clip())
    with pytest.raises(ShapeError) as error:
        tower.with_slots(CONTEXT)(ids(*LEARNED), spliced({0: VALUES[0][:3]}))
    assert str(error.value) == "prompt slots are rows 1 to 4 of 9; got 3 prompt tokens"
    with pytest.raises(ShapeError) as error:
        tower(ids(*LEARNED), spliced({0: VALUES[0]}))
    assert str(error.value) == (
        "a TextTower reads its rows in order, so 4 prompt tokens cannot be appended; give it slots inside the sequence"
    )


def test_rows_that_a_text_has_not_are_refused():
    tower = TextTower(clip("short"))
    said = "prompts take rows of a text one after the other, from {} to {}; got slice({})"
    for rows, got in [
        (slice(1, 20), "1, 20, None"),
        (slice(4, 4), "4, 4, None"),
        (slice(1, 7, 2), "1, 7, 2"),
        (slice(2, None), "2, None, None"),
        (slice(-3, 2), "-3, 2, None"),
    ]:
        for ask in (tower.with_slots, tower.position):
            with pytest.raises(ConfigError) as error:
                ask(rows)
            assert str(error.value) == said.format(0, 18, got)
    with pytest.raises(ConfigError) as error:
        tower.tail(5).with_slots(CONTEXT)
    assert str(error.value) == said.format(5, 18, "1, 5, None")


def test_a_cut_through_slots_and_a_part_of_nothing_are_refused():
    tower = TextTower(clip("short"))
    for cut in (tower.with_slots(CONTEXT).tail, tower.with_slots(CONTEXT).opening):
        with pytest.raises(
            ConfigError, match="prompt slots in rows 1 to 4 of a text must be in one part of it; got the"
        ):
            cut(3)
    for cut, got in [(tower.tail, 19), (tower.opening, 0), (tower.opening, 20), (tower.tail, -1)]:
        with pytest.raises(ConfigError, match="a part of rows 0 to 18 of a text must hold some of them; got"):
            cut(got)


def test_a_tail_without_its_opening_is_refused():
    with pytest.raises(ShapeError) as error:
        TextTower(clip()).tail(5)(ids(*LEARNED), SharedPrefix())
    assert str(error.value) == ("no opening was recorded at block 0; run the opening with `record` as its tap first")


def made(**words):
    vision = {"layers": 1, "width": 16, "head_width": 16, "image_size": 16, "patch_size": 8}
    make = words.pop("make", open_clip.CLIP)
    return make(24, vision, {"layers": 1, "width": 8, "heads": 2, "vocab_size": 9, **words})


@pytest.mark.parametrize("make", [open_clip.CLIP, open_clip.CustomTextCLIP])
def test_a_pooling_that_lamina_does_not_read_is_refused(make):
    for words, found in [
        ({"pool_type": "last"}, "one causal mask and pooling 'last'"),
        ({"no_causal_mask": True}, "no causal mask and pooling 'argmax'"),
    ]:
        with pytest.raises(UnsupportedBackbone) as error:
            TextTower(made(make=make, **words))
        assert str(error.value) == (
            f"the text tower has {found}; lamina reads texts under a causal mask where they end ('argmax'). To add "
            "another pooling, write it in TextTower in lamina/backbones/clip_text.py."
        )


def test_other_text_towers_are_refused():
    with pytest.raises(UnsupportedBackbone, match=r"pooling 'argmax', and a class token; lamina reads"):
        TextTower(made(make=open_clip.CustomTextCLIP, embed_cls=True))
    with pytest.raises(UnsupportedBackbone, match=r"block 0 of the text tower is a .* and attn\.ln_q; lamina can"):
        TextTower(made(qk_norm=True))
    model = made(make=open_clip.CustomTextCLIP)
    model.text = nn.Linear(1, 1)
    with pytest.raises(
        UnsupportedBackbone, match=r"the text tower is a torch\.nn\.modules\.linear\.Linear; of open_clip's"
    ):
        TextTower(model)


# ── the engine, for any tower ──────────────────────────────────────────────────────────────────────


class Picky(Tower):
    """An image tower that reads another row of each image, and appends its prompts."""

    def __init__(self, inner):
        super().__init__()
        self.inner, self.width, self.depth = inner, inner.width, inner.depth
        self.embed, self.blocks, self.final_norm = inner.embed, inner.blocks, inner.final_norm

    def picks(self, inputs):
        return torch.arange(7)[:, None] * 2

    def pool(self, tokens):
        return tokens[:, 0]


@pytest.mark.parametrize("copies", [1, 2])
def test_rows_picked_of_each_input_and_appended_prompts_leave_the_last_block_together(copies):
    tower, given = Picky(ClipImageTower(clip())), torch.randn(5, 48)

    def run(**how):
        pass_ = Scripted(lambda layer, x, _: Splice(tokens=given.expand(len(x), -1, -1)) if layer == 0 else None)
        pass_.copies = copies
        return tower(images(), pass_, **how)

    full, short, tapped = run(all_rows=True), run(), run(tap=lambda probe: None)
    assert isinstance(short, Encoded) and short.features.shape == (7 * copies, 48)
    picked = full.tokens[torch.arange(7 * copies), (torch.arange(7) * 2).repeat(copies)]
    for encoded in (full, short, tapped):
        close(encoded.features, picked)
        close(encoded.prompts, full.prompts)
    for one, other in itertools.combinations(full.features[:7], 2):
        assert (one - other).abs().max() > 1e-2
