import io

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image

from unet_ray.errors import InputError
from unet_ray.report import pictures
from unet_ray.report.pictures import (
    colour_cells,
    colour_classes,
    colour_log,
    colour_map,
    encode_png,
    few_greys,
    frame,
    overlay,
    side_by_side,
    strike_out,
    to_grey,
    write_png,
)

DTYPES = [np.bool_, np.uint8, np.int8, np.uint16, np.int32, np.uint64, np.float32, np.float64]
grey_pictures = arrays(np.uint8, array_shapes(min_dims=2, max_dims=2, max_side=12))


def luminance(rgb):
    """CIE Y of sRGB."""
    linear = (np.asarray(rgb) / 255) ** 2.2
    return linear @ np.array([0.2126, 0.7152, 0.0722])


@pytest.mark.parametrize("dtype", DTYPES)
def test_grey_of_any_dtype_spans_black_to_white(dtype):
    ramp = np.linspace(0, 1, 64).reshape(8, 8).round() if dtype == np.bool_ else np.arange(64)
    grey = to_grey(np.reshape(ramp, (8, 8)).astype(dtype))
    assert grey.dtype == np.uint8
    assert grey.shape == (8, 8)
    assert (grey.min(), grey.max()) == (0, 255)
    assert (np.diff(grey.ravel().astype(int)) >= 0).all()


def test_grey_keeps_given_limits():
    grey = to_grey(np.array([[-5.0, 0.0, 1.0, 2.0, 9.0]]), low=0, high=2)
    np.testing.assert_array_equal(grey, [[0, 0, 128, 255, 255]])


def test_grey_is_not_dominated_by_a_few_outliers():
    values = np.tile(np.arange(100.0), (100, 1))
    values[0, 0] = 1e9
    assert to_grey(values)[50, 99] == 255


def test_grey_shows_a_few_differing_pixels():
    values = np.zeros((100, 100))
    values[3, 4] = 7
    grey = to_grey(values)
    assert grey[3, 4] == 255
    assert np.count_nonzero(grey) == 1


@pytest.mark.parametrize("value", [0, 1, 7, 255])
def test_grey_of_a_constant_slice_is_middle_grey(value):
    assert (to_grey(np.full((3, 4), value, np.uint8)) == 128).all()


def test_grey_of_nan_and_infinity():
    grey = to_grey(np.array([[np.nan, -np.inf, 0, 1, np.inf]]), low=0, high=1)
    np.testing.assert_array_equal(grey, [[0, 0, 0, 255, 255]])
    assert (to_grey(np.full((2, 2), np.nan)) == 0).all()


def test_colour_map_gets_lighter_with_every_level():
    rgb = colour_map(np.arange(256, dtype=np.uint8)[None])
    assert rgb.shape == (1, 256, 3)
    assert rgb.dtype == np.uint8
    assert (np.diff(luminance(rgb[0, ::3])) > 0).all()
    assert (np.diff(luminance(rgb[0])) >= 0).all()
    np.testing.assert_array_equal(rgb[0, [0, 255]], [(68, 1, 84), (253, 231, 37)])


def test_class_colours_differ_and_background_is_black():
    rgb = colour_classes(np.arange(9, dtype=np.uint8)[None])
    assert rgb.shape == (1, 9, 3)
    assert rgb.dtype == np.uint8
    assert len(np.unique(rgb[0, :8], axis=0)) == 8
    assert (rgb[0, 0] == 0).all()
    np.testing.assert_array_equal(rgb[0, 8], rgb[0, 1])


def test_logarithmic_colours():
    values = np.array([[0.1, 1.0, 10.0, 100.0, 0.0, -1.0, 1000.0]])
    rgb = colour_log(values, 1.0, 100.0)
    expected = colour_map(np.array([[0, 0, 128, 255, 0, 0, 255]], np.uint8))
    expected[0, 4:6] = 0
    np.testing.assert_array_equal(rgb, expected)
    assert colour_log(np.ones((2, 2)), 1.0, 1.0).shape == (2, 2, 3)


@pytest.mark.parametrize("dtype", [np.uint8, np.uint64])
def test_cells_have_random_colours_on_black(dtype):
    labels = np.arange(64, dtype=dtype).reshape(8, 8).repeat(4, 0).repeat(4, 1)
    rgb = colour_cells(labels)
    assert (rgb[labels == 0] == 0).all()
    assert rgb[labels > 0].any(-1).all()
    colours = np.unique(rgb[labels > 0], axis=0)
    assert len(colours) == 12
    assert np.ptp(luminance(colours)) > 0.5
    for label in (1, 40, 63):
        assert len(np.unique(rgb[labels == label], axis=0)) == 1
    np.testing.assert_array_equal(rgb, colour_cells(labels))


