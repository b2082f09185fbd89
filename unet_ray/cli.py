"""The command line: verbs and flags, and which exit code a failure becomes. Nothing else.

What a verb does is in the rooms below; torch and Ray are imported only when a verb needs them.
"""

from __future__ import annotations

import json
import math
import os
import sys
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
import yaml

from unet_ray.errors import (
    InputError,
    QuarantinedError,
    UnetRayError,
    nearest,
    refuse_below_file,
)
from unet_ray.progress import Pace, ProgressLine, format_seconds
from unet_ray.segmentation.memory import format_bytes, keep_freed_memory, parse_bytes
from unet_ray.storage.places import place_of, write_whole
from unet_ray.tiling.boxes import Box
from unet_ray.versions import VERSION

if TYPE_CHECKING:
    from unet_ray.segmentation.choice import Outlook, Settings
    from unet_ray.segmentation.execution import Progress
    from unet_ray.segmentation.preparation import Segmentation
    from unet_ray.segmentation.trial import Pilot
    from unet_ray.training.run_folder import Measure

Function = Callable[..., Any]


class Verb(click.Command):
    """A command whose options may take several values at once, and which reads ``--config``."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Turns ``--images a b`` into ``--images a --images b`` before click reads it."""
        many = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        return super().parse_args(ctx, list(_spread(args, many)))

    def synopsis(self) -> str:
        """All flags on one line, as the overview of all verbs shows them."""
        pieces = [_piece(p, click.Context(self)) for p in self.params]
        return " ".join([*pieces, "[--help]"])


def _spread(args: Sequence[str], many: set[str]) -> list[str]:
    spread: list[str] = []
    option = None
    for arg in args:
        if arg.startswith("--"):
            option = arg if arg in many else None
            spread.append(arg)
        elif option and spread[-1] != option:
            spread += [option, arg]
        else:
            spread.append(arg)
    return spread


def _piece(parameter: click.Parameter, ctx: click.Context) -> str:
    if isinstance(parameter, click.Argument):
        return parameter.make_metavar(ctx)
    option = parameter.opts[0]
    flag = isinstance(parameter, click.Option) and parameter.is_flag
    text = option if flag else f"{option} {parameter.make_metavar(ctx)}"
    return text if parameter.required else f"[{text}]"


