"""Changes the code in one place at a time, and checks that a test fails.

    python -m tests.mutants [TEXT ...]     only mutants whose name contains one of the texts

Each mutant replaces a piece of source text that occurs once in its file. The tests of that file
then run in a copy of the tree. A mutant is killed if a test fails or exceeds the time limit. The
program prints a table, and its exit code is 1 if too few mutants are killed, if a mutant survives
without a stated reason, or if the text of a mutant does not occur exactly once.
"""

from __future__ import annotations

import importlib.util
import os
import queue
import re
import shutil
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

from hypothesis import Phase, settings

ROOT = Path(__file__).parents[1]
AT_ONCE = 2
TEST_SECONDS, SECONDS = 60, 180  # limits of one test and of all tests of a mutant
PLUGINS = ("-p", "tests.mutants", "-p", "no:cacheprovider")
LEAST_KILLED = 0.95  # of the mutants that change the behaviour
FAILED = re.compile(r"^(?:FAILED|ERROR) (.+?)(?: - .*)?$", re.MULTILINE)

# The tests of each file in unet_ray/: files that run in seconds, without Ray.
TESTS = {
    "tiling/boxes.py": "tests/tiling/test_boxes.py",
    "tiling/mirror.py": "tests/tiling/test_mirror.py",
    "tiling/levels.py": "tests/tiling/test_tiles.py",
    "tiling/tiles.py": "tests/tiling/test_tiles.py",
    "storage/ledger.py": "tests/storage/test_ledger.py",
    "storage/marks.py": "tests/storage/test_marks.py",
    "storage/events.py": "tests/storage/test_events.py",
    "storage/places.py": "tests/storage/test_places.py tests/storage/test_stores.py",
    "storage/layout.py": "tests/storage/test_stores.py",
    "storage/inspection.py": "tests/storage/test_stores.py",
    "storage/stores.py": "tests/storage/test_stores.py",
    "storage/lease.py": "tests/storage/test_lease.py",
    "storage/audit.py": "tests/segmentation/test_verification.py",
    "storage/tile_audit.py": "tests/segmentation/test_verification.py",
    "storage/shards.py": "tests/segmentation/test_verification.py tests/storage/test_stores.py",
    "storage/provenance.py": "tests/segmentation/test_changes.py",
    "volumes/fingerprint.py": "tests/segmentation/test_changes.py",
    "volumes/volume.py": "tests/segmentation/test_changes.py",
    "segmentation/run.py": "tests/segmentation/test_changes.py",
    "segmentation/watershed.py": "tests/segmentation/test_watershed.py",
    "segmentation/basins.py": "tests/segmentation/test_watershed.py",
    "network/transfer.py": "tests/network/test_transfer.py",
    "scores/overlaps.py": "tests/scores/test_overlaps.py tests/scores/test_metrics.py",
    "scores/thinning.py": "tests/scores/test_thinning.py",
    "scores/warping.py": "tests/scores/test_warping.py",
    "scores/cuts.py": "tests/scores/test_metrics.py",
    "scores/stacks.py": "tests/scores/test_stacks.py",
    "scores/totals.py": "tests/scores/test_metrics.py tests/scores/test_totals.py",
    "scores/evaluation.py": "tests/scores/test_evaluation.py",
    "training/displacement.py": "tests/training/test_displacement.py",
    "training/recipes.py": "tests/training/test_displacement.py",
    "training/patches.py": "tests/training/test_patches.py",
    "training/truths.py": "tests/training/test_patches.py tests/training/test_windows.py",
    "training/windows.py": "tests/training/test_windows.py",
    "training/maps.py": "tests/training/test_windows.py",
    "training/weights.py": "tests/training/test_weights.py",
    "training/augment.py": "tests/training/test_augment.py",
    "training/trainer.py": "tests/training/test_learner.py",
    "training/calibration.py": "tests/training/test_calibration.py",
    "training/run_folder.py": "tests/training/test_training.py",
}


class Mutant(NamedTuple):
    """A change of one file.

    Attributes:
        file: the file, relative to unet_ray/.
        text: the text to replace; it occurs once in the file.
        change: the text in its place.
        survives: why no test can or should fail; empty if a test must fail.
    """

    file: str
    text: str
    change: str
    survives: str = ""

    @property
    def name(self) -> str:
        """File, text and change on one line."""
        text, change = (" ".join(part.split()) for part in (self.text, self.change))
        return f"{self.file}: {text} -> {change or '(removed)'}"