@pytest.mark.parametrize("gap", [0, 5, 11])
def test_neighbouring_cells_differ(gap):
    cells = np.random.default_rng(0).permutation(np.arange(1, 401)).reshape(20, 20)
    labels = cells.repeat(8 + gap, 0).repeat(8 + gap, 1)
    inside = np.arange(len(labels)) % (8 + gap) < 8
    labels[~(inside[:, None] & inside)] = 0
    rgb = colour_cells(labels)
    shown = rgb[4 :: 8 + gap, 4 :: 8 + gap].astype(int)
    for axis in (0, 1):
        assert np.diff(shown, axis=axis).any(-1).all()
    np.testing.assert_array_equal(rgb, colour_cells(labels))


def test_distant_cells_may_share_a_colour():
    labels = np.arange(1, 401).reshape(20, 20).repeat(30, 0).repeat(30, 1)
    inside = np.arange(len(labels)) % 30 < 8
    labels[~(inside[:, None] & inside)] = 0
    shown = colour_cells(labels)[4::30, 4::30].astype(int)
    assert not np.diff(shown, axis=0).any(-1).all()


def test_more_neighbours_than_colours_are_still_coloured():
    labels = np.arange(1, 17, dtype=np.int64).reshape(4, 4).repeat(2, 0).repeat(2, 1)
    labels = np.pad(labels, ((0, 0), (20, 0)))
    assert colour_cells(labels)[labels > 0].any(-1).all()


def test_an_image_shows_through_the_cells_and_the_file_stays_a_palette():
    rng = np.random.default_rng(0)
    image = rng.integers(256, size=(60, 60), dtype=np.uint8)
    labels = np.ones((60, 60), int) + np.arange(60) // 3
    rgb = colour_cells(labels, image)
    seen = np.corrcoef(image[:, :3].ravel(), rgb[:, :3].mean(-1).ravel())[0, 1]
    assert seen > 0.99
    assert len(np.unique(rgb.reshape(-1, 3), axis=0)) <= 241
    assert (colour_cells(np.zeros((4, 4), int), image[:4, :4]) == 0).all()


@given(grey_pictures, st.integers(2, 256))
def test_few_greys_are_few_and_near(image, levels):
    fewer = few_greys(image, levels)
    assert fewer.dtype == np.uint8
    assert len(np.unique(fewer)) <= levels
    assert np.abs(fewer.astype(int) - image).max() <= 127 / (levels - 1) + 1
    np.testing.assert_array_equal(few_greys(image, 256), image)


def test_a_frame_dims_only_its_outside():
    image = np.full((20, 30), 200, np.uint8)
    framed = frame(image, 5, 8, 6, 10)
    assert (framed[5:11, 8:18] == 200).all()
    np.testing.assert_array_equal(framed[0, 0], (120, 120, 120))
    np.testing.assert_array_equal(framed[3, 10], (240, 228, 66))
    np.testing.assert_array_equal(framed[[4, 2], 10], np.zeros((2, 3)))
    assert (image == 200).all()
    np.testing.assert_array_equal(frame(image, 0, 0, 20, 30), np.stack([image] * 3, -1))


def test_struck_out_pixels_are_grey_with_lines():
    image = np.full((24, 24), 7, np.uint8)
    where = np.zeros((24, 24), bool)
    where[:, 12:] = True
    struck = strike_out(image, where)
    assert (struck[:, :12] == 7).all()
    assert set(np.unique(struck[:, 12:])) == {120, 230}
    assert (image == 7).all()