class Overview(click.Group):
    """The list of verbs, each with all its flags and an example."""

    def format_help(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes every verb with its flags, so that one page shows everything."""
        formatter.write("unet-ray: segments microscopy volumes of any size with a U-Net.\n\n")
        formatter.write("Usage: unet-ray VERB ...   (unet-ray VERB --help explains each flag)\n")
        for name, command in self.commands.items():
            formatter.write(f"\n{command.get_short_help_str(90)}\n")
            synopsis = command.synopsis() if isinstance(command, Verb) else ""
            # Not `formatter.write_usage`, which breaks lines within flags, at their hyphens.
            usage = textwrap.fill(
                f"unet-ray {name} {synopsis}",
                formatter.width,
                initial_indent="  ",
                subsequent_indent=" " * len(f"  unet-ray {name} "),
                break_on_hyphens=False,
            )
            formatter.write(f"{usage}\n")
            formatter.write(f"    {command.epilog}\n".replace("\b\n", ""))
        formatter.write(f"\nversion {VERSION}\n")

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Names the nearest verb when there is none of that name."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            known = ", ".join(self.commands)
            hint = nearest(args[0], self.commands)
            raise InputError(f"{args[0]!r} is not a verb{hint}: choose from {known}.")
        return super().resolve_command(ctx, args)


@click.group(cls=Overview, context_settings={"max_content_width": 100})
@click.version_option(VERSION, message="unet-ray %(version)s")
def app() -> None:
    """The command line of unet-ray."""


def _options(*options: Function) -> Function:
    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def _read_config(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Takes flags from a YAML file; the command line wins over it."""
    if value is None:
        return
    try:
        told = yaml.safe_load(Path(value).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{value}: cannot be read as YAML ({str(error).splitlines()[0]})."
        ) from error
    if not isinstance(told, dict):
        raise InputError(f"{value}: must be a list of flags, as in `base-channels: 32`.")
    flags = {p.opts[0].removeprefix("--"): p for p in ctx.command.params if p is not parameter}
    defaults = {}
    for key, setting in told.items():
        flag = flags.get(str(key).replace("_", "-"))
        if flag is None or flag.name is None:
            raise InputError(f"{value}: {key!r} is not a flag of train{nearest(str(key), flags)}.")
        # As text, so that a value is checked as it would be on the command line.
        values = [str(item) for item in (setting if isinstance(setting, list) else [setting])]
        many = getattr(flag, "multiple", False)
        if not many and isinstance(setting, list):
            raise InputError(
                f"{value}: {key!r} takes one value, not {setting}; see {flag.opts[0]}."
            )
        defaults[flag.name] = values if many else values[0]
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


ENGINE = click.option(
    "--engine",
    type=click.Choice(["auto", "ray", "local"]),
    default="auto",
    show_default=True,
    help="Who runs it: Ray, or this process. auto: Ray in jobs/, with RAY_ADDRESS set or several "
    "GPUs; else local.",
)
PRECISION = click.option(
    "--precision",
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Number format of the network. auto: bfloat16 where the hardware multiplies in it.",
)
WRITING = (
    click.option(
        "--overwrite",
        is_flag=True,
        help="Delete the store first, if it is ours. After a kill, leave it out to go on.",
    ),
    click.option(
        "--takeover", is_flag=True, help="Force out another run that is writing to the store."
    ),
)
MODEL = click.option("--model", required=True, metavar="RUN|FILE", help="What `train` made.")
TILING = (
    click.option("--outputs", metavar="A,B", help="probabilities,classes (default: both)."),
    click.option(
        "--region",
        metavar="z0:z1,y0:y1,x0:x1",
        help="Only this part, in voxels, rounded outwards to whole tiles.",
    ),
    click.option(
        "--mask",
        metavar="PATH",
        help="Only tiles where this volume, coarser or as fine as the input, is not zero.",
    ),
    click.option("--level", type=int, default=0, help="Resolution level of an OME-Zarr input."),
    click.option("--channel", type=int, help="Channel of the input, from 0."),
    click.option("--time", type=int, help="Time point of the input, from 0."),
    click.option(
        "--tile",
        metavar="Z,Y,X",
        help="Voxels that a tile owns; rounded up to the network's step, clamped to the volume. "
        "Default: chosen from --memory, equal tiles.",
    ),
    click.option(
        "--memory", default="4GiB", show_default=True, help="What one predicting worker may use."
    ),
    click.option(
        "--workers", type=int, metavar="N", help="Tiles at once. Default: cores, or GPUs."
    ),
    ENGINE,
    PRECISION,
    click.option(
        "--tta",
        is_flag=True,
        help="Average over the 8 rotations and mirror images of each tile: 8 times the time.",
    ),
    click.option(
        "--nan",
        type=click.Choice(["error", "zero"]),
        default="error",
        show_default=True,
        help="Voxels that are not finite numbers: quarantine their tiles, or take them as 0.",
    ),
)


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray demo --out demo",
    short_help="Make a phantom, train on it, segment a larger one on Ray, score, draw.",
)
@click.option("--out", default="demo", show_default=True, help="Folder of the results.")
def demo(out: str) -> None:
    """Shows the whole system on a phantom: train, segment on Ray, score, pictures. 6 minutes."""
    from unet_ray import demo as demonstration

    demonstration.run(Path(out), _say)


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray train --images raw.tif --labels membranes.tif --out runs/first "
    "--minutes 10",
    short_help="Train a U-Net on labelled volumes.",
)
@_options(
    click.option(
        "--config",
        metavar="FILE.yaml",
        callback=_read_config,
        is_eager=True,
        expose_value=False,
        help="Flags as YAML, `base-channels: 32`; the command line wins.",
    ),
    click.option("--images", required=True, multiple=True, metavar="PATH...", help="The volumes."),
    click.option(
        "--labels",
        required=True,
        multiple=True,
        metavar="PATH...",
        help="Their class labels, in the same order and shape; classes are the distinct values.",
    ),
    click.option(
        "--labels-are",
        type=click.Choice(["classes", "instances"]),
        default="classes",
        show_default=True,
        help="instances: numbers of cells, 0 is background; cell is learned, with background "
        "between cells that touch.",
    ),
    click.option("--ignore-label", type=int, metavar="N", help="Label without annotation."),
    click.option("--val", metavar="A:B,...", help="Slices to hold out and score, from A to B - 1."),
    click.option("--val-fraction", type=float, metavar="F", help="Or a share, the last ones."),
    click.option("--best-by", metavar="SCORE", help="[v_rand; seg of instances; else iou]"),
    click.option("--patience", type=int, metavar="N", help="Stop after N tenths without a best."),
    click.option("--out", required=True, metavar="RUN", help="Folder of the run."),
    click.option(
        "--recipe",
        type=click.Choice(["default", "paper"]),
        default="default",
        show_default=True,
        help="paper: SGD with momentum 0.99, dropout, no norm, patches of 572, as published.",
    ),
    click.option("--dims", type=click.IntRange(2, 3), default=2, show_default=True, help="Axes."),
    click.option("--depth", type=int, help="Number of poolings. [4]"),
    click.option("--base-channels", type=int, help="Channels at full resolution. [64]"),
    click.option(
        "--norm",
        type=click.Choice(["none", "weight", "batch"]),
        help="None, weight standardisation, or batch norm with statistics measured once. "
        "[weight; paper: none]",
    ),
    click.option("--dropout", type=float, metavar="P", help="[0; paper: 0.5]"),
    click.option("--patch", metavar="N|Z,Y,X", help="Voxels the network reads. [380; paper: 572]"),
    click.option("--batch", type=int, metavar="N", help="Patches of a step and worker. [1]"),
    click.option("--steps", type=int, metavar="N", help="Stop after N steps."),
    click.option(
        "--minutes", type=float, metavar="M", help="Stop after M minutes. [15, or --steps]"
    ),
    click.option("--learning-rate", type=float, metavar="R", help="At the start. [0.001]"),
    click.option("--momentum", type=float, metavar="R", help="Of SGD. [paper: 0.99]"),
    click.option("--w0", type=float, help="Weight of borders between cells, eq. 2. [10]"),
    click.option("--sigma", type=float, help="Width of that border term in voxels. [5]"),
    click.option("--elastic", type=float, metavar="VOXELS", help="Random deformation, sd. [10]"),
    click.option("--seed", type=int, metavar="N", help="Where chance starts. [0]"),
    click.option(
        "--workers",
        metavar="N|MIN:MAX",
        help="Processes that train together, or as many as the cluster has from MIN to MAX. [1; "
        "GPUs]",
    ),
    ENGINE,
    PRECISION,
)
@click.pass_context
def train(ctx: click.Context, /, **flags: Any) -> None:
    """Trains a U-Net with the paper's weighted loss on labelled volumes.

    The same command again goes on where it was interrupted.
    """
    if flags.pop("dims") == 3:
        raise InputError("dims=3 is not built yet: choose --dims 2, which takes stacks by slices.")
    patch = _parse_patch(flags.pop("patch"))
    from unet_ray.training.recipes import Recipe
    from unet_ray.training.trainer import train

    images, labels, out, engine, workers, recipe = (
        flags.pop(name) for name in ("images", "labels", "out", "engine", "workers", "recipe")
    )
    line, told = ProgressLine("train"), set()

    def watch(measure: Measure) -> None:
        if measure.patches not in told:
            told.add(measure.patches)
            _say(
                f"{measure.workers} worker{'s' * (measure.workers > 1)}: a step sees "
                f"{measure.patches} patch{'es' * (measure.patches > 1)}; the learning rate starts "
                f"at {chosen.learning_rate:g} for any number."
            )
        left = measure.seconds / max(measure.progress, 1e-9) * (1 - measure.progress)
        line.show(
            measure.progress,
            f"step {measure.step}, loss {measure.loss:.4f}, "
            f"{measure.step / max(measure.seconds, 1e-9):.2f} steps/s, {format_seconds(left)} left",
        )

    chosen, together = Recipe.of(recipe, patch=patch, **flags), _parse_workers(workers)
    finished = (Path(out) / "model.safetensors").exists()
    model = train(list(images), list(labels), out, chosen, _engine(ctx, engine), together, watch)
    if finished:
        _say("already trained; nothing to do.")
    if not finished or not (Path(out) / "report.html").exists():
        from unet_ray.report.page import write_report

        _say(f"report: {write_report(Path(out))}")
    click.echo(model)


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray plan volume.zarr --model runs/first --memory 8GiB",
    short_help="Say what segmenting would take; nothing is written.",
)
@click.argument("input", metavar="INPUT")
@_options(
    MODEL,
    click.option("--out", metavar="OUT.zarr", help="Store; tells what is free on its disk."),
    *TILING,
    *WRITING,
    click.option(
        "--price-per-hour", type=click.FloatRange(min=0), help="Of one worker; tells the price."
    ),
    click.option("--json", "as_json", is_flag=True, help="For machines."),
)
@click.pass_context
def plan(
    ctx: click.Context,
    /,
    input: str,
    model: str,
    out: str | None,
    price_per_hour: float | None,
    as_json: bool,
    **flags: Any,
) -> None:
    """Shows tiles, halo cost, memory, disk and time of a run before it starts; writes nothing.

    A few tiles of the volume are tried, which takes a quarter of a minute or so.
    """
    if price_per_hour is not None and not math.isfinite(price_per_hour):
        raise InputError(f"price-per-hour={price_per_hour} must be a number, 0 or more.")
    if out == "":
        raise InputError("out='' names no store; leave --out out, or name one.")
    settings = _settings(ctx, flags)
    from unet_ray.segmentation import choice as planning
    from unet_ray.segmentation import trial as pilot
    from unet_ray.segmentation.disk import free_bytes
    from unet_ray.segmentation.preparation import refuse_overlap

    outlook = planning.plan(input, model, settings)
    if out:
        refuse_overlap(place_of(out), place_of(outlook.volume.path))
    trial = pilot.try_tiles(outlook, settings.workers)
    free = free_bytes([place_of(out or Path.cwd())], bool(out) and settings.overwrite)
    refusal = _refusal(outlook, trial, settings, out, free)
    if as_json:
        known = None if math.isinf(free) else int(free)
        told = {**outlook.to_json(), **_trial_json(outlook, trial, price_per_hour)}
        click.echo(json.dumps({**told, "disk_free_bytes": known, "refusal": refusal}, indent=2))
    else:
        there = f"at {out}" if out else "in this folder"
        told_free = "" if math.isinf(free) else f"; {format_bytes(free)} free {there}"
        lines = _describe_trial(outlook, trial, price_per_hour, told_free)
        refused = [f"  refused by segment: {refusal}"] if refusal else []
        click.echo("\n".join([_describe(outlook, settings), *lines, *refused]))


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray segment volume.tif --model runs/first --out volume.zarr",
    short_help="Segment volumes with a trained model.",
)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@_options(
    MODEL,
    click.option("--out", required=True, metavar="OUT.zarr", help="Store; a folder for several."),
    *TILING,
    *WRITING,
)
@click.pass_context
def segment(
    ctx: click.Context,
    /,
    inputs: tuple[str, ...],
    model: str,
    out: str,
    **flags: Any,
) -> None:
    """Segments volumes, tile by tile, into OME-Zarr 0.5 stores.

    The same command again goes on where it was interrupted; a finished one does nothing.
    """
    settings = _settings(ctx, flags)
    from unet_ray.segmentation.execution import execute, wanted_tiles
    from unet_ray.segmentation.segment import prepare_all

    quarantined = None
    for run in prepare_all(inputs, model, out, settings):
        _announce(run, settings)
        try:
            if not execute(run, settings, _watch(Path(run.volume.path).name)):
                asked = wanted_tiles(run, settings).tiles.any()
                why = "already finished" if asked else "region and mask have no tile in common"
                _say(f"{run.out.name}: {why}; nothing to do.")
        except QuarantinedError as error:  # told at once; other inputs come first
            _say(f"unet-ray: {error}")
            quarantined = error
        click.echo(run.out)
    if quarantined:
        ctx.exit(quarantined.exit_code)


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray evaluate volume.zarr truth.tif --as isbi --json scores.json",
    short_help="Score a prediction against the truth.",
)
@click.argument("prediction", metavar="PREDICTION")
@click.argument("truth", metavar="TRUTH")
@click.option(
    "--as",
    "kind",
    type=click.Choice(["isbi", "instances", "classes"]),
    required=True,
    help="isbi: membranes, from probabilities of cell. instances: labelled objects. "
    "classes: class maps.",
)
@click.option("--per-slice", is_flag=True, help="Each slice is an image of its own; ids too.")
@click.option("--json", "file", metavar="FILE", help="Also write the scores as JSON; - for stdout.")
def evaluate(prediction: str, truth: str, kind: Any, per_slice: bool, file: str | None) -> None:
    """Scores a prediction against the truth: TIFF, a folder of slices, Zarr or our own store.

    Of a store, what --as needs is taken. docs/scores.md explains every score.
    """
    if file not in (None, "-"):
        _refuse_json(Path(file), (prediction, truth))
    from unet_ray.scores.evaluation import evaluate as score

    line = ProgressLine("evaluate")

    def watch(done: int, total: int) -> None:
        line.show(done / total, f"{done}/{total}")

    found = score(prediction, truth, kind, per_slice, watch)
    if found.note:
        _say(found.note)
    text = json.dumps(found.to_json(), indent=2) + "\n"
    click.echo(text if file == "-" else found.table(), nl=file != "-")
    if file not in (None, "-"):
        write_whole(Path(file), text.encode())


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray verify volume.zarr --tiles 10",
    short_help="Check every checksum of a store, and some tiles by making them again.",
)
@click.argument("out", metavar="OUT.zarr")
@click.option(
    "--tiles",
    type=int,
    default=3,
    show_default=True,
    metavar="N",
    help="Tiles, chosen at random, to make again and compare; they need input and model.",
)
@click.option("--repair", is_flag=True, help="Make damaged and missing shards again.")
@click.pass_context
def verify(ctx: click.Context, /, out: str, tiles: int, repair: bool) -> None:
    """Names every damaged or missing shard of the tiles that are done; exit code 1 if there is one.

    Every byte of a shard is under a checksum; that shards were swapped, only new tiles tell.
    """
    from unet_ray.segmentation.verification import verify as check

    verdict = check(out, tiles, repair)
    click.echo("\n".join([*verdict.notes, *verdict.damage, f"{out}: {verdict.summary()}"]))
    if verdict.refusal:
        _say(f"unet-ray: {verdict.refusal}")
    ctx.exit(1 if verdict.damage else 2 if verdict.refusal else 0)


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray report volume.zarr --truth truth.tif",
    short_help="Write a page with pictures about a run.",
)
@click.argument("path", metavar="RUN|OUT.zarr")
@click.option("--truth", metavar="PATH", help="Class labels of the volume: adds scores, borders.")
def report(path: str, truth: str | None) -> None:
    """Writes one page, report.html, with curves, pictures, scores and how it was made.

    It needs no network. Of a run it lies in RUN, of a store beside it: OUT.report.html.
    """
    from unet_ray.report.page import write_report

    click.echo(write_report(path, truth))


