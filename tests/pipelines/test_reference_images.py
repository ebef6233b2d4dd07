"""Reference pictures: cut-outs, squares without cropping, and the features of one encoder pass."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers.hooks import group_offloading
from PIL import Image
from transformers import CLIPImageProcessor

from objectcompose.errors import CheckpointError, ImageInputError, ObjectComposeError
from objectcompose.pipelines.reference_images import (
    CLIP_PIXEL_MEAN,
    clip_statistics,
    cut_out_pixels,
    encode_references,
    encoder_side,
    fit_pixels,
    normalize_pixels,
    null_features,
    reference_pixels,
)
from tests.tiny import tiny_image_encoder


COLOUR = torch.tensor([0.2, 0.4, 0.6])
RED = (255, 0, 0)


def plain_picture(width: int, height: int, colour=RED) -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def cut_out(width: int, height: int, bounds: tuple[int, int, int, int]) -> Image.Image:
    """A red rectangle, opaque inside `bounds` (left, top, right, bottom), transparent green around it."""
    image = Image.new("RGBA", (width, height), (0, 255, 0, 0))
    image.paste((*RED, 255), bounds)
    return image


def test_a_square_picture_of_the_right_size_stays_as_it_is():
    image = Image.effect_noise((8, 8), 80).convert("RGB")
    pixels = reference_pixels(image, 8, COLOUR)
    expected = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
    assert torch.equal(pixels, expected)
    assert torch.equal(reference_pixels(image, 8, COLOUR, shape="stretch"), expected)


def test_padding_keeps_the_whole_object_and_its_proportions():
    pixels = reference_pixels(plain_picture(30, 10), 12, COLOUR)
    assert pixels.shape == (3, 12, 12) and pixels.dtype == torch.float32
    red = torch.tensor([1.0, 0.0, 0.0])
    torch.testing.assert_close(pixels[:, 4:8], red[:, None, None].expand(3, 4, 12))
    for band in (pixels[:, :4], pixels[:, 8:]):
        assert torch.equal(band, COLOUR[:, None, None].expand(3, 4, 12))


def test_margin_is_a_share_of_the_longer_side():
    pixels = reference_pixels(plain_picture(20, 10), 28, COLOUR, margin=0.2)  # 20 of 20 * 1.4 columns
    is_red = (pixels[0] > 0.99) & (pixels[1] < 0.01)
    rows, columns = is_red.any(1).nonzero()[:, 0], is_red.any(0).nonzero()[:, 0]
    assert (columns.min(), columns.max()) == (4, 23) and (rows.min(), rows.max()) == (9, 18)


def test_nothing_is_cut_from_long_pictures():
    """CLIP's own preparation would crop these to their centre and lose both ends."""
    image = plain_picture(60, 10, (255, 255, 255))
    image.paste(RED, (0, 0, 6, 10))
    image.paste((0, 0, 255), (54, 0, 60, 10))
    for shape in ("pad", "stretch"):
        pixels = reference_pixels(image, 20, COLOUR, shape=shape)
        middle = pixels[:, 10]
        assert middle[0, 0] > 0.9 > 0.3 > middle[2, 0] and middle[2, -1] > 0.9 > 0.3 > middle[0, -1]


def test_resizing_is_antialiased():
    stripes = plain_picture(64, 64, (0, 0, 0))
    for column in range(0, 64, 2):
        stripes.paste((255, 255, 255), (column, 0, column + 1, 64))
    assert (reference_pixels(stripes, 8, COLOUR) - 0.5).abs().max() < 0.05


def test_a_cut_out_is_trimmed_and_stands_on_the_colour():
    pixels = reference_pixels(cut_out(40, 40, (25, 5, 35, 15)), 10, COLOUR)
    assert torch.equal(pixels, torch.tensor([1.0, 0.0, 0.0])[:, None, None].expand(3, 10, 10))
    stretched = reference_pixels(cut_out(40, 40, (25, 5, 35, 15)), 40, COLOUR, shape="stretch")
    assert torch.equal(stretched[:, 0, 0], COLOUR) and torch.equal(stretched[:, 10, 30], torch.tensor([1.0, 0, 0]))


def test_half_transparent_pixels_mix_with_the_colour_and_hidden_ones_never_show():
    image = cut_out(4, 4, (0, 0, 2, 4))
    image.putpixel((3, 0), (0, 0, 255, 51))  # alpha 0.2
    pixels = cut_out_pixels(image, COLOUR)
    torch.testing.assert_close(pixels[:, 0, 3], COLOUR * 0.8 + torch.tensor([0.0, 0.0, 0.2]))
    assert torch.equal(pixels[:, 3, 3], COLOUR)  # fully transparent: its green is not there
    shrunk = reference_pixels(image, 2, COLOUR)
    assert shrunk[1].max() <= COLOUR[1] + 0.05, "colour of transparent pixels bled into the picture"