class Result(NamedTuple):
    """The result of the tests of a mutant.

    Attributes:
        killer: the test that failed, or the limit that was exceeded; empty if all tests passed.
        seconds: time of the tests.
    """

    killer: str
    seconds: float


MUTANTS = [
    Mutant(
        "tiling/boxes.py",
        "if any(b < a for a, b in zip(self.start, self.stop, strict=True)):",
        "if any(b <= a for a, b in zip(self.start, self.stop, strict=True)):",
    ),
    Mutant("tiling/boxes.py", "return math.prod(self.shape)", "return sum(self.shape)"),
    Mutant(
        "tiling/boxes.py",
        "max(a, b) for a, b in zip(self.start, other.start, strict=True)",
        "min(a, b) for a, b in zip(self.start, other.start, strict=True)",
    ),
    Mutant(
        "tiling/boxes.py",
        "return Box(start, tuple(max(a, b) for a, b in zip(start, stop, strict=True)))",
        "return Box(start, stop)",
    ),
    Mutant(
        "tiling/boxes.py",
        "yield Box(start, stop).intersect(self)",
        "yield Box(start, stop)",
    ),
    Mutant("tiling/boxes.py", "spans = [(a // n, -(-b // n))", "spans = [(a // n, b // n)"),
    Mutant("tiling/boxes.py", "max_chunks //= shape[0]", "pass"),
    Mutant("tiling/boxes.py", "[-n for n in origin]", "[n for n in origin]"),
    Mutant("tiling/mirror.py", "period = 2 * (length - 1)", "period = 2 * length"),
    Mutant("tiling/mirror.py", "if length == 1:", "if length == 0:"),
    Mutant("tiling/mirror.py", "if low != a or source.size", "if source.size"),
    Mutant(
        "tiling/mirror.py",
        " or source[-1] != b - 1:",
        ":",
        "equivalent: a box that starts inside and has as many voxels as positions ends inside",
    ),
    Mutant("tiling/levels.py", "n - k + 1 if cut", "n - k if cut"),
    Mutant(
        "tiling/tiles.py",
        "before = (extent - output[0]) // 2",
        "before = (extent - output[0]) // 2 + 1",
    ),
    Mutant(
        "tiling/tiles.py",
        "while excess < 2 * (levels[0].kernel[0] - 1):",
        "while excess <= 2 * (levels[0].kernel[0] - 1):",
    ),
    Mutant("tiling/tiles.py", "return -(-value // step) * step", "return value // step * step"),
    Mutant(
        "tiling/tiles.py",
        "largest = max(step, largest // step * step)",
        "largest = largest // step * step",
    ),
    Mutant("tiling/tiles.py", "tiles = -(-extent // largest)", "tiles = extent // largest + 1"),
    Mutant("tiling/tiles.py", "if n <= 0 or n % k:", "if n % k:"),
    Mutant("tiling/tiles.py", "if not 0 <= index < len(self):", "if not index < len(self):"),
    Mutant("tiling/tiles.py", "write = core.intersect(Box.of(self.shape))", "write = core"),
    Mutant(
        "tiling/tiles.py",
        "read = core.grow(self.context.before, self.context.after)",
        "read = core.grow(self.context.after, self.context.before)",
    ),
    Mutant(
        "tiling/tiles.py",
        "high = tuple(-(-b // c) for b, c in zip(region.stop, self.core, strict=True))",
        "high = tuple(b // c for b, c in zip(region.stop, self.core, strict=True))",
    ),
    Mutant("tiling/tiles.py", "if part.intersect(tile.crop).size:", "if True:"),
    Mutant("storage/ledger.py", "if self.born > epoch:", "if False:"),
    Mutant(
        "storage/ledger.py",
        "for path in (*records.stale, *records.damaged):",
        "for path in records.stale:",
    ),
    Mutant("storage/ledger.py", "records.bits[state][:] = False", "pass"),
    Mutant(
        "storage/ledger.py", '(self._bits["skipped"] & ~requested |', '(self._bits["skipped"] |'
    ),
    Mutant("storage/ledger.py", "if newest(folder) >= epoch:", "if newest(folder) > epoch:"),
    Mutant(
        "storage/ledger.py",
        'self._count += not self._bits["committed"][tile]',
        "self._count += 1",
    ),
    Mutant(
        "storage/ledger.py",
        "if not 0 <= tile < self._bits[state].size:",
        "if not tile < self._bits[state].size:",
    ),
    Mutant("storage/ledger.py", "if time.monotonic() - self._last_flush >= SECONDS:", "if False:"),
    Mutant("storage/ledger.py", "> SEGMENTS:", "> 10 * SEGMENTS:"),
    Mutant(
        "storage/ledger.py",
        "return any(path.suffix != BORN and _epoch_of(path) >= born for",
        "return any(path.suffix != BORN for",
    ),
    Mutant(
        "storage/ledger.py",
        "files = [path for path in paths if _epoch_of(path) >= born and",
        "files = [path for path in paths if _epoch_of(path) > born and",
    ),
    Mutant(
        "storage/ledger.py",
        'return bits["quarantined"] & ~bits["committed"]',
        'return bits["quarantined"]',
    ),
    Mutant(
        "storage/ledger.py", 'return bits["skipped"] & ~bits["committed"]', 'return bits["skipped"]'
    ),
    Mutant("storage/marks.py", 'if mark.event == "ended":', 'if mark.event == "done":'),
    Mutant("storage/marks.py", "if epoch >= since:", "if epoch > since:"),
    Mutant("storage/marks.py", "int(run_folder.name) < epoch:", "int(run_folder.name) <= epoch:"),
    Mutant(
        "storage/events.py",
        "if path.stat().st_size and not cls._ends_with_newline(path):",
        "if False:",
    ),
    Mutant("storage/places.py", "file.flush()\n            os.fsync(file.fileno())", "pass"),
    Mutant(
        "storage/places.py",
        "    sync_folder(path.parent)\n\n\ndef _put_whole",
        "\n\n\ndef _put_whole",
    ),
    Mutant("storage/places.py", "with guard() if guard else nullcontext():", "with nullcontext():"),
    Mutant("storage/places.py", '{".", ".."} & {*key.split("/")} or', ""),
    Mutant(
        "storage/layout.py",
        "while chunk[axis] > largest and",
        "while chunk[axis] >= largest and",
    ),
    Mutant(
        "storage/inspection.py",
        "if has_notes(self.path / LEDGER) and not _is_bare(self.path):",
        "if False:",
    ),
    Mutant(
        "storage/stores.py",
        "write_whole(path / ROOT, files[ROOT], path / PRIVATE, guard)",
        "write_whole(path / ROOT, files[ROOT], path / PRIVATE)",
    ),
    Mutant("storage/stores.py", "    refuse_others(path)\n", ""),
    Mutant("storage/stores.py", "    _clear(path, guard)\n", ""),
    Mutant("storage/stores.py", "(path / ROOT).unlink(missing_ok=True)", "pass"),
    Mutant("storage/stores.py", '"write_empty_chunks": True', '"write_empty_chunks": False'),
    Mutant(
        "storage/stores.py",
        "if layout != (DTYPES[name], plan.shape, plan.core):",
        "if layout[:2] != (DTYPES[name], plan.shape):",
    ),
    Mutant(
        "storage/stores.py", 'damage = "" if stat_of(shard).size else "is empty"', 'damage = ""'
    ),
    Mutant("storage/ledger.py", "if packed > len(content):", "if False:"),
    Mutant(
        "storage/ledger.py",
        "decompress(content[:packed], size + 1)",
        "decompress(content[:packed])",
    ),
    Mutant("storage/ledger.py", "and first + bits <= tiles", "and first <= tiles"),
    Mutant("storage/ledger.py", 'hexdigest() == record["sha256"]', 'hexdigest() != ""'),
    Mutant(
        "storage/tile_audit.py",
        "if self.is_foreign(name, tile, self.decode(name, tile)):",
        "if self.decode(name, tile) is None:",
    ),
    Mutant("storage/shards.py", "if google_crc32c.value(compressed) !=", "if False and 0 !="),
    Mutant(
        "storage/shards.py", "if google_crc32c.value(data[end:-CHECKSUM]) !=", "if False and 0 !="
    ),
    Mutant("storage/shards.py", "decompressed_size=self._chunk_bytes", "decompressed_size=1 << 20"),
    Mutant("storage/audit.py", "recorded.json else ()", "False else ()"),
    Mutant("storage/provenance.py", "if own != original:", "if False:"),
    Mutant("volumes/fingerprint.py", "and hashes[place] == number", ""),
    Mutant("volumes/fingerprint.py", "self.stats[name] == stat if", "True if"),
    Mutant("volumes/volume.py", 'vars(self).pop("_source", None)', "pass"),
    Mutant("segmentation/run.py", "if sha256 != run.provenance.model_sha256:", "if False:"),
    Mutant(
        "segmentation/run.py",
        "return ~Store(self.out, self.predicted).present(self.plan)",
        "return False & Store(self.out, self.predicted).present(self.plan)",
    ),
    Mutant(
        "storage/lease.py",
        'notice = "" if owner and owner.released else',
        'notice = "" if True else',
    ),
    Mutant(
        "storage/lease.py",
        "epoch = owner.epoch + 1 if owner else",
        "epoch = owner.epoch if owner else",
    ),
    Mutant(
        "storage/lease.py", "epoch = max(epoch, self._after + 1)", "epoch = max(epoch, self._after)"
    ),
    Mutant(
        "storage/lease.py",
        "if owner and owner.name == me.name and not owner.released:",
        "if owner and owner.name == me.name:",
    ),
    Mutant("storage/lease.py", "        if self._loss:\n", "        if False:\n"),
    Mutant("storage/lease.py", 'return reused or state in ("Z", "X")', "return reused"),
    Mutant("network/transfer.py", "buffers.settle = sent.synchronize", "pass"),
    Mutant("network/transfer.py", 'lanes.wait("up", buffers.used)', "pass"),
    Mutant("network/transfer.py", 'lanes.wait("compute", sent)', "pass"),
    Mutant("network/transfer.py", 'lanes.wait("down", lanes.record("compute"))', "pass"),
    Mutant("network/transfer.py", "buffers.settle = pending", "pass"),
    Mutant("network/transfer.py", "self._copied.synchronize()", "pass"),
    Mutant("network/transfer.py", "if oldest.host.numel() == size:", "if True:"),
    Mutant("network/transfer.py", "DEPTH = 2", "DEPTH = 1"),
    Mutant("scores/overlaps.py", "(p[1:] != p[:-1])) + 1", "(p[1:] != p[:-1]))"),
    Mutant("scores/overlaps.py", "t * len(predictions) + p", "t + p"),
    Mutant(
        "scores/overlaps.py",
        "((sum_of_squares(n) - table.total) // 2 for n in parts)",
        "(sum_of_squares(n) // 2 for n in parts)",
    ),
    Mutant("scores/overlaps.py", "if voxels.sum() < EXACT_IN_INT64:", "if True:"),
    Mutant(
        "scores/overlaps.py",
        "sum_of_squares(inside.voxels) + singles,",
        "sum_of_squares(inside.voxels),",
    ),
    Mutant(
        "scores/overlaps.py",
        "most = 2 * self.shared > self.size",
        "most = 2 * self.shared >= self.size",
    ),
    Mutant(
        "scores/overlaps.py",
        "close = 100 * self.shared >= percent * self.union",
        "close = 100 * self.shared > percent * self.union",
    ),
    Mutant(
        "scores/overlaps.py",
        "if truth not in used[0] and prediction not in used[1]:",
        "if True:",
    ),
    Mutant("segmentation/watershed.py", "width = 1 + SMOOTHING", "width = SMOOTHING"),
    Mutant("segmentation/watershed.py", "if other > best:", "if other >= best:"),
    Mutant(
        "segmentation/watershed.py",
        "last[:-1] = (rows[1:, :2] != rows[:-1, :2]).any(1)",
        "last[1:] = (rows[1:, :2] != rows[:-1, :2]).any(1)",
    ),
    Mutant(
        "segmentation/watershed.py",
        "touches[parents[tile.touching - 1]] = True",
        "touches[tile.touching - 1] = True",
    ),
    Mutant("segmentation/watershed.py", "tops[a] = max(tops[a], tops[b])", "pass"),
    Mutant("segmentation/basins.py", "(first[:, 1], first[:, 0], -necks)", "(-necks,)"),
    Mutant("segmentation/basins.py", "(flat and here == there)", "False"),
    Mutant("segmentation/basins.py", " or targets[b] == one or ", " or "),
    Mutant(
        "segmentation/basins.py",
        "self.sizes[self.parents != np.arange(len(self.parents))] = 0",
        "pass",
    ),
    Mutant(
        "scores/thinning.py",
        "if labels[y, x] == QUEUED or (labels[y, x] == LINE and beside_line):",
        "if labels[y, x] == QUEUED:",
    ),
    Mutant(
        "scores/thinning.py",
        "[(0, -1), (-1, 0), (0, 1), (1, 0)]",
        "[(-1, 0), (0, -1), (0, 1), (1, 0)]",
        "equivalent: the lines do not depend on the order of the neighbours, as a test shows",
    ),
    Mutant(
        "scores/thinning.py",
        "    for x in range(width):\n        for y in range(height):\n",
        "    for y in range(height):\n        for x in range(width):\n",
    ),
    Mutant("scores/thinning.py", "beside_line = True", "beside_line = False"),
    Mutant("scores/thinning.py", "if not labels.any():", "if False:"),
    Mutant("scores/warping.py", "mergers += kinds > 2", "mergers += kinds > 1"),
    Mutant(
        "scores/warping.py",
        "elif kinds > 2 or (kinds == 2 and",
        "elif kinds > 1 or (kinds == 2 and",
    ),
    Mutant("scores/warping.py", "np.argsort(-confidence,", "np.argsort(confidence,"),
    Mutant("scores/warping.py", "if radius > min(warped.shape):", "if False:"),
    Mutant("scores/warping.py", "len(touching) == 1", "len(touching) >= 1"),
    Mutant("scores/cuts.py", "plane.proposal > threshold", "plane.proposal >= threshold"),
    Mutant("scores/stacks.py", "~((values >= 0) & (values <= 1))", "~(values <= 1)"),
    Mutant("scores/stacks.py", "if predicted.shape != true.shape:", "if False:"),
    Mutant("scores/stacks.py", "self._planes[start[0] : stop[0]]", "self._planes[start[0] :]"),
    Mutant("scores/totals.py", "2 * tp + fp + fn, empty=1.0)", "2 * tp + fp + fn, empty=0.0)"),
    Mutant("scores/totals.py", "defined = values[~np.isnan(values)]", "defined = values"),
    Mutant("scores/totals.py", '"dice": 2 * correct / both', '"dice": correct / both'),
    Mutant(
        "scores/totals.py",
        "return conditional_entropies(inside)[index] * inside.total, inside.total",
        "return conditional_entropies(inside)[index], 1",
    ),
    Mutant(
        "scores/totals.py",
        "sum(_ratio(tp, objects - tp) for tp in matched)",
        "sum(_ratio(tp, objects) for tp in matched)",
    ),
    Mutant("scores/evaluation.py", "    if missing:\n", "    if False:\n"),
    Mutant("scores/evaluation.py", "store.require(output, plan[int(index)])", "pass"),
    Mutant("scores/evaluation.py", "if shared and moved >= REUSED_IDS * shared:", "if shared:"),
    Mutant(
        "training/patches.py",
        "start = min(max(start, 0), max(0, extent - output))",
        "start = min(max(start, 0), max(0, extent - output - 1))",
    ),
    Mutant(
        "training/patches.py",
        "rng.integers(-(output // 2), max(1, extent - output // 2))",
        "rng.integers(0, max(1, extent - output))",
    ),
    Mutant("training/patches.py", "int(places.planes[rng.integers(len(places.planes))])", "0"),
    Mutant("training/patches.py", "len(self._shares), p=self._shares)", "len(self._shares))"),
    Mutant("training/patches.py", "[self._seed, *slot]", "[self._seed, slot[0]]"),
    Mutant("training/patches.py", "range(rank * batch, (rank + 1) * batch)", "range(batch)"),
    Mutant(
        "training/patches.py",
        "return start + (output - 1) / 2",
        "return start + output / 2",
    ),
    Mutant("training/truths.py", "targets[~mask] = IGNORED", "pass"),
    Mutant("training/windows.py", "if not np.isfinite(parts[-1]).all():", "if False:"),
    Mutant("training/truths.py", "if len(values) < 2:", "if len(values) < 1:"),
    Mutant("training/truths.py", "RING + 1, RING + 1", "1, 1"),
    Mutant("training/truths.py", "kind[joined[0]] == kind[joined[1]]", "joined[0] > 0"),
    Mutant("training/maps.py", "int(reach / size) + 1", "int(reach / size) // 2"),
    Mutant("training/maps.py", "np.where(learned == IGNORED, 0, learned)", "learned"),
    Mutant(
        "training/weights.py",
        "counts.sum() / (occurs.sum() * counts[occurs])",
        "counts.sum() / counts[occurs]",
    ),
    Mutant("training/weights.py", "out=weight, where=target == 0)", "out=weight)"),
    Mutant(
        "training/weights.py",
        "& (numbers[1:] != 0) & (numbers[:-1] != 0)",
        "& (numbers[1:] != 0)",
    ),
    Mutant("training/weights.py", "        view[:-1] &= ~touching\n", ""),
    Mutant("training/weights.py", "np.where(components, components + total, 0)", "components"),
    Mutant(
        "training/weights.py",
        "w0 * math.exp(-(total**2) / (2 * sigma**2))",
        "w0 * math.exp(-(total**2) / sigma**2)",
    ),
    Mutant("training/augment.py", "tuple(n + 1 for n in high)", "tuple(high)"),
    Mutant("training/augment.py", "np.floor(o + (c + 0.5))", "np.floor(o + c)"),
    Mutant("training/augment.py", "rng.choice([-1.0, 1.0], 2), 1.0)", "np.ones(2), 1.0)"),
    Mutant("training/patches.py", "rng, self._elastic, *self._turns)", "rng, self._elastic)"),
    Mutant("training/patches.py", "self._spacing, *self._turns)", "self._spacing)"),
    Mutant("training/displacement.py", "frequency * np.fft.rfft2(", "np.fft.rfft2("),
    Mutant("training/displacement.py", "peaks.std(axis=0).max() > SPREAD", "False"),
    Mutant("training/displacement.py", "if min(image.shape) <= 2 * REACH:", "if False:"),
    Mutant("training/recipes.py", '"upright" if y else "any"', '"any" if y else "any"'),
    Mutant(
        "training/augment.py",
        "min(top + 1, last_row), min(left + 1, last_column)",
        "min(top, last_row), min(left + 1, last_column)",
    ),
    Mutant("training/augment.py", "if reach.intersect(Box.of(window)) != reach:", "if False:"),
    Mutant("training/augment.py", "image * np.exp(gain) + offset", "image * np.exp(gain)"),
    Mutant("training/augment.py", "if noisy and noise:", "if noise:"),
    Mutant("training/augment.py", "axes=(-2, -1))", "axes=(-3, -1))"),
    Mutant("training/calibration.py", "counts[0].cumsum() + above", "counts[0].cumsum()"),
    Mutant("training/calibration.py", "(level + 0.5) / 255", "level / 255"),
    Mutant("training/calibration.py", "if held_out[0].cells is None:", "if True:"),
    Mutant("training/run_folder.py", "recipe[name] <= done[name]", "recipe[name] < 0"),
    Mutant(
        "training/trainer.py",
        "(losses * weights).mean()",
        "(losses * weights).sum() / weights.sum()",
    ),
    Mutant("training/trainer.py", "* (1 - progress) ** self._recipe.decay", "* (1 - progress)"),
    Mutant("training/trainer.py", "self._optimiser.zero_grad(set_to_none=True)", "pass"),
    Mutant("training/trainer.py", "if self._recipe.clip:", "if False:"),
    Mutant("training/trainer.py", '            group["lr"] = self.rate\n', "            pass\n"),
    Mutant(
        "training/trainer.py",
        "[self._recipe.seed, number, self._world.rank]",
        "[self._recipe.seed, number]",
    ),
    Mutant("training/trainer.py", "return loss.detach()", "return torch.tensor(float(loss))"),
    Mutant("training/trainer.py", "            if self._done:\n", "            if True:\n"),
]