def _refuse_json(file: Path, inputs: Sequence[str]) -> None:
    """Refuses to write scores where no file can be, or in place of what is scored."""
    refuse_below_file(file)
    if file.is_dir():
        raise InputError(f"json={str(file)!r} is a folder; name a file in it, as in scores.json.")
    for path in inputs:
        if file.resolve().is_relative_to(Path(path).resolve()):
            raise InputError(f"json={str(file)!r} would be written into {path}, which is scored.")


def _watch(label: str) -> Callable[[Progress], None]:
    line = ProgressLine(label)
    pace: Pace | None = None

    def watch(progress: Progress) -> None:
        nonlocal pace
        pace = pace or Pace(progress.workers)
        pace.saw(progress.seconds, progress.finished, progress.voxels)
        to_do = progress.total - progress.done - progress.quarantined
        parts = [
            f"{progress.done}/{progress.total} tiles",
            f"{progress.quarantined} quarantined" if progress.quarantined else "",
            f"{progress.failures} failures" if progress.failures else "",
            f"{pace.voxels / 1e6:.3f} Mvoxel/s" if pace.voxels else "",
            f"{format_seconds(pace.seconds(to_do))} left" if pace.voxels else "",
            f"{format_bytes(progress.held)} of {format_bytes(progress.promised)}"
            if progress.held
            else "",
        ]
        line.show(1 - to_do / progress.total, ", ".join(filter(None, parts)))

    return watch


