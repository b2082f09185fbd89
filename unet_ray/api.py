"""The functions of ``import unet_ray``: the verbs of the command line, for scripts and notebooks.

Knows keywords, progress bars and how results print. Does not know how any result is computed.
"""

from __future__ import annotations

import html
import inspect
import os
from collections.abc import Callable, Sequence
from dataclasses import MISSING, fields
from functools import wraps
from pathlib import Path
from typing import Any, Literal, ParamSpec, TypeVar

import numpy as np
import pyarrow
from numpy.typing import NDArray
from pyarrow import parquet

from unet_ray.engine.cluster import chosen_engine
from unet_ray.engine.rounds import Progress
from unet_ray.errors import DamageError, InputError, nearest, reason
from unet_ray.machine import keep_freed_memory
from unet_ray.network.checkpoints import find_model, read_model
from unet_ray.progress import ProgressBar, TilesBar, TrainingBar
from unet_ray.report import export as exporting
from unet_ray.report.figures import by, figure
from unet_ray.report.page import write_report
from unet_ray.report.pictures import colour_classes, colour_map
from unet_ray.report.results import Result, open_result, windows
from unet_ray.scores import evaluation
from unet_ray.scores.evaluation import Evaluation, Kind
from unet_ray.segmentation import outlook, verification
from unet_ray.segmentation import segment as segmenting
from unet_ray.segmentation.arrays import predict_volume
from unet_ray.segmentation.forecast import describe
from unet_ray.segmentation.outlook import Outlook
from unet_ray.segmentation.settings import Settings
from unet_ray.segmentation.verification import Verification
from unet_ray.storage.layout import ARRAYS, TABLE
from unet_ray.storage.objects import ObjectPath
from unet_ray.storage.places import PathOrUrl, Place, open_array, place_of
from unet_ray.storage.written import read_table
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import TilePlan
from unet_ray.training import train as training
from unet_ray.training.recipes import Recipe
from unet_ray.training.run_folder import OnMeasure, time_of_model
from unet_ray.units import (
    parse_bytes,
    parse_patch,
    parse_region,
    parse_tile,
    parse_voxel_size,
    parse_workers,
)
from unet_ray.volumes.omissions import report_omissions
from unet_ray.volumes.opening import open_volume

Image = PathOrUrl | NDArray[Any]
"""A path, or an array (y, x), (z, y, x) or (c, z, y, x)."""
P = ParamSpec("P")
T = TypeVar("T")


def _with_keywords(kind: type, *left_out: str) -> Callable[[Callable[P, T]], Callable[P, T]]:
    """Gives a function that takes ``**flags`` the fields of a dataclass as named keywords.

    Editors and `help` then show each keyword with its default, and a misspelt one is refused.
    """
    keywords = [
        inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None if field.default is MISSING else field.default,
            annotation=field.type,
        )
        for field in fields(kind)
        if field.name not in left_out
    ]
    names = {keyword.name for keyword in keywords}

    def decorate(function: Callable[P, T]) -> Callable[P, T]:
        own = inspect.signature(function)
        parameters = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]

        @wraps(function)
        def checked(*args: P.args, **flags: P.kwargs) -> T:
            for name in flags:
                if name not in names and name not in own.parameters:
                    raise TypeError(
                        f"{function.__name__}() has no keyword {name!r}"
                        f"{nearest(name, [*names, *own.parameters])}."
                    )
            return function(*args, **flags)

        checked.__signature__ = own.replace(parameters=[*parameters, *keywords])  # type: ignore[attr-defined]
        return checked

    return decorate