def pytest_sessionstart() -> None:
    """Hook of pytest, of which this file is a plugin while the tests of a mutant run.

    Hypothesis then reports the first failing example. To simplify it may take minutes.
    """
    parent, phases = settings.get_profile("unet-ray"), (Phase.explicit, Phase.generate)
    settings.register_profile("mutants", parent, phases=phases)
    settings.load_profile("mutants")


def copy_of_tree(folder: Path) -> Path:
    """Copies the files that git knows, and new ones that it does not ignore."""
    command = ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others"]
    done = subprocess.run(
        [*command, "--exclude-standard"], check=True, capture_output=True, text=True
    )
    for name in filter(None, done.stdout.split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    return folder


def run_tests(tree: Path, tests: str, write_bytecode: bool = False) -> Result:
    """Runs tests in a copy of the tree until the first failure."""
    environment = {
        **os.environ,
        "PYTHONPATH": str(tree),
        "PYTHONDONTWRITEBYTECODE": "" if write_bytecode else "1",
        "CI": "1",  # the same examples of hypothesis in each run
    }
    options = ["-x", "-q", "-rfE", "-m", "not ray and not slow", f"--timeout={TEST_SECONDS}"]
    start = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", "pytest", *options, *PLUGINS, *tests.split()],
        cwd=tree,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)
        process.communicate()
        return Result(f"the limit of {SECONDS} s", time.monotonic() - start)
    seconds = time.monotonic() - start
    if process.returncode == 0:
        return Result("", seconds)
    failed = FAILED.search(output)
    return Result(failed[1] if failed else f"exit code {process.returncode}", seconds)