def _announce(run: Segmentation, settings: Settings) -> None:
    tiles = run.plan
    if settings.tile and settings.tile != tiles.core:
        asked, fitted = _commas(settings.tile), _commas(tiles.core)
        _say(f"tile {asked} fitted to the network and the volume: {fitted}")
    if unread := run.intensity.unread:
        since = "could not be read when this was begun" if run.resumed else "cannot be read"
        _say(
            f"{len(unread)} parts of the input {since}, as {unread[0]}: the mean grey value is "
            "that of the rest; once they can be read, --overwrite makes it that of all."
        )
    verb = "going on with" if run.resumed else "writing"
    _say(
        f"{verb} {run.out.name}: {len(tiles)} tiles of {_commas(tiles.core)}, {run.precision} on "
        f"{run.device}, engine {settings.engine}, {_memory(run, settings)}"
    )


def _memory(run: Segmentation, settings: Settings) -> str:
    from unet_ray.segmentation.choice import process_bytes

    whose = "per worker" if settings.engine == "ray" else "for all workers, in this process"
    return f"{format_bytes(process_bytes(run.memory, run.device, settings))} {whose}"


def _describe(outlook: Outlook, settings: Settings) -> str:
    memory, together = outlook.memory, settings.engine == "local" and outlook.workers > 1
    return "\n".join(
        [
            f"{outlook.volume.path}: {outlook.volume.dtype}, {outlook.volume.shape} (c, z, y, x)",
            repr(outlook.plan),
            f"  halo    {100 * outlook.halo_overhead:.0f} % more arithmetic than the voxels alone",
            f"  reads   {outlook.read_amplification:.2f} times the input, in its chunks of "
            f"{_commas(outlook.volume.chunk)}",
            f"  memory  {format_bytes(outlook.worker_memory)} per worker (process "
            f"{format_bytes(memory.process)}, index {format_bytes(memory.index)}, weights "
            f"{format_bytes(memory.weights)}, tile {format_bytes(memory.tile)}, pass "
            f"{format_bytes(memory.forward)}, allocator)"
            + (f", {outlook.under_way} tiles under way" if outlook.under_way > 1 else ""),
            *_helpers(outlook),
            f"  driver  {format_bytes(outlook.driver_memory)}"
            + (", all workers in it" if together else ""),
            f"  runs    {outlook.tiles} tiles in {outlook.precision} on {outlook.device}",
        ]
    )


