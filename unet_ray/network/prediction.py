"""One tile through the network: voxels in, uint8 probabilities and classes out.

Knows NumPy on the outside and torch on the inside: precision, device, passes. Does not know where
voxels come from or where results go.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Literal, cast

import numpy as np
import torch
from numpy.typing import NDArray

from unet_ray.errors import RunError
from unet_ray.machine import keep_freed_memory
from unet_ray.network.arithmetic import CONSTANTS
from unet_ray.network.unet import UNet
from unet_ray.tiling.boxes import Box
from unet_ray.tiling.tiles import Tile, TilePlan
from unet_ray.volumes.intensity import Intensity

Precision = Literal["float32", "bfloat16"]
Device = Literal["cpu", "cuda", "mps"]  # mps: an Apple GPU, on which this was not run


def best_precision(device: Device) -> Precision:
    """bfloat16 where the hardware multiplies in it, else float32."""
    if device == "mps":
        return "float32"
    if device == "cuda":
        return "bfloat16" if torch.cuda.is_bf16_supported() else "float32"
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    native = any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)
    return "bfloat16" if native else "float32"


def instructions(device: Device) -> str:
    """The kind of arithmetic unit, as far as it decides the last bits of a result."""
    if device != "cpu":
        return device
    return f"{torch.backends.cpu.get_cpu_capability()}, {best_precision('cpu')}"


class Predictor:
    """A network at inference, for tiles of one plan.

    Every pass has the same shape, so a tile gives the same bytes whoever runs it. The caller sets
    the number of threads (one per pass on a CPU), which is part of what fixes the bytes.

    Args:
        network: the trained network; its norm layers are folded into the convolutions.
        plan: the tiles and the passes inside them.
        intensity: mean and standard deviation of the volume.
        precision: number format of weights and activations.
        device: where the network runs.
        tta: average over the 8 symmetries of the square, each of the same read (sec. 3 of the
            paper averages rotations); exact under tiling, since every read ends on the same phase
            of the pooling as it starts, wherever its tile lies.
    """

    def __init__(
        self,
        network: UNet,
        plan: TilePlan,
        intensity: Intensity,
        precision: Precision,
        device: Device,
        tta: bool = False,
    ) -> None:
        keep_freed_memory()
        # Else "float32" would mean numbers of 10 bits on recent GPUs.
        torch.backends.cudnn.allow_tf32 = False
        self._plan, self._intensity, self._tta = plan, intensity, tta
        self._classes = network.classes
        self._constants: dict[tuple[bytes, tuple[str, ...]], dict[str, NDArray[np.uint8]]] = {}
        self._lock = threading.Lock()
        self._device = torch.device(device)
        self._dtype = getattr(torch, precision)
        self._network = (
            network.folded().to(self._device, self._dtype).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        )

    def __call__(
        self, tile: Tile, voxels: NDArray[np.generic], outputs: Sequence[str]
    ) -> dict[str, NDArray[np.uint8]]:
        """Predicts the core of `tile`.

        Args:
            tile: which tile; passes that lie outside the volume are not run.
            voxels: what the tile reads, ``(c, z, y, x)``, in the volume's own units.
            outputs: which of ``probabilities`` and ``classes`` to give.

        Returns:
            ``probabilities``: uint8 ``(classes - 1, *core)``, round(255 p) of classes 1..;
            ``classes``: uint8 ``core``, the most probable class (the lower one at a tie).

        Raises:
            RunError: if the network gives a score that is not finite.
        """
        shapes = {
            "probabilities": (self._classes - 1, *self._plan.core),
            "classes": self._plan.core,
        }
        results = {name: np.zeros(shapes[name], np.uint8) for name in outputs}
        for part in self._plan.pass_boxes(tile):
            stop = (a + n for a, n in zip(part.start, self._plan.pass_shape, strict=True))
            seen = voxels[(slice(None), *Box(part.start, tuple(stop)).slices)]
            for name, values in self._pass(seen, tile, tuple(outputs)).items():
                z, y, x = part.slices
                results[name][..., z, y, x] = values
        return results

    def _pass(
        self, seen: NDArray[np.generic], tile: Tile, outputs: tuple[str, ...]
    ) -> dict[str, NDArray[np.uint8]]:
        """What one pass gives, ``(..., *passes)``; of voxels that are all the same, from memory.

        All passes have one shape, so the same voxels give the same bytes.
        """
        value = constant_value(seen)
        if value is None:
            return self._forward(seen, tile, outputs)
        with self._lock:  # or two threads would compute the same
            key = value, outputs
            found = self._constants.pop(key, None)
            if found is None:
                if len(self._constants) == CONSTANTS:  # the one that was used longest ago goes
                    del self._constants[next(iter(self._constants))]
                found = self._forward(seen, tile, outputs)
            self._constants[key] = found
            return found

    def _forward(
        self, seen: NDArray[np.generic], tile: Tile, outputs: tuple[str, ...]
    ) -> dict[str, NDArray[np.uint8]]:
        # The network returns a little more than the core: sizes come in steps.
        inside = (..., slice(self._plan.passes[-2]), slice(self._plan.passes[-1]))
        results = {}
        with torch.inference_mode():
            image = self._image(seen)
            if self._tta:
                scores = shares = self._averaged(image, tile)[inside]
            else:
                scores = self._scores(image, tile)[inside]
                shares = scores.softmax(dim=1)
            if "probabilities" in outputs:
                probabilities = shares[:, 1:].mul(255).round_().byte()
                results["probabilities"] = probabilities.transpose(0, 1).cpu().numpy()
            if "classes" in outputs:
                results["classes"] = scores.argmax(dim=1).byte().cpu().numpy()
        return results

    def _image(self, seen: NDArray[np.generic]) -> torch.Tensor:
        """What one pass reads, normalised, ``(z, c, y, x)``."""
        image = self._intensity.normalise(seen)
        batch = torch.from_numpy(image).transpose(0, 1)
        if self._device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self._device, self._dtype, non_blocking=True)

    def _scores(self, image: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Float32 scores ``(z, classes, y, x)`` of one pass."""
        scores = self._network(image.contiguous(memory_format=torch.channels_last)).float()
        if not torch.isfinite(scores).all():
            raise RunError(
                f"tile {tile.index} ({tile.write}): the network gives scores that are not finite; "
                f"the model or the intensities are damaged."
            )
        return cast(torch.Tensor, scores)

    def _averaged(self, image: torch.Tensor, tile: Tile) -> torch.Tensor:
        """Mean probabilities ``(z, classes, y, x)`` over turns and mirror images, in one order."""
        total = torch.zeros(())
        for turns in range(4):
            for mirrored in (False, True):
                seen = image.rot90(turns, (2, 3))
                scores = self._scores(seen.flip(3) if mirrored else seen, tile)
                shares = scores.softmax(dim=1)
                back = (shares.flip(3) if mirrored else shares).rot90(-turns, (2, 3))
                total = total + back
        return total / 8


def constant_value(seen: NDArray[np.generic]) -> bytes | None:
    """The value of each channel if all its voxels are the same, bit for bit."""
    bits = seen.view(f"u{seen.dtype.itemsize}") if seen.dtype.kind == "f" else seen
    first = bits[:, :1, :1, :1]
    # A look at one voxel tells nearly always that they are not.
    if (first != bits[:, -1:, -1:, -1:]).any() or (first != bits).any():
        return None
    return first.tobytes()