def try_mutant(tree: Path, mutant: Mutant) -> Result:
    """Applies a mutant to a copy of the tree, runs its tests, and restores the file."""
    path = tree / "unet_ray" / mutant.file
    source = path.read_text()
    path.write_text(source.replace(mutant.text, mutant.change))
    # Python compares bytecode with the time of the source in whole seconds.
    Path(importlib.util.cache_from_source(str(path))).unlink(missing_ok=True)
    try:
        return run_tests(tree, TESTS[mutant.file])
    finally:
        path.write_text(source)


def inapplicable(mutants: list[Mutant]) -> list[str]:
    """Returns one line for each mutant whose text does not occur exactly once."""
    counts = {m: (ROOT / "unet_ray" / m.file).read_text().count(m.text) for m in mutants}
    return [
        f"{mutant.name}: not applicable: text {'not present' if not n else f'present {n} times'}"
        for mutant, n in counts.items()
        if n != 1
    ]


def print_result(mutant: Mutant, result: Result) -> None:
    """Prints a row of the table."""
    if result.killer:
        outcome = f"killed by {result.killer}"
    else:
        outcome = f"survived ({mutant.survives or 'NO REASON STATED'})"
    print(f"{result.seconds:6.1f} s  {mutant.name}\n{'':10}{outcome}", flush=True)