def _helpers(outlook: Outlook) -> list[str]:
    from unet_ray.engine.cluster import HELPERS

    if not outlook.helper_memory:
        return []
    each = format_bytes(outlook.helper_memory)
    return [f"  helpers {HELPERS} that read and {HELPERS} that write for each GPU, {each} each"]


def _refusal(
    outlook: Outlook, trial: Pilot | None, settings: Settings, out: str | None, free: float
) -> str | None:
    """Why `segment` would refuse what was planned; None if it fits this machine and its disk."""
    from unet_ray.segmentation.disk import is_too_much
    from unet_ray.segmentation.preparation import check_room

    try:
        check_room(place_of(out or Path.cwd()), outlook.memory, outlook.device, settings)
    except InputError as error:
        return str(error)
    if out and trial and is_too_much(trial.stored * outlook.tiles, free):
        return f"{out}: {format_bytes(free)} are free there."
    return None


def _trial_json(outlook: Outlook, trial: Pilot | None, price: float | None) -> dict[str, Any]:
    """What a trial tells, for machines; null is what is not known."""
    seconds = trial and trial.run_seconds(outlook)
    return {
        "tile_seconds": trial and round(trial.seconds, 4),
        "seconds": seconds and round(seconds, 1),
        "price": _price(outlook, trial, price),
        "disk_estimate_bytes": trial and round(trial.stored * outlook.tiles),
    }