@pytest.mark.parametrize("dtype", [np.uint8, np.uint32, np.uint64])
def test_ids_of_any_size_are_coloured(dtype):
    labels = np.array([[0, np.iinfo(dtype).max // 2]], dtype)
    assert colour_classes(labels)[0, 1].any()


def test_overlay_colours_at_known_pixels():
    image = np.full((5, 6), 100, np.uint8)
    mask = np.zeros((5, 6), bool)
    mask[0, 0] = mask[2, 2] = True
    truth = np.zeros((5, 6), bool)
    truth[1:4, 1:4] = True
    rgb = overlay(image, mask, truth)
    assert rgb.dtype == np.uint8
    np.testing.assert_array_equal(rgb[0, 0], (60, 162, 162))
    np.testing.assert_array_equal(rgb[2, 2], (60, 162, 162))
    np.testing.assert_array_equal(rgb[1, 1:4], [(255, 255, 0)] * 3)
    np.testing.assert_array_equal(rgb[4, 5], (100, 100, 100))


@given(grey_pictures)
def test_an_empty_overlay_is_the_grey_image(image):
    nothing = np.zeros(image.shape, bool)
    for truth in (None, nothing, ~nothing):
        np.testing.assert_array_equal(overlay(image, nothing, truth), np.stack([image] * 3, -1))


def test_touching_objects_of_the_truth_have_a_border_between_them():
    truth = np.zeros((3, 6), np.uint16)
    truth[:, :3], truth[:, 3:5] = 300, 7
    rgb = overlay(np.zeros((3, 6), np.uint8), np.zeros((3, 6), bool), truth)
    yellow = (rgb == (255, 255, 0)).all(-1)
    np.testing.assert_array_equal(yellow, [[False, False, True, True, True, False]] * 3)


def test_overlay_does_not_change_its_image():
    image = np.full((4, 4), 9, np.uint8)
    overlay(image, np.ones((4, 4), bool), np.eye(4, dtype=bool))
    assert (image == 9).all()


@settings(max_examples=20, deadline=None)
@given(st.lists(st.integers(1, 60), min_size=1, max_size=4), st.integers(0, 12))
def test_panels_are_side_by_side_below_their_captions(widths, gap):
    panels = [np.full((20, w), i, np.uint8) for i, w in enumerate(widths)]
    composite = side_by_side(panels, ["a b"] * len(panels), gap)
    assert composite.shape[1:] == (sum(widths) + gap * (len(widths) - 1), 3)
    left = 0
    for i, width in enumerate(widths):
        assert (composite[-20:, left : left + width] == i).all()
        assert (composite[:, left + width : left + width + gap] == 255).all()
        left += width + gap


def test_grey_and_coloured_panels_mix():
    grey = np.full((9, 30), 5, np.uint8)
    composite = side_by_side([grey, colour_map(grey)], ["grey", "colour"])
    np.testing.assert_array_equal(composite[-9:, :30], np.stack([grey] * 3, -1))
    np.testing.assert_array_equal(composite[-9:, 38:], colour_map(grey))


def test_captions_are_dark_on_white_and_differ_with_the_text():
    panel = np.zeros((4, 120), np.uint8)
    bars = [side_by_side([panel], [text])[:-4] for text in ("image", "truth", "")]
    assert (bars[0] < 64).sum() > 50
    assert (bars[0] != bars[1]).any()
    assert (bars[2] == 255).all()


def test_a_long_caption_is_wrapped_not_cut():
    panel = np.zeros((4, 60), np.uint8)
    short, long = (side_by_side([panel], [t]) for t in ("one", "one two three four five six"))
    assert long.shape[0] >= short.shape[0] + 2 * pictures.LINE_HEIGHT
    assert (long[:-4, -1] == 255).all()


@pytest.mark.parametrize(
    ("shapes", "captions"), [([], []), ([(4, 4), (5, 4)], ["a", "b"]), ([(4, 4)], [])]
)
def test_panels_that_do_not_fit_are_refused(shapes, captions):
    with pytest.raises(ValueError, match="one height and one caption"):
        side_by_side([np.zeros(s, np.uint8) for s in shapes], captions)


@pytest.mark.parametrize("shape", [(5, 7), (5, 7, 3)])
def test_png_round_trip(tmp_path, shape):
    picture = np.arange(np.prod(shape), dtype=np.uint8).reshape(shape)
    path = tmp_path / "picture.png"
    write_png(path, np.zeros((2, 2), np.uint8))
    write_png(str(path), picture)
    with Image.open(path) as image:
        assert image.format == "PNG"
        np.testing.assert_array_equal(pixels(image, picture.ndim), picture)
    assert list(tmp_path.iterdir()) == [path]


def pixels(image, axes):
    """The pixels of an image in any mode."""
    return np.asarray(image.convert("RGB" if axes == 3 else "L"))


@pytest.mark.parametrize("colours", [1, 256, 257, 5000])
def test_few_colours_are_a_palette_and_none_changes(colours):
    rng = np.random.default_rng(colours)
    table = rng.integers(256, size=(colours, 3), dtype=np.uint8)
    picture = table[rng.permutation(np.arange(100 * 100) % colours).reshape(100, 100)]
    with Image.open(io.BytesIO(encode_png(picture))) as image:
        assert image.mode == ("P" if colours <= 256 else "RGB")
        np.testing.assert_array_equal(pixels(image, 3), picture)


@pytest.mark.parametrize("step", ["replace", "save"])
def test_a_failed_write_leaves_the_old_file_and_no_other(tmp_path, monkeypatch, step):
    path = tmp_path / "picture.png"
    write_png(path, np.zeros((2, 2), np.uint8))
    before = path.read_bytes()

    def fail(self, target, **_):
        if step == "save":
            target.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(
        *((pictures.os, "replace") if step == "replace" else (Image.Image, "save")), fail
    )
    with pytest.raises(OSError, match="disk full"):
        write_png(path, np.ones((2, 2), np.uint8))
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(InputError, match="nowhere does not exist"):
        write_png(tmp_path / "nowhere" / "a.png", np.zeros((2, 2), np.uint8))


@pytest.mark.parametrize(
    "picture", [np.zeros((2, 2)), np.zeros((2, 2, 4), np.uint8), np.zeros(3, np.uint8)]
)
def test_arrays_that_are_not_pictures_are_refused(tmp_path, picture):
    with pytest.raises(ValueError, match="uint8"):
        write_png(tmp_path / "a.png", picture)
    assert not list(tmp_path.iterdir())