def test_very_thin_pictures_keep_a_pixel():
    pixels = reference_pixels(plain_picture(400, 1), 16, COLOUR)
    assert ((pixels[0] > 0.9) & (pixels[1] < 0.1)).sum() == 16
    assert fit_pixels(torch.zeros(3, 90, 1), (8, 8), COLOUR).shape == (3, 8, 8)


def test_bad_pictures_and_options_are_refused():
    with pytest.raises(ImageInputError, match="PIL image, got str"):
        reference_pixels("cat.png", 8, COLOUR)
    with pytest.raises(ImageInputError, match="alpha channel that is 0 everywhere"):
        reference_pixels(Image.new("RGBA", (4, 4)), 8, COLOUR)
    with pytest.raises(ObjectComposeError, match="`shape`.*'crop'"):
        reference_pixels(plain_picture(4, 4), 8, COLOUR, shape="crop")
    with pytest.raises(ObjectComposeError, match="`margin`.*-0.1"):
        reference_pixels(plain_picture(4, 4), 8, COLOUR, margin=-0.1)
    with pytest.raises(CheckpointError, match="image_encoder"):
        encoder_side(None)


def test_the_mean_colour_is_zero_to_the_encoder():
    mean, std = clip_statistics()
    canvas = mean[:, None, None].expand(3, 5, 5)
    assert not normalize_pixels(canvas, mean, std).any()
    torch.testing.assert_close(mean, torch.tensor(CLIP_PIXEL_MEAN))
    half = CLIPImageProcessor(image_mean=[0.5] * 3, image_std=[0.25] * 3)
    mean, std = clip_statistics(half)
    torch.testing.assert_close(normalize_pixels(torch.ones(2, 3, 4, 4), mean, std), torch.full((2, 3, 4, 4), 2.0))


def test_normalisation_is_that_of_clips_own_preparation():
    image = Image.effect_noise((224, 224), 90).convert("RGB")
    expected = CLIPImageProcessor()(image, return_tensors="pt").pixel_values[0]
    found = normalize_pixels(reference_pixels(image, 224, COLOUR), *clip_statistics(CLIPImageProcessor()))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)


def test_features_are_the_encoders_own():
    encoder = tiny_image_encoder()
    side = encoder_side(encoder)
    pixels = torch.randn(3, 3, side, side)
    with torch.no_grad():
        features = encode_references(encoder, pixels)
        inner = encoder.vision_model(pixels, output_hidden_states=True)
        whole = encoder(pixels)
    torch.testing.assert_close(features.pooled, inner.pooler_output)
    torch.testing.assert_close(features.embeds, whole.image_embeds)
    torch.testing.assert_close(features.grid, inner.hidden_states[-2])
    assert features.grid.shape[1] == 1 + (side // encoder.config.patch_size) ** 2


def test_null_features_are_zero_vectors_and_the_grid_of_a_blank_picture():
    encoder = tiny_image_encoder()
    with torch.no_grad():
        features = null_features(encoder)
        mean, std = clip_statistics()
        canvas = mean[:, None, None].expand(3, encoder_side(encoder), encoder_side(encoder))
        blank = encode_references(encoder, normalize_pixels(canvas, mean, std)[None])
    assert not features.pooled.any() and not features.embeds.any()
    assert torch.equal(features.grid, blank.grid) and features.grid.any()


def test_half_precision_encoders_read_float_pixels():
    encoder = tiny_image_encoder().to(torch.bfloat16)
    with torch.no_grad():
        features = encode_references(encoder, torch.zeros(1, 3, encoder_side(encoder), encoder_side(encoder)))
    assert features.pooled.dtype == torch.bfloat16 and torch.isfinite(features.grid).all()


def test_nothing_is_read_from_an_encoder_that_is_offloaded_again(monkeypatch):
    encoder, kept = tiny_image_encoder(), {}
    side = encoder_side(encoder)
    pixels = torch.randn(2, 3, side, side)

    def take_away(group: group_offloading.ModuleGroup) -> None:
        for weight in (weight for module in group.modules for weight in module.parameters()):
            kept.setdefault(weight, weight.data)
            weight.data = torch.full_like(weight.data, float("nan"))  # what is on another device counts for nothing

    def bring(group: group_offloading.ModuleGroup) -> None:
        for weight in (weight for module in group.modules for weight in module.parameters()):
            weight.data = kept.get(weight, weight.data)

    with torch.no_grad():
        expected = encode_references(encoder, pixels)
        monkeypatch.setattr(group_offloading.ModuleGroup, "_offload_to_memory", take_away)
        monkeypatch.setattr(group_offloading.ModuleGroup, "_onload_from_memory", bring)
        device = torch.device("cpu")
        group_offloading.apply_group_offloading(encoder, device, device, "block_level", num_blocks_per_group=1)
        found = encode_references(encoder, pixels)
    assert kept
    for name in ("pooled", "embeds", "grid"):
        assert torch.equal(getattr(found, name), getattr(expected, name))