def _price(outlook: Outlook, trial: Pilot | None, per_hour: float | None) -> float | None:
    """What all workers cost together, however many they are."""
    if trial is None or per_hour is None:
        return None
    return round(trial.seconds * outlook.tiles / 3600 * per_hour, 4)


def _describe_trial(
    outlook: Outlook, trial: Pilot | None, per_hour: float | None, free: str
) -> list[str]:
    if not outlook.tiles:
        return ["  nothing to do: region and mask have no tile in common"]
    if trial is None:
        return [
            f"  disk    at most {format_bytes(outlook.disk_bytes)}{free}",
            "  time    not known: a tile needs a device, or memory, that is not in this machine",
        ]
    seconds = trial.run_seconds(outlook)
    lines = [
        f"  disk    about {format_bytes(trial.stored * outlook.tiles)}, at most "
        f"{format_bytes(outlook.disk_bytes)}{free}",
        f"  time    about {format_seconds(seconds)} with {outlook.workers} workers, after the "
        f"start: {trial.seconds:.2f} s a tile (read {trial.read:.2f}, predict "
        f"{trial.predict:.2f},\n          write {trial.write:.2f}; {trial.tiles} tiles timed by "
        f"{trial.passes} passes, {trial.threads} at a time;\n          {trial.constant} of "
        f"{trial.looks} passes looked at are constant)",
    ]
    if trial.failures:
        count = f"{len(trial.failures)} of {trial.looks + len(trial.failures)}"
        lines.append(f"  failed  {count} passes looked at: {trial.failures[0]}")
    price = _price(outlook, trial, per_hour)
    return lines if price is None else [*lines, f"  price   about {price:.2f}"]


