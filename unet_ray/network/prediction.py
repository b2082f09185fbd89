"""Prediction of one tile: voxels in, uint8 probabilities and classes out.

Handles precision, device and passes, with NumPy arrays as input and output. Independent of the
source of the voxels and the destination of the results.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray

from unet_ray.errors import RunError
from unet_ray.machine import keep_freed_memory, nvidia_driver
from unet_ray.network.arithmetic import CONSTANTS, PLANE, symmetries_of, turns_of
from unet_ray.network.streaming import Columns, Kept, StreamedUNet
from unet_ray.network.transfer import DEPTH, Arrays, CudaLanes, Transfer, delayed
from unet_ray.network.unet import UNet, channels_last, turned
from unet_ray.tiling.boxes import Box, Ints
from unet_ray.tiling.tiles import Tile, TilePlan
from unet_ray.volumes.intensity import Intensity, fits_float32

Precision = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda", "mps"]  # mps: Apple GPUs, not tested
Fetch = Callable[[], Arrays]  # returns the results of a pass when they are complete
FINITE = "finite"  # among the results of a pass: 1 if all its scores are finite, else 0


def best_precision(device: Device) -> Precision:
    """Returns bfloat16 if the hardware supports its multiplication, else float32."""
    if device == "mps":
        return "float32"
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return "bfloat16" if native else "float32"


def settle_arithmetic() -> None:
    """Sets the switches of torch that decide between algorithms of different rounding on a GPU.

    Each process that trains or predicts calls this before its first computation, and nothing
    changes the switches later. So a validation does not change the arithmetic of the training
    around it. On a CPU the switches have no effect.
    """
    # Otherwise recent GPUs would round float32 to a mantissa of 10 bits.
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    # cuDNN must neither time algorithms to choose one, nor add in an order that varies.
    torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = False, True
    # With one fixed workspace, cuBLAS does the same; it reads this when it is first used.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")


def instructions(device: Device) -> str:
    """Names the arithmetic unit as far as it determines the last bits of a result."""
    if device == "cuda":
        gpu = torch.cuda.get_device_properties(torch.cuda.current_device())
        # NVIDIA promises equal bits for equal architectures with equally many multiprocessors.
        return f"{gpu.name}, sm_{gpu.major}{gpu.minor}, {gpu.multi_processor_count} multiprocessors"
    if device != "cpu":
        return device
    return f"{torch.backends.cpu.get_cpu_capability()}, {best_precision('cpu')}"


def gpu_versions(device: Device) -> dict[str, str]:
    """Returns the versions of CUDA, cuDNN and the driver of an NVIDIA GPU; none for others."""
    if device != "cuda":
        return {}
    versions = {
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),  # type: ignore[no-untyped-call]
        "nvidia-driver": nvidia_driver(),
    }
    return {name: str(version) for name, version in versions.items() if version}


# Orders of the axes of the cube that bring each to the place of z once.
Z_ORDERS = (0, 1, 2), (1, 0, 2), (2, 1, 0)


class Predictor:
    """A network at inference, for the tiles of one plan.

    All passes have the same shape, so the result of a tile does not depend on the process. It does
    depend on the number of threads, which the caller sets (one per pass on a CPU). Several threads
    may call a predictor on a CPU; on a GPU the caller makes one call at a time.

    Args:
        network: trained network; its norm layers are folded into the convolutions.
        plan: tiles, and the passes inside them.
        intensity: mean and standard deviation of the volume.
        precision: number format of weights and activations.
        device: device that runs the network.
        tta: whether to average over the 8 symmetries of the square (the paper averages rotations,
            sec. 3), in 3-D over 16 or 48, or over those that the network has learned; see
            `symmetries_of`. Tiling stays exact: every pass starts and ends on the same phase of the
            pooling, at any position of its tile.
        threshold: a voxel is of class 1 if its stored probability k fulfils k > 255 `threshold`,
            for two classes; None for the most probable class.
        in_flight: tiles that the caller has in flight; as many streams may wait.
    """

    def __init__(
        self,
        network: UNet,
        plan: TilePlan,
        intensity: Intensity,
        precision: Precision,
        device: Device,
        tta: bool = False,
        threshold: float | None = None,
        in_flight: int = 1,
    ) -> None:
        keep_freed_memory()
        settle_arithmetic()
        self._plan, self._intensity, self._tta = plan, intensity, tta
        self._classes, self._threshold = network.classes, threshold
        self._cache: dict[tuple[bytes, tuple[str, ...]], Fetch] = {}
        self._lock = threading.Lock()
        self._columns = Columns(plan, in_flight)
        self._device = torch.device(device)
        self._transfer = Transfer(CudaLanes(self._device)) if device == "cuda" else None
        self._mean, self._factor = (
            torch.from_numpy(values.reshape(-1, 1, 1, 1)).to(self._device)
            for values in intensity.in_float32()
        )
        self._dtype: torch.dtype = getattr(torch, precision)
        self._axes = network.axes
        self._format = channels_last(self._axes)
        self._network = (
            network.folded().to(self._device, self._dtype).to(memory_format=self._format)  # type: ignore[call-overload]
        )
        self._plane = PLANE[network.orientation]
        self._symmetries = symmetries_of(network.levels, network.orientation) if tta else 1
        copies = turns_of(network.levels, network.orientation) if tta else 1
        ways = [(order, down) for order in Z_ORDERS for down in (False, True)]
        self._networks = [
            self._network,
            *(turned(self._network, order, down) for order, down in ways[1:copies]),
        ]
        slab = plan.passes[0]
        self._streams = [StreamedUNet(n, slab) for n in self._networks if plan.streamed]

    def __call__(
        self, tile: Tile, voxels: NDArray[np.generic], outputs: Sequence[str]
    ) -> dict[str, NDArray[np.uint8]]:
        """Predicts the core of `tile`.

        Args:
            tile: tile to predict; passes outside the volume are not run.
            voxels: input of the tile, ``(c, z, y, x)``, in the units of the volume.
            outputs: results to return: ``probabilities``, ``classes`` or both.

        Returns:
            ``probabilities``: uint8 ``(classes - 1, *core)``, round(255 p) of classes 1 and up;
            ``classes``: uint8 of shape ``core``, the most probable class (the lowest at a tie), or
            the one that the threshold gives.

        Raises:
            RunError: if the network returns a score that is not finite.
            OutOfMemoryError: if memory is short.
            RuntimeError: if a GPU has failed, or has replaced an algorithm for lack of memory.
        """
        shapes = {
            "probabilities": (self._classes - 1, *self._plan.core),
            "classes": self._plan.core,
        }
        results = {name: np.zeros(shapes[name], np.uint8) for name in outputs}
        if self._streams:
            self._predict_columns(tile, voxels, results)
        else:
            self._place(self._passes(tile, voxels, tuple(outputs)), tile, results)
        return results

    def _passes(
        self, tile: Tile, voxels: NDArray[np.generic], outputs: tuple[str, ...]
    ) -> Iterator[tuple[Box, Fetch]]:
        """Starts one pass after another."""
        for part in self._plan.pass_boxes(tile):
            stop = (a + n for a, n in zip(part.start, self._plan.pass_shape, strict=True))
            window = voxels[(slice(None), *Box(part.start, tuple(stop)).slices)]
            yield part, self._pass(window, outputs)

    def _place(self, passes: Iterable[tuple[Box, Fetch]], tile: Tile, results: Arrays) -> None:
        """Fills the results of a tile; a GPU computes the next pass while one is placed.

        Raises:
            RunError: if the network returns a score that is not finite.
        """
        for part, fetch in delayed(passes, DEPTH - 1 if self._transfer else 0):
            scored = fetch()
            if not scored[FINITE]:
                with self._lock:  # a retry must compute the pass again
                    self._cache.clear()
                raise RunError(
                    f"tile {tile.index} ({tile.write}): the network returns scores that are not "
                    f"finite; the model or the intensities are damaged."
                )
            z, y, x = part.slices
            for name, values in results.items() if part.start[0] >= 0 else ():
                values[..., z, y, x] = scored[name]

    def _predict_columns(self, tile: Tile, voxels: NDArray[np.generic], results: Arrays) -> None:
        """Fills the results of a tile, whose passes along z continue those of the tile below."""
        with self._columns.of(tile) as (kept, continued):
            # Inside the context, since planes of scores that are not finite must not stay.
            slabs = self._slabs(tile, voxels, tuple(results), kept, continued)
            self._place(slabs, tile, results)

    def _slabs(
        self,
        tile: Tile,
        voxels: NDArray[np.generic],
        outputs: tuple[str, ...],
        kept: dict[Ints, list[Kept]],
        continued: bool,
    ) -> Iterator[tuple[Box, Fetch]]:
        """Starts one pass of a stream after another; those of a warm-up start below 0."""
        slab, warm_up = self._plan.passes[0], self._streams[0].stream.warm_up
        column = (self._plan.core[0], *self._plan.passes[1:])
        parts = [p for p in Box.of(self._plan.core).split(column) if p.intersect(tile.crop).size]
        last = -(-tile.crop.stop[0] // slab)
        first = 0 if continued else -warm_up  # slabs below the tile fill the layers at first
        for part in parts:
            planes = kept.setdefault(part.start, [{} for _ in range(self._symmetries)])
            for number in range(first, last):
                start = ((number + warm_up) * slab, *part.start[1:])
                shape = zip(start, self._plan.pass_shape, strict=True)
                box = Box(start, tuple(a + n for a, n in shape))
                window = voxels[(slice(None), *box.slices)]
                z, rest = number * slab, (part.start[1:], part.stop[1:])
                result = Box((z, *rest[0]), (z + slab, *rest[1]))
                yield result, self._forward(window, outputs, planes)

    def _pass(self, window: NDArray[np.generic], outputs: tuple[str, ...]) -> Fetch:
        """Starts a pass with results ``(..., *passes)``; cached if all voxels are equal.

        All passes have the same shape, so equal voxels have equal results.
        """
        value = constant_value(window)
        if value is None:
            return self._forward(window, outputs)
        with self._lock:  # otherwise two threads could compute the same result
            key = value, outputs
            result = self._cache.pop(key, None)
            if result is None:
                if len(self._cache) == CONSTANTS:  # remove the least recently used result
                    del self._cache[next(iter(self._cache))]
                result = self._forward(window, outputs)
            self._cache[key] = result
            return result

    def _forward(
        self, window: NDArray[np.generic], outputs: tuple[str, ...], kept: Sequence[Kept] = ()
    ) -> Fetch:
        """Starts one forward call; `kept` has the planes of a stream, for each symmetry.

        A GPU may still compute when this returns. `_same_algorithms` needs no wait for it, since
        torch allocates memory while it queues the work.
        """
        with torch.inference_mode(), self._same_algorithms():
            computed = self._computed(self._image(window), outputs, kept)
            if self._transfer:
                return self._transfer.down(computed)
            results = {name: values.cpu().numpy() for name, values in computed.items()}
        return lambda: results

    def _computed(
        self, image: torch.Tensor, outputs: tuple[str, ...], kept: Sequence[Kept]
    ) -> dict[str, torch.Tensor]:
        """Results of one forward call on the device, uint8, with `FINITE` among them."""
        results, finite = {}, list[torch.Tensor]()
        if self._tta:
            scores = probabilities = self._inside(self._averaged(image, finite, kept))
        else:
            scores = self._inside(self._scores(image, finite, 0, kept[0] if kept else None))
            probabilities = scores.softmax(dim=1)
        rounded = None
        if "probabilities" in outputs or self._threshold is not None:
            rounded = probabilities[:, 1:].mul(255).round_().byte()
        if "probabilities" in outputs and rounded is not None:
            results["probabilities"] = self._channels_first(rounded)
        if "classes" in outputs:
            results["classes"] = self._class_map(scores, rounded)
        return {**results, FINITE: torch.stack(finite).all().byte()}

    def _inside(self, scores: torch.Tensor) -> torch.Tensor:
        """The voxels of a pass; the network may return more, since its sizes have a step."""
        for axis in range(-self._axes, 0):
            scores = scores.narrow(axis, 0, self._plan.passes[axis])
        return scores

    def _class_map(self, scores: torch.Tensor, rounded: torch.Tensor | None) -> torch.Tensor:
        """Class of each voxel, uint8 ``(z, y, x)``, from its scores or its stored probability."""
        if rounded is None or self._threshold is None:
            if self._classes == 2:  # the same as argmax, in a tenth of the time
                return self._channels_first(scores[:, 1:] > scores[:, :1])[0].byte()
            return self._channels_first(scores.argmax(dim=1, keepdim=True))[0].byte()
        return (self._channels_first(rounded)[0].double() > 255 * self._threshold).byte()

    def _channels_first(self, batch: torch.Tensor) -> torch.Tensor:
        """``(c, z, y, x)``, from a batch of slices ``(z, c, y, x)`` or one volume in 3-D."""
        return batch.transpose(0, 1) if self._axes == 2 else batch[0]

    @contextmanager
    def _same_algorithms(self) -> Iterator[None]:
        """Raises if cuDNN has replaced an algorithm inside the context.

        If the workspace of an algorithm does not fit into memory, torch takes the next one without
        a message, and again in later passes of this process, even if they have enough memory. So
        only a new process gives the same bytes; the name of the error makes the engine start one.
        """
        expected, raised = self._failed_allocations(), None
        try:
            yield
        except torch.OutOfMemoryError as error:
            expected, raised = expected + 1, error
        if self._failed_allocations() > expected:
            raise RuntimeError(
                "CUDA error: too little GPU memory was free for an algorithm of cuDNN, and the "
                "results of the one that it took instead may differ"
            ) from raised
        if raised:
            raise raised

    def _failed_allocations(self) -> int:
        """Returns how many allocations of GPU memory have failed in this process."""
        if self._device.type != "cuda":
            return 0
        return int(torch.cuda.memory_stats(self._device).get("num_ooms", 0))

    def _image(self, window: NDArray[np.generic]) -> torch.Tensor:
        """Normalised input of one pass on the device, ``(z, c, y, x)``, or ``(1, c, z, y, x)``."""
        if self._transfer and fits_float32(window.dtype):
            # The operations of `Intensity.normalise`, so the bits are the same.
            image = self._transfer.up(window).sub_(self._mean).mul_(self._factor)
        elif self._transfer:
            image = self._transfer.up(self._intensity.normalise(window))
        else:
            image = torch.from_numpy(self._intensity.normalise(window))
        batch = image.transpose(0, 1) if self._axes == 2 else image[None]
        return batch.to(self._device, self._dtype, non_blocking=True)

    def _scores(
        self, image: torch.Tensor, finite: list[torch.Tensor], network: int, kept: Kept | None
    ) -> torch.Tensor:
        """Scores of one pass in float32, ``(z, classes, y, x)`` or ``(1, classes, z, y, x)``.

        Appends to `finite` whether all are finite; a look at the value would wait for a GPU.
        """
        image = image.contiguous(memory_format=self._format)
        scores: torch.Tensor
        if kept is None:
            scores = self._networks[network](image).float()
        else:
            scores = self._streams[network](image, kept).float()
        # A minimum or maximum is NaN if any score is; this is faster than a test of each score.
        finite.append(torch.isfinite(torch.stack(scores.aminmax())).all())
        return scores

    def _averaged(
        self, image: torch.Tensor, finite: list[torch.Tensor], kept: Sequence[Kept]
    ) -> torch.Tensor:
        """Mean probabilities over all symmetries, shaped as the scores.

        The image is rotated and mirrored in its planes; the networks are turned for z. The order of
        the sum is fixed, so its rounding is too.
        """
        total, number = torch.zeros(()), 0
        for network in range(len(self._networks)):
            for turns, mirrored in self._plane:
                view = image.rot90(turns, (-2, -1))
                view = view.flip(-1) if mirrored else view
                planes = kept[number] if kept else None
                softmax = self._scores(view, finite, network, planes).softmax(dim=1)
                upright = softmax.flip(-1) if mirrored else softmax
                total, number = total + upright.rot90(-turns, (-2, -1)), number + 1
        return total / number


def constant_value(window: NDArray[np.generic]) -> bytes | None:
    """Returns the value of each channel as bytes, or None if a channel has different voxels.

    Values are compared bit by bit.

    Args:
        window: voxels ``(c, z, y, x)``.
    """
    bits = window.view(f"u{window.dtype.itemsize}") if window.dtype.kind == "f" else window
    first = bits[:, :1, :1, :1]
    # Comparing a single voxel first is fast and nearly always shows that they differ.
    if (first != bits[:, -1:, -1:, -1:]).any() or (first != bits).any():
        return None
    return first.tobytes()
