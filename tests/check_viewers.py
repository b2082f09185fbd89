"""Other programs read a store: run by hand, `python -m tests.check_viewers STORE`.

It needs an environment of its own, with `pip install zarr tensorstore yaozarrs napari
napari-ome-zarr`, but no display. It checks that:

- yaozarrs finds the metadata and arrays valid;
- tensorstore reads each voxel of each level as zarr-python does, checksums included;
- the levels begin where level 0 begins, and end less than one of their voxels after it;
- napari-ome-zarr returns each image and label with its levels, voxel size and window.
"""

import sys
from contextlib import redirect_stdout
from io import StringIO
from itertools import product
from pathlib import Path

import numpy as np
import tensorstore
import yaozarrs
import zarr
from napari_ome_zarr import napari_get_reader


def ome(group):
    """The OME metadata of a group."""
    return zarr.open_group(group, mode="r").attrs["ome"]


def images(store):
    """The groups of a store that are images: the root, then its labels."""
    labels = store / "labels"
    return [store, *(labels / name for name in (ome(labels)["labels"] if labels.exists() else []))]


def levels(image):
    """The levels of an image, as their metadata."""
    return ome(image)["multiscales"][0]["datasets"]


def check_voxels(path):
    """Compares two libraries that share no code, one shard at a time; returns the shape."""
    array = zarr.open_array(path, mode="r")
    kvstore = {"driver": "file", "path": f"{path}/"}
    other = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, read=True).result()
    assert (other.shape, other.dtype.numpy_dtype) == (array.shape, array.dtype)
    axes = zip(array.shape, array.shards, strict=True)
    for box in product(*([slice(a, min(a + s, n)) for a in range(0, n, s)] for n, s in axes)):
        np.testing.assert_array_equal(other[box].read().result(), array[box])
    return array.shape


def borders(level, shape):
    """First and last border of a level, and the size of its voxels, in units of space."""
    scale, *translation = level["coordinateTransformations"]
    size = np.array(scale["scale"])
    centre = np.array(translation[0]["translation"]) if translation else np.zeros(len(size))
    return centre - size / 2, centre + size * (np.array(shape) - 0.5), size


def check_places(image, shapes):
    """Checks where the levels of an image begin and end."""
    first, last, _ = borders(levels(image)[0], shapes[0])
    for level, shape in zip(levels(image), shapes, strict=True):
        begin, end, size = borders(level, shape)
        np.testing.assert_allclose(begin, first, atol=1e-9)
        assert np.all(end > last - 1e-9) and np.all(end < last + size)


def check_layers(store, shapes):
    """Compares the layers that napari-ome-zarr returns with the metadata."""
    with redirect_stdout(StringIO()):  # it prints all metadata
        layers = napari_get_reader(str(store))(str(store))
    for image, (arrays, layer, kind) in zip(images(store), layers, strict=True):
        assert kind == ("image" if image == store else "labels")
        assert [array.shape for array in arrays] == shapes[image]
        scale = levels(image)[0]["coordinateTransformations"][0]["scale"]
        np.testing.assert_allclose(layer["scale"], scale[-3:])
        np.testing.assert_allclose(layer["affine"].affine_matrix, np.eye(4))
        windows = [channel["window"] for channel in ome(image).get("omero", {}).get("channels", [])]
        limits = [[window["start"], window["end"]] for window in windows]
        if kind == "image":
            shown = layer["contrast_limits"]
            assert shown == (limits if "channel_axis" in layer else limits[0])
        print(f"napari-ome-zarr: {kind} {layer['name']}, {len(arrays)} levels")


def main(store):
    """Runs all checks on one store."""
    for group in (*images(store), *store.glob("labels")):
        yaozarrs.validate_zarr_store(str(group))
        print(f"yaozarrs: {group} is valid")
    shapes = {}
    for image in images(store):
        shapes[image] = [check_voxels(image / level["path"]) for level in levels(image)]
        check_places(image, shapes[image])
        print(f"tensorstore: {image} has equal voxels at {len(shapes[image])} levels")
    check_layers(store, shapes)


if __name__ == "__main__":
    main(Path(sys.argv[1]).resolve())