def _settings(ctx: click.Context, flags: dict[str, Any]) -> Settings:
    """Everything that can be checked without opening a file is checked here."""
    _check_workers(flags["workers"])
    tile = None if flags["tile"] is None else _parse_tile(flags["tile"])
    region = None if flags["region"] is None else _parse_region(flags["region"])
    memory = parse_bytes(flags["memory"])
    if flags["mask"] == "":
        raise InputError("mask='' names no volume; leave --mask out to do all tiles.")
    from unet_ray.segmentation.choice import Settings

    return Settings(
        outputs=tuple(flags["outputs"].split(",")) if flags["outputs"] else None,
        region=region,
        mask=flags["mask"],
        channel=flags["channel"],
        time=flags["time"],
        level=flags["level"],
        tile=tile,
        memory=memory,
        workers=flags["workers"],
        engine=_engine(ctx, flags["engine"]),
        precision=None if flags["precision"] == "auto" else flags["precision"],
        tta=flags["tta"],
        nan=flags["nan"],
        overwrite=flags.get("overwrite", False),
        takeover=flags.get("takeover", False),
    )


def _engine(ctx: click.Context, asked: str) -> Any:
    if asked != "auto":
        return asked
    if ctx.obj == "job" or os.environ.get("RAY_ADDRESS"):
        return "ray"
    import torch

    return "ray" if torch.cuda.device_count() > 1 else "local"


