"""Training in 3-D: levels, patches of a volume, held-out slices with their neighbours, weights."""

import dataclasses
import json

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from tests.helper import FLOAT32, load_training_data, measures, noise, write_stack
from unet_ray.errors import InputError
from unet_ray.network.checkpoints import read_model
from unet_ray.report.page import write_report
from unet_ray.segmentation.segment import segment
from unet_ray.training.labels import load_labels
from unet_ray.training.maps import weighted
from unet_ray.training.patches import Sampler
from unet_ray.training.recipes import Recipe, levels_along_z
from unet_ray.training.train import train
from unet_ray.training.validation import _some_slices
from unet_ray.training.volumetric import draw_warp, warp, warp_image, warp_labels
from unet_ray.training.weights import border_term, separate, weight_map

TINY = {"dims": 3, "base_channels": 2, "depth": 1, "steps": 12, "elastic": 2.0, "seed": 1}
TINY |= {"precision": "float32", "learning_rate": 0.02, "patch": (28, 32, 32)}


@pytest.mark.parametrize(
    ("size", "levels"),
    [
        ((1, 1, 1), ((3, 2),) * 4),
        ((1.5, 1, 1), ((3, 2),) * 4),
        ((1.6, 1, 1), ((1, 1), (3, 2), (3, 2), (3, 2))),
        ((45, 4.6, 4.6), ((1, 1), (1, 1), (1, 1), (3, 2))),
        ((100, 1, 1), ((1, 1),) * 4),
    ],
)
def test_z_is_convolved_where_voxels_are_nearly_as_long_along_it(size, levels):
    assert levels_along_z(3, size) == levels


def test_patches_fit_the_levels():
    recipe = Recipe.of("default", dims=3)
    assert recipe.fitted((45, 4.6, 4.6)).patch == (20, 156, 156)
    assert recipe.fitted(None).patch == (108, 156, 156)
    assert recipe.fitted((1, 1, 1)).output == (20, 68, 68)
    with pytest.raises(InputError, match="patch=30 does not fit"):
        Recipe.of("default", dims=3, patch=(30, 156, 156)).fitted(None)
    with pytest.raises(InputError, match="must be Z,Y,X for a network in 3-D"):
        Recipe.of("default", dims=3, patch=(156, 156)).fitted(None)


def test_an_unchanged_warp_is_the_patch_itself():
    volume = np.random.default_rng(0).standard_normal((2, 5, 6, 7)).astype(np.float32)
    centre = (2.0, 2.5, 3.0)
    same = warp((5, 6, 7), np.eye(3), np.zeros((3, 3, 3, 3)))
    np.testing.assert_array_equal(warp_image(volume, centre, same), volume)
    np.testing.assert_array_equal(warp_labels(volume[0], centre, same), volume[0])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([(1, 1, 1), (4, 1, 1), (3, 1.2, 1)]))
def test_warped_images_are_those_of_linear_interpolation(seed, spacing):
    rng = np.random.default_rng(seed)
    shape = (4, 5, 6)
    drawn = draw_warp(shape, rng, 1.5, spacing)
    centre = np.array(drawn.reach((0, 0, 0)).start) * -1.0 + rng.uniform(0, 1, 3)
    box = drawn.reach(centre)
    window = rng.standard_normal((2, *(n + 1 for n in box.stop))).astype(np.float32)
    places = drawn.offsets.astype(float) + centre[:, None, None, None]
    for image, got in zip(window, warp_image(window, centre, drawn), strict=True):
        expected = ndimage.map_coordinates(image, places, order=1)
        np.testing.assert_allclose(got, expected, atol=1e-5)
    nearest = np.floor(places + 0.5).astype(int)
    np.testing.assert_array_equal(warp_labels(window[0], centre, drawn), window[0][tuple(nearest)])


def test_displacements_have_the_same_physical_size_along_all_axes():
    rng = np.random.default_rng(0)
    shape, spacing = (9, 9, 9), np.array([5.0, 1.0, 1.0])
    sizes = []
    for _ in range(300):
        offsets = draw_warp(shape, rng, 3.0, spacing).offsets
        sizes.append(offsets[:, 4, 4, 4] * spacing)  # the centre moves by its node alone
    np.testing.assert_allclose(np.std(sizes, 0), 3.0, rtol=0.15)