def settings_of(**flags: Any) -> Settings:
    """Settings from the keywords of `segment`; some may be the flag's text.

    Raises:
        InputError: if a text cannot be read as a value.
    """
    parsers: dict[str, Callable[[Any], Any]] = {
        "outputs": lambda text: tuple(text.split(",")),
        "region": lambda text: Box(*parse_region(text)),
        "tile": parse_tile,
        "memory": parse_bytes,
    }
    values = {
        name: parsers[name](value) if name in parsers and isinstance(value, str) else value
        for name, value in flags.items()
    }
    for name in ("outputs", "tile"):
        if isinstance(values.get(name), list):
            values[name] = tuple(values[name])
    region, tile = values.get("region"), values.get("tile")
    if region is not None and not isinstance(region, Box):
        values["region"] = _box(region)
    if tile is not None and (
        not isinstance(tile, tuple) or len(tile) != 3 or not all(isinstance(n, int) for n in tile)
    ):
        raise InputError(f"tile={tile!r} must be three whole numbers, as in (16, 512, 512).")
    if values.get("precision") == "auto":
        values["precision"] = None
    values["engine"] = chosen_engine(values.get("engine", "auto"))
    settings = Settings(**values)
    if settings.workers is not None and settings.workers < 1:
        raise InputError(f"workers={settings.workers} must be at least 1.")
    return settings


def _box(region: Any) -> Box:
    """A box from three slices."""
    if not isinstance(region, list | tuple) or len(region) != 3 or not all(map(_is_range, region)):
        raise InputError(
            f"region={region!r} must be three slices, as np.s_[0:16, 0:512, 128:640], or text."
        )
    return Box(tuple(s.start or 0 for s in region), tuple(s.stop for s in region))


def _is_range(part: Any) -> bool:
    """Whether this is a slice of at least one voxel, with an end."""
    if not isinstance(part, slice) or part.step not in (None, 1):
        return False
    start = part.start or 0
    return isinstance(start, int) and isinstance(part.stop, int) and 0 <= start < part.stop


class Prediction:
    """The result of `Model.predict`.

    Attributes:
        probabilities: of every class but the first, ``(classes - 1, *axes)``; float32 from 0 to 1,
            or the uint8 that `segment` stores, round(255 p). ``axes`` are those of the image
            without its channels.
        classes: number of the most probable class, uint8 ``(*axes)``, from 0.
        class_values: the label value of each class in training.
        plan: the tiles.
    """

    def __init__(
        self,
        probabilities: NDArray[Any],
        classes: NDArray[np.uint8],
        class_values: tuple[int, ...],
        plan: TilePlan,
    ) -> None:
        self.probabilities, self.classes = probabilities, classes
        self.class_values, self.plan = class_values, plan

    def __repr__(self) -> str:
        return (
            f"<Prediction: probabilities {self.probabilities.dtype} {self.probabilities.shape}, "
            f"classes {self.classes.shape}, {len(self.plan)} tiles>"
        )


