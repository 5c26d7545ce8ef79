import random

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform

from lamina.data.transforms import STILL, InputSpec, names, still_of, transform
from lamina.errors import ConfigError, ShapeError

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
SPEC = InputSpec(10, MEAN, STD, crop_pct=0.9)
RANDOM = [name for name in names() if name not in STILL]


def image(height=23, width=31, seed=0):
    # smooth, so that two resamplers can be compared
    coarse = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    smooth = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(smooth).transpose(2, 0, 1).copy())


@pytest.mark.parametrize("crop_pct", [1.0, 0.9, 0.7])
@pytest.mark.parametrize("height, width", [(23, 31), (31, 23), (8, 9), (11, 40)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
def test_plain_shows_what_timms_own_evaluation_shows(crop_pct, height, width, interpolation):
    spec = InputSpec(10, MEAN, STD, interpolation, crop_pct)
    pixels = image(height, width)
    plain = transform("plain", spec)
    ours = plain.normalised(plain(pixels)[None])[0]
    theirs = create_transform(10, mean=MEAN, std=STD, interpolation=interpolation, crop_pct=crop_pct)
    expected = theirs(Image.fromarray(pixels.permute(1, 2, 0).numpy()))
    assert ours.shape == expected.shape == (3, 10, 10)
    # PIL and torch round differently: at most two of 255 steps
    torch.testing.assert_close(ours, expected, rtol=0, atol=2.01 / 255 / min(STD))


def test_an_image_of_the_right_size_passes_through_plain_untouched():
    pixels = torch.randint(0, 256, (3, 10, 10), dtype=torch.uint8)
    assert torch.equal(transform("plain", SPEC)(pixels), pixels)


def test_plain_treats_a_batch_as_its_images():
    batch = torch.stack([image(seed=seed) for seed in range(7)])
    plain = transform("plain", SPEC)
    assert torch.equal(plain(batch), torch.stack([plain(one) for one in batch]))


def test_normalisation_is_by_channel():
    pixels = torch.randint(0, 256, (7, 3, 10, 10), dtype=torch.uint8)
    out = transform("plain", SPEC).normalised(pixels)
    expected = (pixels.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "black", "white"),
    [
        ("unit", (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
        ("half", (-1.0, -1.0, -1.0), (1.0, 1.0, 1.0)),
        ("imagenet", (-2.1179, -2.0357, -1.8044), (2.2489, 2.4286, 2.6400)),
        ("backbone", (-2.5, -1.6, -1.0), (2.5, 2.4, 2.3333)),
    ],
)
def test_pixels_are_fed_with_the_mean_and_deviation_of_a_name(name, black, white):
    pixels = torch.zeros(2, 3, 10, 10, dtype=torch.uint8)
    pixels[1] = 255
    out = transform("flip", SPEC.fed(name)).normalised(pixels)
    for image, values in zip(out, (black, white), strict=True):
        torch.testing.assert_close(image, torch.tensor(values).view(3, 1, 1).expand(3, 10, 10), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["unit", "half", "imagenet", "backbone"])
def test_another_normalisation_leaves_size_crop_and_interpolation(name):
    spec = InputSpec(11, MEAN, STD, "nearest", 0.7).fed(name)
    assert (spec.size, spec.interpolation, spec.crop_pct) == (11, "nearest", 0.7)


@pytest.mark.parametrize("name", names())
@pytest.mark.parametrize("height, width", [(23, 31), (10, 10), (5, 7)])
def test_every_transform_gives_uint8_of_the_right_size_and_leaves_its_input_alone(name, height, width):
    pixels = image(height, width)
    before = pixels.clone()
    for seed in range(9):
        torch.manual_seed(seed)
        out = transform(name, SPEC)(pixels)
        assert out.dtype == torch.uint8 and out.shape == (3, 10, 10)
    assert torch.equal(pixels, before)


@pytest.mark.parametrize("name", RANDOM)
def test_a_random_transform_draws_from_torchs_generator_alone(name):
    outs = []
    for other in range(3):
        random.seed(other)
        np.random.seed(other)
        torch.manual_seed(5)
        outs.append(torch.stack([transform(name, SPEC)(image()) for _ in range(4)]))
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])
    torch.manual_seed(6)
    assert not torch.equal(outs[0], torch.stack([transform(name, SPEC)(image()) for _ in range(4)]))


def test_plain_draws_nothing():
    before = torch.get_rng_state()
    transform("plain", SPEC)(image())
    assert torch.equal(torch.get_rng_state(), before)


def test_flip_mirrors_about_half_of_the_images():
    pixels = torch.arange(300, dtype=torch.uint8).reshape(3, 10, 10)
    flipped = 0
    for seed in range(40):
        torch.manual_seed(seed)
        out = transform("flip", SPEC)(pixels)
        assert torch.equal(out, pixels) or torch.equal(out, pixels.flip(2))
        flipped += torch.equal(out, pixels.flip(2))
    assert 10 < flipped < 30


def _shares(name, scale):
    """Return how much of a ramp's range each crop shows: the share of the width that it keeps."""
    ramp = torch.arange(128, dtype=torch.uint8).expand(3, 128, 128)
    shares = []
    for seed in range(40):
        torch.manual_seed(seed)
        out = transform(name, InputSpec(128, MEAN, STD, "bilinear"), scale)(ramp).int()
        shares.append(float(out.max() - out.min() + 1) / 128)
    return shares


def test_crop_flip_keeps_at_least_four_tenths_of_the_area_by_default():
    # of a share s of the area, at aspects of 3/4 to 4/3, the width keeps at least sqrt(s * 3/4)
    assert min(_shares("crop-flip", None)) >= (0.4 * 0.75) ** 0.5 - 0.03
    assert min(_shares("crop-flip", None)) < 0.75


def test_the_scale_of_a_crop_is_a_setting():
    assert min(_shares("crop-flip", (0.9, 1.0))) > 0.8
    assert max(_shares("crop-flip", (0.1, 0.1))) < 0.4


@pytest.mark.parametrize("name", ["autoaugment-cifar10", "autoaugment-imagenet"])
def test_autoaugment_never_mirrors_the_image(name):
    pixels = torch.full((3, 64, 64), 128, dtype=torch.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (3, 64, 32), dtype=np.uint8)
    pixels[:, :, :32] = torch.from_numpy(noise)
    spec = InputSpec(64, MEAN, STD, "bilinear")
    stayed = 0
    for seed in range(60):
        torch.manual_seed(seed)
        rough = transform(name, spec, (0.9, 1.0))(pixels).float().diff(dim=1).abs().mean((0, 1))
        stayed += bool(rough[:28].mean() > rough[36:].mean())
    # a policy that shifts the image far can carry the noise over; a random flip would do so half of the time
    assert stayed >= 54


def test_pad_crop_flip_moves_the_image_by_at_most_an_eighth():
    pixels = torch.full((3, 16, 16), 9, dtype=torch.uint8)
    shown = []
    for seed in range(200):
        torch.manual_seed(seed)
        out = transform("pad-crop-flip", InputSpec(16, MEAN, STD))(pixels)
        shown.append(int((out[0] == 9).sum()))
    assert min(shown) >= 14 * 14 and min(shown) < 16 * 16 == max(shown)


@pytest.mark.parametrize(
    "make, error, message",
    [
        (
            lambda: transform("crop-flop", SPEC),
            ConfigError,
            "no transform is called 'crop-flop'; did you mean 'crop-flip'? Known: autoaugment-cifar10, "
            "autoaugment-imagenet, crop-flip, flip, pad-crop-flip, plain, resize-crop, resize-crop-flip, stretch",
        ),
        (
            lambda: transform("plain", SPEC, (0.5, 1.0)),
            ConfigError,
            "transform 'plain' does not crop by area, so it takes no scale; got (0.5, 1.0)",
        ),
        (
            lambda: transform("crop-flip", SPEC, (0.5, 0.4)),
            ConfigError,
            "scale of transform 'crop-flip' must be 0 < smallest <= largest <= 1; got (0.5, 0.4)",
        ),
        (lambda: InputSpec(0, MEAN, STD), ConfigError, "InputSpec.size must be at least 1; got 0"),
        (
            lambda: InputSpec(8, MEAN, STD, crop_pct=1.2),
            ConfigError,
            "InputSpec.crop_pct must be above 0 and at most 1; got 1.2",
        ),
        (
            lambda: InputSpec(8, MEAN, STD, "cubic"),
            ConfigError,
            "no interpolation is called 'cubic'; did you mean 'bicubic'? Known: bicubic, bilinear, nearest",
        ),
        (
            lambda: InputSpec(8, MEAN, (0.0, 1.0, 1.0)),
            ConfigError,
            "InputSpec.mean and std have three numbers, std above 0; got (0.5, 0.4, 0.3) and (0.0, 1.0, 1.0)",
        ),
        (
            lambda: SPEC.fed("units"),
            ConfigError,
            "no normalization is called 'units'; did you mean 'unit'? Known: backbone, half, imagenet, unit",
        ),
        (
            lambda: transform("flip", SPEC)(torch.zeros(2, 3, 5, 7, dtype=torch.uint8)),
            ShapeError,
            "transform 'flip' takes uint8 (3, height, width); got torch.uint8 (2, 3, 5, 7)",
        ),
        (
            lambda: transform("plain", SPEC)(torch.zeros(3, 5, 7)),
            ShapeError,
            "transform 'plain' takes uint8 (3, height, width); got torch.float32 (3, 5, 7)",
        ),
    ],
)
def test_misuse_is_told_in_one_sentence(make, error, message):
    with pytest.raises(error) as caught:
        make()
    assert str(caught.value) == message


# ── ways of transfer learning ────────────────────────────────────────────────────────────────────────


def test_stretch_shows_the_whole_image_as_bilinear_weights_without_a_filter_say():
    """Against a slow version: each pixel from its four neighbours, whatever lies between is passed over."""
    pixels, size = image(7, 33), 5
    out = transform("stretch", InputSpec(size, MEAN, STD))(pixels).double()
    values = pixels.double()
    for row in range(size):
        for column in range(size):
            y, x = (max((place + 0.5) * side / size - 0.5, 0) for place, side in ((row, 7), (column, 33)))
            (top, left), (down, right) = (int(y), int(x)), (min(int(y) + 1, 6), min(int(x) + 1, 32))
            upper = values[:, top, left] * (1 - x % 1) + values[:, top, right] * (x % 1)
            lower = values[:, down, left] * (1 - x % 1) + values[:, down, right] * (x % 1)
            expected = upper * (1 - y % 1) + lower * (y % 1)
            torch.testing.assert_close(out[:, row, column], expected, rtol=0, atol=1.01)


@pytest.mark.parametrize(("size", "short"), [(224, 256), (384, 438), (448, 512)])
def test_resize_crop_resizes_to_an_eighth_more_and_takes_the_centre(size, short):
    pixels = image(3 * short // 2, short)  # upright, and its short side needs no resampling
    spec = InputSpec(size, MEAN, STD, crop_pct=0.9)
    top, left = round((3 * short // 2 - size) / 2), round((short - size) / 2)
    assert torch.equal(transform("resize-crop", spec)(pixels), pixels[:, top : top + size, left : left + size])


def test_resize_crop_flip_takes_any_window_of_the_resized_image_and_mirrors_half_of_them():
    pixels, size = image(24, 16), 14
    resized = transform("resize-crop-flip", InputSpec(size, MEAN, STD))
    windows = pixels.unfold(1, size, 1).unfold(2, size, 1)  # (3, 11, 3, 14, 14)
    places = []
    for seed in range(60):
        torch.manual_seed(seed)
        crop = resized(pixels)
        found = [
            (windows == each[:, None, None]).all(dim=(0, 3, 4)).nonzero().tolist() for each in (crop, crop.flip(-1))
        ]
        assert sum(map(len, found)) == 1
        places.append((*(found[0] or found[1])[0], bool(found[1])))
    tops, lefts, mirrored = (set(values) for values in zip(*places, strict=True))
    assert len(tops) > 5 and lefts == {0, 1, 2} and mirrored == {False, True}


def test_images_that_are_not_trained_on_are_shown_as_their_training_images_ask_for():
    assert {name: still_of(name) for name in names() if still_of(name) != "plain"} == {
        "resize-crop": "resize-crop",
        "resize-crop-flip": "resize-crop",
        "stretch": "stretch",
    }
    assert not any(transform(name, SPEC).random for name in STILL)