def main(words: list[str]) -> int:
    """Runs the mutants; returns the exit code."""
    mutants = [m for m in MUTANTS if not words or any(word in m.name for word in words)]
    if not mutants:
        print("no mutant has such a name")
        return 1
    if lines := inapplicable(mutants):
        print("\n".join(lines))
        return 1
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(AT_ONCE) as pool:
        trees: queue.Queue[Path] = queue.Queue()
        trees.put(copy_of_tree(Path(folder) / "0"))
        for tests in sorted({TESTS[mutant.file] for mutant in mutants}):
            unchanged = run_tests(trees.queue[0], tests, write_bytecode=True)
            print(f"{unchanged.seconds:6.1f} s  {tests}, without a mutant", flush=True)
            if unchanged.killer:
                print(f"{unchanged.killer} fails without a mutant")
                return 1
        for number in range(1, AT_ONCE):
            tree = Path(folder) / str(number)
            trees.put(shutil.copytree(trees.queue[0], tree))

        def result_of(mutant: Mutant) -> Result:
            tree = trees.get()
            try:
                result = try_mutant(tree, mutant)
            finally:
                trees.put(tree)
            print_result(mutant, result)
            return result

        results = dict(zip(mutants, pool.map(result_of, mutants), strict=True))
    return summarise(results)


def summarise(results: dict[Mutant, Result]) -> int:
    """Prints the totals and the survivors; returns the exit code."""
    survivors = [mutant for mutant, result in results.items() if not result.killer]
    equivalent = [mutant for mutant in survivors if mutant.survives.startswith("equivalent")]
    effective = len(results) - len(equivalent)
    killed = len(results) - len(survivors)
    share = killed / effective if effective else 1.0
    print(
        f"\n{len(results)} mutants: {killed} killed, {len(equivalent)} equivalent, "
        f"{len(survivors) - len(equivalent)} others survived; {share:.1%} of those that are not "
        "equivalent are killed"
    )
    for mutant in survivors:
        print(f"survived: {mutant.name}\n{'':10}{mutant.survives or 'no reason stated'}")
    surprising = [
        mutant for mutant, result in results.items() if bool(result.killer) == bool(mutant.survives)
    ]
    for mutant in surprising:
        if mutant.survives:
            print(f"killed, although a reason to survive is stated: {mutant.name}")
    return int(bool(surprising) or share < LEAST_KILLED)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
