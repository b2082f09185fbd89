"""The command line: verbs and flags, and which exit code a failure becomes. Nothing else.

What a verb does is in the rooms below; torch and Ray are imported only when a verb needs them.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from unet_ray.errors import (
    InputError,
    QuarantinedError,
    UnetRayError,
    refuse_below_file,
)
from unet_ray.flags import (
    ENGINE,
    MODEL,
    PRECISION,
    TAKEOVER,
    TILING,
    WRITING,
    Overview,
    Verb,
    check_workers,
    options,
    read_config,
    say,
)
from unet_ray.machine import keep_freed_memory
from unet_ray.progress import ProgressBar, TilesBar, TrainingBar
from unet_ray.segmentation.forecast import describe, describe_trial, refusal_of, trial_json
from unet_ray.storage.places import place_of, write_whole
from unet_ray.tiling.boxes import Box
from unet_ray.units import (
    commas,
    format_bytes,
    parse_bytes,
    parse_patch,
    parse_region,
    parse_tile,
    parse_workers,
)
from unet_ray.versions import VERSION

if TYPE_CHECKING:
    from unet_ray.segmentation.run import Segmentation
    from unet_ray.segmentation.settings import Settings


@click.group(cls=Overview, context_settings={"max_content_width": 100})
@click.version_option(VERSION, message="unet-ray %(version)s")
def app() -> None:
    """The command line of unet-ray."""


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray demo --out demo",
    short_help="Make a phantom, train on it, segment a larger one on Ray, score, draw.",
)
@click.option("--out", default="demo", show_default=True, help="Folder of the results.")
def demo(out: str) -> None:
    """Shows the whole system on a phantom: train, segment on Ray, score, pictures. 6 minutes."""
    from unet_ray import demo as demonstration

    demonstration.run(Path(out), say)


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray train --images raw.tif --labels membranes.tif --out runs/first "
    "--minutes 10",
    short_help="Train a U-Net on labelled volumes.",
)
@options(
    click.option(
        "--config",
        metavar="FILE.yaml",
        callback=read_config,
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
    TAKEOVER,
)
@click.pass_context
def train(ctx: click.Context, /, **flags: Any) -> None:
    """Trains a U-Net with the paper's weighted loss on labelled volumes.

    The same command again goes on where it was interrupted.
    """
    if flags.pop("dims") == 3:
        raise InputError("dims=3 is not built yet: choose --dims 2, which takes stacks by slices.")
    patch = parse_patch(flags.pop("patch"))
    from unet_ray.training.recipes import Recipe
    from unet_ray.training.train import train

    images, labels, out, engine, workers, recipe, takeover = (
        flags.pop(name)
        for name in ("images", "labels", "out", "engine", "workers", "recipe", "takeover")
    )
    chosen, together = Recipe.of(recipe, patch=patch, **flags), parse_workers(workers)
    finished = (Path(out) / "model.safetensors").exists()
    with TrainingBar("train") as watch:
        model = train(
            list(images),
            list(labels),
            out,
            chosen,
            _engine(ctx, engine),
            together,
            watch,
            takeover=takeover,
            announce=watch.show_table,
        )
    if finished:
        say("already trained; nothing to do.")
    if not finished or not (Path(out) / "report.html").exists():
        from unet_ray.report.page import write_report

        say(f"report: {write_report(Path(out))}")
    click.echo(model)


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray plan volume.zarr --model runs/first --memory 8GiB",
    short_help="Say what segmenting would take; nothing is written.",
)
@click.argument("input", metavar="INPUT")
@options(
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
    from unet_ray.segmentation.disk import free_bytes
    from unet_ray.segmentation.outlook import plan as outlook_of
    from unet_ray.segmentation.pilot import try_tiles
    from unet_ray.segmentation.preparation import refuse_overlap

    outlook = outlook_of(input, model, settings)
    if out:
        refuse_overlap(place_of(out), place_of(outlook.volume.path))
    trial = try_tiles(outlook, settings.workers)
    free = free_bytes([place_of(out or Path.cwd())], bool(out) and settings.overwrite)
    refusal = refusal_of(outlook, settings, out, free)
    if as_json:
        known = None if math.isinf(free) else int(free)
        told = {**outlook.to_json(), **trial_json(outlook, trial, price_per_hour)}
        click.echo(json.dumps({**told, "disk_free_bytes": known, "refusal": refusal}, indent=2))
    else:
        there = f"at {out}" if out else "in this folder"
        told_free = "" if math.isinf(free) else f"; {format_bytes(free)} free {there}"
        lines = describe_trial(outlook, trial, price_per_hour, told_free)
        refused = [f"  refused by segment: {refusal}"] if refusal else []
        click.echo("\n".join([describe(outlook, settings), *lines, *refused]))


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray segment volume.tif --model runs/first --out volume.zarr",
    short_help="Segment volumes with a trained model.",
)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@options(
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
    from unet_ray.segmentation.execution import execute
    from unet_ray.segmentation.preparation import wanted_tiles
    from unet_ray.segmentation.segment import prepare_all

    quarantined = None
    for run in prepare_all(inputs, model, out, settings):
        _announce(run, settings)
        try:
            with TilesBar(Path(run.volume.path).name) as watch:
                finished = execute(run, settings, watch)
            if not finished:
                asked = wanted_tiles(run, settings).tiles.any()
                why = "already finished" if asked else "region and mask have no tile in common"
                say(f"{run.out.name}: {why}; nothing to do.")
        except QuarantinedError as error:  # told at once; other inputs come first
            say(f"unet-ray: {error}")
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

    with ProgressBar("evaluate") as bar:
        found = score(
            prediction,
            truth,
            kind,
            per_slice,
            lambda done, total: bar.show(done / total, f"{done}/{total}"),
        )
    if found.note:
        say(found.note)
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
        say(f"unet-ray: {verdict.refusal}")
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


def _announce(run: Segmentation, settings: Settings) -> None:
    tiles = run.plan
    if settings.tile and settings.tile != tiles.core:
        asked, fitted = commas(settings.tile), commas(tiles.core)
        say(f"tile {asked} fitted to the network and the volume: {fitted}")
    if unread := run.intensity.unread:
        since = "could not be read when this was begun" if run.resumed else "cannot be read"
        say(
            f"{len(unread)} parts of the input {since}, as {unread[0]}: the mean grey value is "
            "that of the rest; once they can be read, --overwrite makes it that of all."
        )
    verb = "going on with" if run.resumed else "writing"
    say(
        f"{verb} {run.out.name}: {len(tiles)} tiles of {commas(tiles.core)}, {run.precision} on "
        f"{run.device}, engine {settings.engine}, {_memory(run, settings)}"
    )


def _memory(run: Segmentation, settings: Settings) -> str:
    from unet_ray.segmentation.memory import process_bytes

    whose = "per worker" if settings.engine == "ray" else "for all workers, in this process"
    return f"{format_bytes(process_bytes(run.memory, run.device, settings))} {whose}"


def _settings(ctx: click.Context, flags: dict[str, Any]) -> Settings:
    """Everything that can be checked without opening a file is checked here."""
    check_workers(flags["workers"])
    tile = None if flags["tile"] is None else parse_tile(flags["tile"])
    region = None if flags["region"] is None else Box(*parse_region(flags["region"]))
    memory = parse_bytes(flags["memory"])
    if flags["mask"] == "":
        raise InputError("mask='' names no volume; leave --mask out to do all tiles.")
    from unet_ray.segmentation.settings import Settings

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


def _engine(ctx: click.Context, asked: Any) -> Any:
    from unet_ray.engine.cluster import chosen_engine

    return chosen_engine(asked, job=ctx.obj == "job")


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
        say(f"unet-ray: {' '.join(error.format_message().split())}")
        return 2
    except UnetRayError as error:
        say(f"unet-ray: {error}")
        return error.exit_code
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        say(f"unet-ray: {place}{error.strerror or error}.")
        return 1
    except (KeyboardInterrupt, click.Abort):
        say("unet-ray: interrupted; what was committed stays, the same command goes on.")
        sys.stderr.flush()
        # Passes that still run in threads are dropped: nothing half-done counts as done.
        os._exit(130)