def test_a_rotation_keeps_distances_in_the_plane_and_only_flips_z():
    offsets = draw_warp((3, 9, 9), np.random.default_rng(3), 0.0, (4.0, 1.0, 1.0)).offsets
    in_plane = offsets[1:, 1].reshape(2, -1)
    expected = np.hypot(*np.mgrid[-4:5, -4:5].reshape(2, -1))
    np.testing.assert_allclose(np.hypot(*in_plane), expected, atol=1e-5)
    np.testing.assert_allclose(np.abs(offsets[0, :, 4, 4]), [1, 0, 1], atol=1e-6)


@pytest.fixture
def pair(tmp_path):
    """Paths of an image and of labels in which grey values show the class."""
    image = noise((24, 40, 44))
    smooth = ndimage.gaussian_filter(np.random.default_rng(0).standard_normal(image.shape), 3)
    labels = np.where(smooth > 0, 255, 0).astype(np.uint8)
    image = (image // 3 + np.where(labels, 120, 0)).astype(np.uint8)
    return [str(write_stack(tmp_path / f"{n}.tif", a)) for n, a in (("i", image), ("l", labels))]


def test_a_patch_beside_held_out_slices_sees_their_grey_values_but_not_their_labels(pair):
    recipe = Recipe.of("default", **TINY, val="4:8,20:22").fitted(None)
    data = load_training_data([pair[0]], [pair[1]], recipe)
    (volume,), (held_out,) = data.volumes, data.held_out
    assert volume.image.shape == (1, 24, 40, 44)
    out = [4, 5, 6, 7, 20, 21]
    assert not volume.weights[out].any() and volume.weights[[0, 3, 8, 23]].all()
    assert held_out.planes == tuple(out) and held_out.targets.shape == (6, 40, 44)
    np.testing.assert_array_equal(held_out.slices, volume.image[:, out])


def test_samples_are_repeatable_parts_of_the_volume(pair):
    recipe = Recipe.of("default", **TINY | {"elastic": 0.0}).fitted(None)
    data = load_training_data([pair[0]], [pair[1]], recipe)
    one, two = (Sampler(data, recipe)[5, 0] for _ in range(2))
    assert one.image.shape == (1, 28, 32, 32) and one.targets.shape == recipe.output
    for name in ("image", "targets", "weights"):
        np.testing.assert_array_equal(getattr(one, name), getattr(two, name))
    # Class 1 is bright: image and labels are deformed alike.
    inner = one.image[0][tuple(slice((p - o) // 2, (p - o) // 2 + o) for p, o in
                               zip(recipe.patch, recipe.output, strict=True))]  # fmt: skip
    assert inner[one.targets == 1].mean() > inner[one.targets == 0].mean() + 1
    assert one.in_the_middle().image.shape == (1, 32, 32)


def test_the_weight_map_in_3d_sees_cells_of_other_slices():
    cells = np.zeros((5, 9, 9), int)
    cells[0], cells[4] = 1, 2
    targets = (cells != 0).astype(np.uint8)
    flat = weight_map(targets, 2, 10.0, 5.0, np.ones(2, np.float32), cells)
    solid = weight_map(targets, 2, 10.0, 5.0, np.ones(2, np.float32), cells, (2.0, 1.0, 1.0))
    assert (flat == 1).all()
    expected = 1 + border_term(cells, 10.0, 5.0, (2.0, 1.0, 1.0))
    np.testing.assert_array_equal(solid[targets == 0], expected[targets == 0])
    # Between slices at distances of 2 and 6 voxels.
    np.testing.assert_allclose(solid[1], 1 + 10 * np.exp(-((2 + 6) ** 2) / 50), rtol=1e-6)


def test_cells_that_touch_along_z_are_separated_in_3d_only():
    cells = np.repeat([1, 1, 2, 2], 9).reshape(4, 3, 3)
    assert separate(cells).all()
    assert (separate(cells, 3)[:, 1, 1] == [True, False, False, True]).all()


def test_a_network_in_3d_learns_and_segments(pair, tmp_path):
    recipe = Recipe.of("default", **TINY | {"steps": 60}, val="8:12")
    model = train([pair[0]], [pair[1]], tmp_path / "run", recipe)
    network, header = read_model(model)
    assert network.levels[0].kernel == (3, 3, 3) and header.training["recipe"]["dims"] == 3
    scores = [m["validation"] for m in measures(tmp_path / "run") if m.get("validation")]
    assert scores[-1]["iou"] > 0.8, json.dumps(scores)
    store = segment(pair[0], model, tmp_path / "out.zarr", FLOAT32)
    assert (store / "zarr.json").exists()


def test_a_training_in_3d_resumes_with_the_same_weights(pair, tmp_path):
    def trained(name, watch=lambda measure: None):
        recipe = Recipe.of("default", **TINY)
        return train(
            [pair[0]], [pair[1]], tmp_path / name, recipe, watch=watch, checkpoint_seconds=0.0
        )

    class StoppedError(Exception):
        pass

    def stop(measure):
        if measure.step >= 5:
            raise StoppedError

    with pytest.raises(StoppedError):
        trained("stopped", stop)
    whole, resumed = (read_model(trained(name))[0].state_dict() for name in ("whole", "stopped"))
    for name, weight in whole.items():
        np.testing.assert_array_equal(resumed[name].numpy(), weight.numpy())


def test_objects_are_learned_in_3d(pair, tmp_path):
    numbers = ndimage.label(np.random.default_rng(1).random((24, 40, 44)) > 0.5)[0]
    labels = write_stack(tmp_path / "cells.tif", np.minimum(numbers, 3).astype(np.uint8))
    recipe = Recipe.of("default", **TINY | {"steps": 2}, labels_are="instances")
    model = train([pair[0]], [str(labels)], tmp_path / "cells", recipe)
    assert read_model(model)[1].class_values == [0, 1]


def test_voxels_that_are_too_long_along_z_are_refused_before_any_work(pair, tmp_path):
    recipe = Recipe.of("default", **TINY, voxel_size=(50.0, 4.0, 4.0))
    with pytest.raises(InputError, match=r"12\.5 times as long along z.* set --dims 2, a larger"):
        train([pair[0]], [pair[1]], tmp_path / "run", recipe)
    assert not (tmp_path / "run").exists()


def test_weight_maps_of_another_voxel_size_are_not_used_again(pair, tmp_path):
    recipe = Recipe.of("default", **TINY, w0=10.0)
    one, two = (dataclasses.replace(recipe, voxel_size=(z, 1.0, 1.0)) for z in (1.0, 3.0))
    data, again = (
        weighted(load_labels([pair[0]], [pair[1]], each), each, tmp_path / "weights.safetensors")
        for each in (one, two)
    )
    assert not np.array_equal(again.volumes[0].weights, data.volumes[0].weights)


def test_a_threshold_is_chosen_on_labelled_slices(pair):
    labels = tifffile.imread(pair[1])
    labels[[n for n in range(24) if n not in (2, 21)]] = 7
    tifffile.imwrite(pair[1], labels)
    recipe = Recipe.of("default", **TINY, ignore_label=7).fitted(None)
    data = load_training_data([pair[0]], [pair[1]], recipe)
    (chosen,) = _some_slices(data, 3)
    assert chosen.planes == (2, 21)


def test_patches_of_few_labelled_slices_show_them(pair):
    labels = tifffile.imread(pair[1])
    labels[[n for n in range(24) if n != 21]] = 7
    tifffile.imwrite(pair[1], labels)
    recipe = Recipe.of("default", **TINY | {"elastic": 0.0}, ignore_label=7).fitted(None)
    sampler = Sampler(load_training_data([pair[0]], [pair[1]], recipe), recipe)
    assert all(sampler[step, 0].weights.any() for step in range(10))


def test_fine_tuning_keeps_the_levels(pair, tmp_path):
    recipe = Recipe.of("default", **TINY | {"steps": 2}, voxel_size=(2.0, 1.0, 1.0))
    model = train([pair[0]], [pair[1]], tmp_path / "first", recipe)
    options = {"start": str(model), "steps": 2, "patch": (24, 32, 32), "precision": "float32"}
    second = train([pair[0]], [pair[1]], tmp_path / "second", Recipe.of("default", **options))
    levels = [read_model(path)[0].z_levels for path in (model, second)]
    assert levels == [((1, 1), (3, 2))] * 2


@pytest.mark.slow
@pytest.mark.ray
def test_workers_of_ray_draw_patches_of_a_volume(pair, tmp_path, local_ray):
    recipe = Recipe.of("default", **TINY | {"steps": 4})
    models = [
        train([pair[0]], [pair[1]], tmp_path / engine, recipe, engine=engine, memory=memory)
        for engine, memory in (("local", None), ("ray", 1))  # on Ray they are read by windows
    ]
    local, on_ray = (read_model(model)[0].state_dict() for model in models)
    for name, weight in local.items():
        np.testing.assert_allclose(on_ray[name].numpy(), weight.numpy(), atol=1e-4)


def test_the_report_shows_the_middle_of_patches(pair, tmp_path):
    recipe = Recipe.of("default", **TINY | {"steps": 3}, val="8:10")
    train([pair[0]], [pair[1]], tmp_path / "run", recipe)
    page = write_report(str(tmp_path / "run")).read_text()
    assert "The 16 first patches" in page or page.count("<img") > 5