class Model:
    """A trained network, ready to predict.

    Attributes:
        path: the model file.
        header: architecture, class values and settings of the training.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        keep_freed_memory()  # before torch makes a thread
        self.path = find_model(path)
        self._network, self.header = read_model(self.path)

    @property
    def class_values(self) -> tuple[int, ...]:
        """The label value of each class in training, ascending."""
        return tuple(self.header.class_values)

    @property
    def channels(self) -> int:
        """Channels that an image must have."""
        return self._network.in_channels

    def predict(
        self,
        image: Image,
        *,
        dtype: Literal["float32", "uint8"] = "float32",
        progress: bool = True,
        tile: str | Sequence[int] | None = None,
        memory: str | int = "4GiB",
        workers: int | None = None,
        precision: Literal["auto", "float32", "bfloat16"] = "auto",
        tta: bool = False,
        nan: Literal["error", "zero"] = "error",
    ) -> Prediction:
        """Segments an array in memory.

        The results are those of `segment`: the same bytes in the same plan. A plain TIFF file of
        the array gets the same plan.

        Args:
            image: array (y, x), (z, y, x) or (c, z, y, x) of integers or floats, or a path.
            dtype: of the probabilities: float32 from 0 to 1 (k / 255), or uint8 k.
            progress: show a progress bar.
            tile: core in voxels (z, y, x); chosen from `memory` by default.
            memory: bytes that one worker may use.
            workers: tiles side by side; one per core by default.
            precision: number format of the network.
            tta: average over the 8 symmetries of the square, in 3-D over 16 or 48.
            nan: ``zero`` counts voxels that are not finite as 0.

        Raises:
            InputError: if image, model and memory do not fit each other.
            RunError: if a tile cannot be read or predicted.
        """
        if dtype not in ("float32", "uint8"):
            raise InputError(f"dtype={dtype!r} must be 'float32' or 'uint8'.")
        settings = settings_of(
            tile=tile,
            memory=memory,
            workers=workers,
            precision=precision,
            tta=tta,
            nan=nan,
            engine="local",
        )
        image = np.asarray(image) if isinstance(image, list | tuple) else image
        volume = open_volume(image)
        report_omissions(volume.path, volume.omissions, strict=False)
        with TilesBar("predict", quiet=not progress, limit=False) as watch:
            plan, maps = predict_volume(
                volume, self._network, str(self.path), self.header.threshold, settings, watch
            )
        probabilities, classes = maps["probabilities"], maps["classes"]
        if getattr(image, "ndim", 0) == 2:
            probabilities, classes = probabilities[:, 0], classes[0]
        if dtype == "float32":
            return Prediction(
                probabilities.astype(np.float32) / np.float32(255), classes, self.class_values, plan
            )
        return Prediction(probabilities, classes, self.class_values, plan)

    def __fspath__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        recipe = self.header.training.get("recipe", {})
        return (
            f"<Model {self.path}: {self.channels} channel{'s' * (self.channels > 1)}, classes "
            f"{', '.join(map(str, self.class_values))}, depth {recipe.get('depth', '?')}, "
            f"{recipe.get('base_channels', '?')} channels at full resolution>"
        )


class OutputStore:
    """A store of `segment`, finished or not; it is also a path.

    Attributes:
        path: the store.
    """

    def __init__(self, path: PathOrUrl) -> None:
        self.path: Place = place_of(path)
        self._result: Result = open_result(self.path)

    @property
    def probabilities(self) -> Any:
        """The Zarr array of the probabilities, uint8 (classes - 1, z, y, x)."""
        return self._array("probabilities")

    @property
    def classes(self) -> Any:
        """The Zarr array of the classes, uint8 (z, y, x)."""
        return self._array("classes")

    @property
    def instances(self) -> Any:
        """The Zarr array of the object ids, uint64 (z, y, x); 0 is background."""
        return self._array("instances")

    @property
    def objects(self) -> Any:
        """The table of the objects, a `pyarrow.Table` with one row for each id.

        Raises:
            DamageError: if the file is missing or damaged.
        """
        self._array("instances")
        try:
            return parquet.read_table(pyarrow.BufferReader(read_table(self.path)))
        except pyarrow.ArrowException as error:
            raise DamageError(f"{self.path / TABLE}: is damaged ({reason(error)}).") from error

    @property
    def provenance(self) -> dict[str, Any]:
        """How the store was made: model, input, plan, intensities, precision, versions."""
        return dict(self._result.provenance.json)

    @property
    def done(self) -> int:
        """Tiles that are finished."""
        return int(open_result(self.path).done.sum())

    def _array(self, output: str) -> Any:
        outputs = open_result(self.path).outputs
        if output not in outputs:
            raise InputError(f"{self.path}: has no {output}, only {' and '.join(outputs)}.")
        return open_array(self.path / ARRAYS[output])

    def __fspath__(self) -> str:
        return str(self.path)

    def __str__(self) -> str:
        return str(self.path)

    def __repr__(self) -> str:
        plan = self._result.plan
        return (
            f"<OutputStore {self.path}: {' and '.join(open_result(self.path).outputs)} of "
            f"{by(plan.shape)} voxels, {self.done} of {len(plan)} tiles>"
        )

    def _repr_html_(self) -> str:
        """The sentence of `repr`, and a picture of the middle slice."""
        text = f"<p>{html.escape(repr(self)[1:-1])}</p>"
        result = open_result(self.path)
        if not (boxes := windows(result)):
            return text
        box = boxes[len(boxes) // 2]
        if "probabilities" in result.outputs:
            picture = colour_map(result.read("probabilities", box)[0, 0])
        else:
            picture = colour_classes(result.classes(box)[0])
        source = figure(picture, "")["source"]
        return f"{text}<img src='{source}' alt='slice {box.start[0]}' width='320'>"


class Plan:
    """What a run would do and need.

    Attributes:
        outlook: tiles, memory and disk.
    """

    def __init__(self, outlook: Outlook, settings: Settings) -> None:
        self.outlook, self._settings = outlook, settings

    def to_json(self) -> dict[str, Any]:
        """The figures under the keys of ``unet-ray plan --json``, without time and price."""
        return self.outlook.to_json()

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or "outlook" not in self.__dict__:  # while it is copied
            raise AttributeError(name)
        return getattr(self.outlook, name)

    def __repr__(self) -> str:
        return describe(self.outlook, self._settings)


def load(path: str | os.PathLike[str]) -> Model:
    """Loads a model from a RUN folder or a model file.

    Raises:
        InputError: if there is no model, or if it is damaged.
    """
    return Model(path)


def open_store(path: PathOrUrl) -> OutputStore:
    """Opens a store of `segment`, finished or not.

    Raises:
        InputError: if there is no store of `segment` at `path`.
    """
    return OutputStore(path)


@_with_keywords(Settings)
def segment(
    source: PathOrUrl,
    model: str | os.PathLike[str],
    out: PathOrUrl,
    settings: Settings | None = None,
    watch: Callable[[Progress], None] | None = None,
    *,
    progress: bool = True,
    **flags: Any,
) -> OutputStore:
    """Segments a stored volume into an OME-Zarr store; the same call again resumes it.

    Args:
        source: path or URL of the volume.
        model: a `Model`, RUN folder or model file.
        out: path or URL of the store.
        settings: all settings at once, in place of the keywords.
        watch: called after each tile, in place of the progress bar.
        progress: show a progress bar.
        **flags: the flags of ``unet-ray segment``; see `Settings`. `outputs`, `region`, `tile` and
            `memory` may also be the flag's text, such as ``memory="8GiB"``.

    Returns:
        The store; ``os.fspath`` gives its path.

    Raises:
        InputError: if input, model, settings or an existing store do not fit each other.
        QuarantinedError: if tiles failed; all others are finished.
        RunError: if the disk is full, or another run took the store over.
    """
    keep_freed_memory()
    if not isinstance(source, str | os.PathLike | ObjectPath):
        raise InputError(
            "segment reads a stored volume, so that it can resume and verify the result; save the "
            "array first, or use Model.predict."
        )
    settings = _one_of(settings, flags) or settings_of(**flags)
    label = os.path.basename(str(source))
    with TilesBar(label, quiet=not progress, limit=False) as bar:
        segmenting.segment(source, model, out, settings, watch or bar)
    return OutputStore(out)


@_with_keywords(Settings, "overwrite", "takeover")
def plan(
    source: PathOrUrl,
    model: str | os.PathLike[str],
    settings: Settings | None = None,
    **flags: Any,
) -> Plan:
    """States tiles, memory and disk use of a run; reads no voxel and writes nothing.

    Args:
        source: path or URL of the volume, or an array.
        model: a `Model`, RUN folder or model file.
        settings: all settings at once, in place of the keywords.
        **flags: the flags of ``unet-ray segment``; see `Settings`.

    Raises:
        InputError: if input, model and settings do not fit each other.
    """
    settings = _one_of(settings, flags) or settings_of(**flags)
    return Plan(outlook.plan(source, model, settings), settings)


@_with_keywords(Recipe, "recipe", "optimiser", "decay", "clip", "averaged", "degrade")
def train(
    images: Image | Sequence[Image],
    labels: Image | Sequence[Image],
    out: str | os.PathLike[str],
    recipe: Literal["default", "paper"] | Recipe = "default",
    engine: Literal["auto", "local", "ray"] = "auto",
    workers: int | str | tuple[int, int] | None = None,
    watch: OnMeasure | None = None,
    *,
    takeover: bool = False,
    strict: bool = False,
    memory: str | int | None = None,
    progress: bool = True,
    **flags: Any,
) -> Model:
    """Trains a network on labelled volumes; the same call again resumes an interrupted run.

    Args:
        images: a path or an array, or a list of these.
        labels: the labels of each image, of the same shape (z, y, x).
        out: the RUN folder.
        recipe: name of a recipe, or all settings at once.
        engine: ``local``, or ``ray`` for several workers.
        workers: number of workers, or the fewest and the most.
        watch: called with each measure, in place of the progress bar.
        takeover: end another training that writes to `out`.
        strict: refuse images and labels of which a part would be left out.
        memory: size of images, labels and weight maps above which they are read by windows; by
            default half of the free memory. The model is the same.
        progress: show a progress bar.
        **flags: the flags of ``unet-ray train``, such as ``minutes=10`` or ``val="20:24"``; see
            `Recipe`.

    Returns:
        The trained model.

    Raises:
        InputError: if files, arrays or settings do not fit each other, or `out` is another run.
        RunError: if the training fails.
    """
    keep_freed_memory()
    any_classes = flags.get("labels_are") == "classes"
    if isinstance(recipe, Recipe):
        settings = _one_of(recipe, flags) or recipe
        any_classes = settings.labels_are == "classes"
    else:
        if isinstance(flags.get("patch"), str | int):
            flags["patch"] = parse_patch(flags["patch"])
        if isinstance(flags.get("voxel_size"), str):
            flags["voxel_size"] = parse_voxel_size(flags["voxel_size"])
        settings = Recipe.of(recipe, **flags)
    before = time_of_model(out)
    together = parse_workers(workers) if isinstance(workers, str) else workers
    with TrainingBar("train", quiet=not progress) as bar:
        path = training.train(
            _listed(images),
            _listed(labels),
            out,
            settings,
            chosen_engine(engine),
            together,
            watch or bar,
            takeover=takeover,
            announce=bar.show_table,
            any_classes=any_classes,
            strict=strict,
            memory=parse_bytes(memory) if isinstance(memory, str) else memory,
        )
    finished = before is not None and time_of_model(out) == before
    if not finished or not (Path(out) / "report.html").exists():
        write_report(out)
    return Model(path)


def evaluate(
    prediction: Image | Prediction,
    truth: Image,
    as_: Kind,
    *,
    per_slice: bool = False,
    progress: bool = True,
) -> Evaluation:
    """Scores a prediction against the truth.

    Args:
        prediction: a volume, a folder of slices, a store of `segment`, an array, or a `Prediction`.
        truth: likewise.
        as_: ``isbi`` (membranes), ``instances`` (objects) or ``classes``; the flag ``--as``.
        per_slice: score each slice as an image of its own, too.
        progress: show a progress bar.

    Raises:
        InputError: if the two do not fit each other.
    """
    if isinstance(prediction, Prediction):
        prediction = prediction.probabilities if as_ == "isbi" else prediction.classes
    with ProgressBar("evaluate", quiet=not progress) as bar:
        return evaluation.evaluate(
            prediction,
            truth,
            as_,
            per_slice,
            lambda done, total: bar.show(done / total, f"{done}/{total}"),
        )


def verify(out: PathOrUrl, tiles: int = 3, repair: bool = False) -> Verification:
    """Checks every checksum of a store and recomputes some tiles; see `Verification`."""
    return verification.verify(out, tiles, repair)


def export(
    out: PathOrUrl,
    file: str | os.PathLike[str],
    what: Literal["probabilities", "classes", "instances", "objects"] | None = None,
    *,
    float: bool = False,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Writes an output of a finished store to one TIFF or CSV file.

    Args:
        out: the store.
        file: path ending in .tif or .tiff (arrays), or in .csv (the table of objects).
        what: the output; by default objects for .csv, else the first that the store has of
            probabilities, instances and classes.
        float: write probabilities as float32 from 0 to 1, k / 255, in place of uint8 k.
        overwrite: replace an existing file.
        progress: show a progress bar.

    Returns:
        The path of the file.

    Raises:
        InputError: if `file` cannot be written, or the store lacks the output or tiles of it.
        RunError: if a file of the store is missing or damaged.
    """
    with ProgressBar("export", quiet=not progress) as bar:
        return exporting.export(
            out,
            file,
            what,
            as_float=float,
            overwrite=overwrite,
            watch=lambda done, total: bar.show(done / total, f"{done}/{total}"),
        )


def _one_of(given: T | None, flags: dict[str, Any]) -> T | None:
    """Refuses settings both at once and one by one."""
    if given is not None and flags:
        raise InputError(f"{next(iter(flags))}: set it in the settings, or leave these out.")
    return given


def _listed(sources: Image | Sequence[Image]) -> list[Any]:
    listed = list(sources) if isinstance(sources, list | tuple) else [sources]
    if not listed:
        raise InputError("images and labels must name at least one volume each.")
    return listed