def _check_workers(workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers} must be at least 1.")


def _parse_workers(text: str | None) -> int | tuple[int, int] | None:
    if text is None:
        return None
    numbers = _integers(text.split(":"))
    if numbers is None or len(numbers) > 2 or numbers[0] < 1 or numbers[-1] < numbers[0]:
        raise InputError(f"workers={text!r} must be a number above zero or a range, as in 2:8.")
    return numbers[0] if len(numbers) == 1 else (numbers[0], numbers[1])


def _parse_tile(text: str) -> tuple[int, int, int]:
    numbers = _integers(text.split(","))
    if numbers is None or len(numbers) != 3 or min(numbers) < 1:
        raise InputError(f"tile={text!r} must be three numbers above zero, as in 16,512,512.")
    return numbers[0], numbers[1], numbers[2]


def _parse_patch(text: str | int | None) -> tuple[int, int] | None:
    if text is None:
        return None
    numbers = _integers(str(text).split(","))
    if numbers and len(numbers) == 1:
        numbers = [1, *numbers, *numbers]
    if numbers is None or len(numbers) != 3 or numbers[0] != 1 or min(numbers) < 1:
        raise InputError(
            f"patch={text!r} must be one number, as in 380, or 1,Y,X, as in 1,380,572."
        )
    return numbers[1], numbers[2]


def _parse_region(text: str) -> Box:
    axes = [_integers(part.split(":")) for part in text.split(",")]
    form = f"region={text!r} must be three ranges of voxels, as in 0:16,0:512,128:640"
    if len(axes) != 3 or any(axis is None or len(axis) != 2 for axis in axes):
        raise InputError(f"{form}.")
    start, stop = zip(*(axis for axis in axes if axis), strict=True)
    if any(a < 0 or b <= a for a, b in zip(start, stop, strict=True)):
        raise InputError(f"{form}: each from 0 or more up to a larger number.")
    return Box(start, stop)


def _integers(parts: Sequence[str]) -> list[int] | None:
    try:
        return [int(part) for part in parts]
    except ValueError:
        return None


def _commas(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _say(text: str) -> None:
    click.echo(text, err=True)


def main(verb: str | None = None) -> int:
    """Runs the command line; returns the exit code.

    Args:
        verb: run only this verb, as a job of Ray does.
    """
    keep_freed_memory()
    command: click.Command = app.commands[verb] if verb else app
    name = f"python jobs/{verb}.py" if verb else "unet-ray"
    try:
        # What `ctx.exit` was given; verbs themselves return nothing.
        return command.main(prog_name=name, standalone_mode=False, obj="job" if verb else None) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message())
        return 2
    except click.ClickException as error:
        _say(f"unet-ray: {' '.join(error.format_message().split())}")
        return 2
    except UnetRayError as error:
        _say(f"unet-ray: {error}")
        return error.exit_code
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        _say(f"unet-ray: {place}{error.strerror or error}.")
        return 1
    except (KeyboardInterrupt, click.Abort):
        _say("unet-ray: interrupted; what was committed stays, the same command goes on.")
        sys.stderr.flush()
        # Passes that still run in threads are dropped: nothing half-done counts as done.
        os._exit(130)
