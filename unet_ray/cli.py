"""The command line: verbs and flags, and which exit code a failure becomes. Nothing else.

What a verb does is in the rooms below; torch and Ray are imported only when a verb needs them.
"""

from __future__ import annotations

import json
import math
import os
import sys
import tempfile
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from unet_ray.errors import (
    InputError,
    QuarantinedError,
    UnetRayError,
    reason,
    refuse_below_file,
    refuse_empty,
)
from unet_ray.flags import (
    DATA,
    ENGINE,
    HELP,
    MACHINE,
    MODEL,
    NETWORK,
    OUTPUT,
    PRECISION,
    QUIET,
    STRICT,
    TAKEOVER,
    TILING,
    TRAINING,
    WRITING,
    Overview,
    Verb,
    check_workers,
    flag,
    options,
    read_config,
    say,
    show,
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
    parse_voxel_size,
    parse_workers,
)
from unet_ray.versions import VERSION

if TYPE_CHECKING:
    from unet_ray.segmentation.run import Segmentation
    from unet_ray.segmentation.settings import Settings


@click.group(cls=Overview, context_settings={**HELP, "max_content_width": 100})
@click.version_option(VERSION, message="unet-ray %(version)s")
def app() -> None:
    """The command line of unet-ray."""


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray demo --out demo",
    short_help="Make a synthetic volume, train, segment a larger one on Ray, score and draw.",
)
@flag("--out", default="demo", metavar="DIR", show_default=True, help="Folder of the results.")
def demo(out: str) -> None:
    """Shows the whole system on synthetic volumes. Takes about 6 minutes on two cores."""
    refuse_empty(out)
    from unet_ray import demo as demonstration

    demonstration.run(Path(out), say)


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray train --images raw.tif --labels membranes.tif --out runs/first "
    "--minutes 10",
    short_help="Train a U-Net on labelled volumes.",
)
@options(
    flag(
        "--config",
        metavar="FILE.yaml",
        group=DATA,
        callback=read_config,
        is_eager=True,
        expose_value=False,
        help="Flags as YAML, such as `base-channels: 32`. The command line overrides them.",
    ),
    flag(
        "--images",
        group=DATA,
        required=True,
        multiple=True,
        metavar="PATH...",
        help="Volumes to learn from.",
    ),
    flag(
        "--labels",
        group=DATA,
        required=True,
        multiple=True,
        metavar="PATH...",
        help="Labels of each volume, in the same order and shape. Each distinct value is a class.",
    ),
    flag(
        "--labels-are",
        group=DATA,
        type=click.Choice(["classes", "instances"]),
        help="instances: each value numbers one cell, and 0 is background. The network learns cell "
        "and background, with background between touching cells. [classes]",
    ),
    flag(
        "--ignore-label",
        group=DATA,
        type=int,
        metavar="N",
        help="Label value that marks unannotated voxels; they are ignored.",
    ),
    flag("--val", group=DATA, metavar="A:B,...", help="Hold out slices A to B - 1 and score them."),
    flag(
        "--val-fraction",
        group=DATA,
        type=float,
        metavar="F",
        help="Or hold out this fraction, taken from the last slices.",
    ),
    STRICT,
    flag(
        "--out",
        group=OUTPUT,
        required=True,
        metavar="RUN",
        help="Folder of the run. The same command resumes an interrupted run.",
    ),
    TAKEOVER,
    flag(
        "--recipe",
        group=NETWORK,
        type=click.Choice(["default", "paper"]),
        default="default",
        show_default=True,
        help="paper: SGD with momentum 0.99, dropout, no norm, patches of 572, as published.",
    ),
    flag(
        "--dims",
        group=NETWORK,
        type=click.IntRange(2, 3),
        help="2: segments slice by slice. 3: a network in 3-D. [2]",
    ),
    flag(
        "--anisotropy",
        group=NETWORK,
        type=click.Choice(["auto", "none"]),
        help="In 3-D: leave out z where voxels are much longer along it, or never. [auto]",
    ),
    flag(
        "--voxel-size",
        group=NETWORK,
        metavar="Z,Y,X",
        help="Size of a voxel in micrometres. [of the images]",
    ),
    flag("--depth", group=NETWORK, type=int, help="Number of pooling steps. [4; in 3-D 3]"),
    flag(
        "--base-channels",
        group=NETWORK,
        type=int,
        help="Channels at full resolution. [64 on a GPU, 16 on a CPU; paper: 64]",
    ),
    flag(
        "--norm",
        group=NETWORK,
        type=click.Choice(["none", "weight", "batch"]),
        help="None, weight standardisation, or batch norm with fixed statistics. "
        "[weight; paper: none]",
    ),
    flag(
        "--dropout",
        group=NETWORK,
        type=float,
        metavar="P",
        help="Dropout rate of the two deepest levels. [0; paper: 0.5]",
    ),
    flag("--steps", group=TRAINING, type=int, metavar="N", help="Stop after N steps."),
    flag(
        "--minutes",
        group=TRAINING,
        type=float,
        metavar="M",
        help="Stop after M minutes of training. [15, unless --steps is set]",
    ),
    flag(
        "--patience",
        group=TRAINING,
        type=int,
        metavar="N",
        help="Stop after N validations without improvement (10 validations per run).",
    ),
    flag(
        "--best-by",
        group=TRAINING,
        metavar="SCORE",
        help="Score that selects the best model. [v_info; instances: seg; else iou]",
    ),
    flag(
        "--patch",
        group=TRAINING,
        metavar="N|Z,Y,X",
        help="Size of a patch in voxels, as the network reads it. [by the images; 2-D: up to 572]",
    ),
    flag(
        "--batch",
        group=TRAINING,
        type=int,
        metavar="N",
        help="Patches per step on each worker. [1]",
    ),
    flag(
        "--learning-rate",
        group=TRAINING,
        type=float,
        metavar="R",
        help="Initial learning rate. [0.001]",
    ),
    flag(
        "--momentum",
        group=TRAINING,
        type=float,
        metavar="R",
        help="Momentum of SGD; for --recipe paper only. [0.99]",
    ),
    flag(
        "--w0",
        group=TRAINING,
        type=float,
        help="Weight of borders between cells (eq. 2 of the paper). [10]",
    ),
    flag("--sigma", group=TRAINING, type=float, help="Width of these borders in voxels. [5]"),
    flag(
        "--elastic",
        group=TRAINING,
        type=float,
        metavar="VOXELS",
        help="Standard deviation of the elastic deformation. [20]",
    ),
    flag(
        "--orientation",
        group=TRAINING,
        type=click.Choice(["auto", "any", "upright", "fixed"]),
        help="any: rotate and flip patches. upright: tilt, flip left to right. fixed: tilt. auto: "
        "any, unless labels are displaced from the images. [auto; paper: any]",
    ),
    flag(
        "--from",
        "start",
        group=TRAINING,
        metavar="RUN|FILE",
        help="Start from the weights of this model, with a learning rate of 0.0003.",
    ),
    flag("--seed", group=TRAINING, type=int, metavar="N", help="Random seed. [0]"),
    flag(
        "--workers",
        group=MACHINE,
        metavar="N|MIN:MAX",
        help="Processes that train together. MIN:MAX: as many as the cluster has. [1; one per GPU]",
    ),
    flag(
        "--memory",
        group=MACHINE,
        metavar="SIZE",
        help="Images and labels that need more are read by windows. [half of the free memory]",
    ),
    ENGINE,
    PRECISION,
    QUIET,
)
@click.pass_context
def train(ctx: click.Context, /, **flags: Any) -> None:
    """Trains a U-Net with the paper's weighted loss on labelled volumes.

    The same command resumes an interrupted training.
    """
    patch, size = parse_patch(flags.pop("patch")), parse_voxel_size(flags.pop("voxel_size"))
    from unet_ray.training.recipes import Recipe
    from unet_ray.training.run_folder import time_of_model
    from unet_ray.training.train import train

    images, labels, out, engine, workers, recipe, takeover, strict, quiet, memory = (
        flags.pop(name)
        for name in (
            *("images", "labels", "out", "engine", "workers", "recipe", "takeover", "strict"),
            *("quiet", "memory"),
        )
    )
    settings = Recipe.of(recipe, patch=patch, voxel_size=size, **flags)
    together = parse_workers(workers)
    before = time_of_model(out)
    with TrainingBar("train", quiet) as watch:
        model = train(
            list(images),
            list(labels),
            out,
            settings,
            _engine(ctx, engine),
            together,
            watch,
            takeover=takeover,
            announce=watch.show_table,
            any_classes=flags["labels_are"] == "classes",
            strict=strict,
            memory=None if memory is None else parse_bytes(memory),
        )
    finished = before is not None and time_of_model(out) == before
    if finished:
        say(f"{out}: training is finished; nothing to do.")
    if not finished or not (Path(out) / "report.html").exists():
        from unet_ray.report.page import write_report

        say(f"report: {write_report(Path(out))}")
    show(model)


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray plan volume.zarr --model runs/first --memory 8GiB",
    short_help="State tiles, memory, disk and time of a segmentation; nothing is written.",
)
@click.argument("input", metavar="INPUT")
@options(
    MODEL,
    *TILING,
    flag(
        "--out",
        group=OUTPUT,
        metavar="OUT.zarr",
        help="Planned output; also reports the free space there.",
    ),
    flag(
        "--overwrite",
        group=OUTPUT,
        is_flag=True,
        help="Plan as if an existing store were deleted.",
    ),
    flag(
        "--takeover",
        group=OUTPUT,
        is_flag=True,
        help="Has no effect; accepted, so that the flags of segment can be reused.",
    ),
    flag(
        "--price-per-hour",
        group=OUTPUT,
        type=click.FloatRange(min=0),
        help="Hourly price of one worker; adds a cost estimate.",
    ),
    flag("--json", "as_json", group=OUTPUT, is_flag=True, help="Print JSON."),
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
    """Plans a segmentation: tiles, cost of the halo, memory, disk and time.

    Time and disk are estimated from a few tiles, which takes about 15 seconds. Nothing is written.
    """
    if price_per_hour is not None and not math.isfinite(price_per_hour):
        raise InputError(f"price-per-hour={price_per_hour} must be a number, 0 or more.")
    if out == "":
        raise InputError("out='' names no store; omit --out, or name one.")
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
        free_or_none = None if math.isinf(free) else int(free)
        figures = {**outlook.to_json(), **trial_json(outlook, trial, price_per_hour)}
        facts = {**figures, "disk_free_bytes": free_or_none, "refusal": refusal}
        show(json.dumps(facts, indent=2, allow_nan=False))
    else:
        folder = f"at {out}" if out else "in this folder"
        free_space = "" if math.isinf(free) else f"; {format_bytes(free)} free {folder}"
        estimates = describe_trial(outlook, trial, price_per_hour, free_space)
        refused = [f"  refused by segment: {refusal}"] if refusal else []
        show("\n".join([describe(outlook, settings), estimates, *refused]))


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray segment volume.tif --model runs/first --out volume.zarr",
    short_help="Segment volumes with a trained model.",
)
@click.argument("inputs", nargs=-1, required=True, metavar="INPUT...")
@options(
    MODEL,
    *TILING,
    flag(
        "--out",
        group=OUTPUT,
        required=True,
        metavar="OUT.zarr",
        help="Output store. With several inputs: a folder, which gets one store for each.",
    ),
    *WRITING,
    QUIET,
)
@click.pass_context
def segment(
    ctx: click.Context,
    /,
    inputs: tuple[str, ...],
    model: str,
    out: str,
    quiet: bool,
    **flags: Any,
) -> None:
    """Segments volumes, tile by tile, into OME-Zarr 0.5 stores.

    The same command resumes an interrupted run; a finished one does nothing.
    """
    settings = _settings(ctx, flags)
    from unet_ray.segmentation.execution import execute, is_finished
    from unet_ray.segmentation.preparation import wanted_tiles
    from unet_ray.segmentation.segment import prepare_all

    quarantined = None
    for run in prepare_all(inputs, model, out, settings):
        request = wanted_tiles(run, settings)
        if not is_finished(run, request):
            _announce(run, settings)
        try:
            with TilesBar(Path(run.volume.path).name, quiet) as watch:
                tiles = execute(run, settings, watch)
            if not tiles:
                overlap = request.tiles.any()
                why = "is finished" if overlap else "region and mask have no tile in common"
                say(f"{run.out.name}: {why}; nothing to do.")
        except QuarantinedError as error:  # reported at once, since other inputs follow
            say(f"unet-ray: {error}")
            quarantined = error
        show(run.out)
    if quarantined:
        ctx.exit(quarantined.exit_code)


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray evaluate volume.zarr truth.tif --as isbi --json scores.json",
    short_help="Score a prediction against the truth.",
)
@click.argument("prediction", metavar="PREDICTION")
@click.argument("truth", metavar="TRUTH")
@flag(
    "--as",
    "kind",
    type=click.Choice(["isbi", "instances", "classes"]),
    required=True,
    help="isbi: membranes, from the probability of cell. instances: labelled objects. "
    "classes: class maps.",
)
@flag(
    "--per-slice",
    is_flag=True,
    help="Score each slice as an image of its own; ids need not match between slices.",
)
@flag("--json", "file", metavar="FILE", help="Also write the scores as JSON; - for stdout.")
@QUIET
def evaluate(
    prediction: str, truth: str, kind: Any, per_slice: bool, file: str | None, quiet: bool
) -> None:
    """Scores a prediction against the truth: TIFF, a folder of slices, Zarr or a unet-ray store.

    From a unet-ray store the matching output is chosen automatically. docs/reference/scores.md
    explains every score.
    """
    if file not in (None, "-"):
        _refuse_json(Path(file), (prediction, truth))
    from unet_ray.scores.evaluation import evaluate as score

    with ProgressBar("evaluate", quiet) as bar:
        evaluation = score(
            prediction,
            truth,
            kind,
            per_slice,
            lambda done, total: bar.show(done / total, f"{done}/{total}"),
        )
    if evaluation.note:
        say(evaluation.note)
    text = json.dumps(evaluation.to_json(), indent=2, allow_nan=False)
    show(text if file == "-" else evaluation.table())
    if file not in (None, "-"):
        write_whole(Path(file), f"{text}\n".encode())


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray verify volume.zarr --tiles 10",
    short_help="Check every checksum of a store, and recompute some tiles.",
)
@click.argument("out", metavar="[OUT.zarr]", required=False)
@flag(
    "--tiles",
    type=int,
    default=3,
    show_default=True,
    metavar="N",
    help="Number of random tiles to recompute and compare; this needs input and model.",
)
@flag("--repair", is_flag=True, help="Recompute damaged and missing shards.")
@flag(
    "--seams",
    metavar="LABELS.zarr",
    help="Compare the ends of objects at tile planes with those inside tiles, in labels of any "
    "tool. OUT.zarr may then be left out.",
)
@flag("--every", metavar="Z,Y,X", help="Tile size of the labels of --seams, in voxels.")
@click.pass_context
def verify(
    ctx: click.Context,
    /,
    out: str | None,
    tiles: int,
    repair: bool,
    seams: str | None,
    every: str | None,
) -> None:
    """Names every damaged or missing shard of the finished tiles; exit code 1 if there is one.

    Checksums find corrupted bytes; swapped shards are found only by recomputing tiles (--tiles).
    With --seams, the exit code is also 1 if objects are cut at tile planes.
    """
    if (seams is None) != (every is None):
        given, missing = ("--seams", "--every") if every is None else ("--every", "--seams")
        raise InputError(
            f"{given} needs {missing} as well, as in --seams labels.zarr --every 64,512,512."
        )
    if out is None and (repair or ctx.get_parameter_source("tiles") is not ParameterSource.DEFAULT):
        raise InputError(f"{'--repair' if repair else '--tiles'} needs a store: name OUT.zarr.")
    if out is None and seams is None:
        raise click.MissingParameter(
            "Or judge labels of any tool, with --seams LABELS.zarr --every Z,Y,X.",
            ctx,
            param_hint="'OUT.zarr'",
            param_type="argument",
        )
    codes = [0]
    if seams is not None and every is not None:
        codes.append(_verify_seams(seams, parse_tile(every, "every")))
    if out is not None:
        codes.append(_verify_store(out, tiles, repair))
    ctx.exit(max(codes, key=[0, 2, 1].index))


def _verify_store(out: str, tiles: int, repair: bool) -> int:
    """Prints the damage of a store; returns the exit code."""
    from unet_ray.segmentation.verification import verify as check

    verification = check(out, tiles, repair)
    lines = [*verification.notes, *verification.damage, f"{out}: {verification.summary()}"]
    show("\n".join(lines))
    if verification.refusal:
        say(f"unet-ray: {verification.refusal}")
    return 1 if verification.damage else 2 if verification.refusal else 0


def _verify_seams(labels: str, every: tuple[int, int, int]) -> int:
    """Prints how often objects end at tile planes; returns the exit code."""
    from unet_ray.scores.seams import stored_seams

    seams = stored_seams(labels, every)
    show("\n".join([*seams.lines(), f"{labels}: {seams.sentence()}."]))
    return 0 if seams.sound else 1


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray report volume.zarr --truth truth.tif",
    short_help="Write a page with pictures of a training or a segmentation.",
)
@click.argument("path", metavar="RUN|OUT.zarr")
@flag("--truth", metavar="PATH", help="Class labels of the volume; adds scores and borders.")
def report(path: str, truth: str | None) -> None:
    """Writes one HTML page with curves, pictures, scores and the provenance.

    For a run the page is written into RUN; for a store, next to it: OUT.report.html.
    """
    from unet_ray.report.page import write_report

    show(write_report(path, truth))


@app.command(
    cls=Verb,
    epilog="\b\nExample: unet-ray export volume.zarr classes.ome.tif --what classes",
    short_help="Copy an output of a store into one TIFF or CSV file.",
)
@click.argument("out", metavar="OUT.zarr")
@click.argument("file", metavar="FILE.tif|FILE.csv")
@flag(
    "--what",
    type=click.Choice(["probabilities", "classes", "instances", "objects"]),
    help="Output to export. Default: objects for CSV; for TIFF, probabilities if they are stored, "
    "else instances or classes.",
)
@flag(
    "--float",
    "as_float",
    is_flag=True,
    help="Write probabilities as 32-bit floats from 0 to 1, not as bytes from 0 to 255.",
)
@flag("--overwrite", is_flag=True, help="Replace an existing FILE.")
@QUIET
@click.pass_context
def export(
    ctx: click.Context,
    /,
    out: str,
    file: str,
    what: str | None,
    as_float: bool,
    overwrite: bool,
    quiet: bool,
) -> None:
    """Copies one output of a finished store into OME-TIFF, or the table of objects into CSV.

    Only a part of the output is in memory at a time. FILE appears when it is complete.
    """
    from unet_ray.report.export import export as copy

    try:
        with ProgressBar("export", quiet) as bar:
            path = copy(
                out,
                file,
                what,
                as_float=as_float,
                overwrite=overwrite,
                watch=lambda done, total: bar.show(done / total, f"{done}/{total}"),
            )
    except KeyboardInterrupt:
        say(f"unet-ray: Interrupted. {file} is not written; run the same command to try again.")
        ctx.exit(130)
    show(path)


def _refuse_json(file: Path, inputs: Sequence[str]) -> None:
    """Refuses a path for scores that cannot be a file, or that is in a scored folder."""
    refuse_below_file(file)
    if file.is_dir():
        raise InputError(f"json={str(file)!r} is a folder; name a file in it, as in scores.json.")
    for path in inputs:
        if file.resolve().is_relative_to(Path(path).resolve()):
            raise InputError(f"json={str(file)!r} would be written into {path}, which is scored.")


def _announce(run: Segmentation, settings: Settings) -> None:
    tiles = run.plan
    if settings.tile and settings.tile != tiles.core:
        say(
            f"tile {commas(settings.tile)} does not fit the network and the volume; "
            f"{commas(tiles.core)} is used."
        )
    if unread := run.intensity.unread:
        since = "could not be read when the run began" if run.resumed else "cannot be read"
        say(
            f"{len(unread)} parts of the input {since}, such as {unread[0]}. The mean grey value "
            "leaves them out; to include them later, use --overwrite."
        )
    verb = "resuming" if run.resumed else "writing"
    say(
        f"{verb} {run.out.name}: {len(tiles)} tiles of {commas(tiles.core)}, {run.precision} on "
        f"{run.device}, engine {settings.engine}, {_memory(run, settings)}"
    )
    if run.threshold is not None:
        source = "of the model" if settings.threshold is None else "of --threshold"
        say(f"A voxel is of class 1 above a probability of {run.threshold:.3f} {source}.")


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
        pyramid=False if flags["no_pyramid"] else None,
        threshold=flags["threshold"],
        connect=flags["connect"],
        connectivity=int(flags["connectivity"]),  # type: ignore[arg-type]
        split=flags["split"],
        min_size=flags["min_size"],
        fill_holes=flags["fill_holes"],
        exclude_border=flags["exclude_border"],
        ids=flags["ids"],
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
        strict=flags["strict"],
    )


def _engine(ctx: click.Context, name: Any) -> Any:
    from unet_ray.engine.cluster import chosen_engine

    return chosen_engine(name, job=ctx.obj == "job")


def _unexpected(error: Exception) -> str:
    """Stores the trace of an error that no one expected; returns the message that names the file.

    The file is in the folder for temporary files, since the output may be the cause of the error.
    """
    message = f"an unexpected error ended the command ({type(error).__name__}: {reason(error)})"
    try:
        number, name = tempfile.mkstemp(prefix="unet-ray-error-", suffix=".txt")
        with open(number, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.writelines(traceback.format_exception(error))
    except OSError as full:
        return f"{message}; its trace cannot be stored either ({reason(full)})."
    return f"{message}; please report it with its trace, which is in {name}."


def main(verb: str | None = None) -> int:
    """Runs the command line; returns the exit code.

    Args:
        verb: run only this verb, as a job of Ray does.
    """
    keep_freed_memory()
    command: click.Command = app.commands[verb] if verb else app
    name = f"python jobs/{verb}.py" if verb else "unet-ray"
    try:
        # The code of `ctx.exit`; verbs return nothing.
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
        say("unet-ray: Interrupted. Progress is saved; run the same command to resume.")
        sys.stderr.flush()
        # Threads may still compute; an unfinished tile never counts as finished.
        os._exit(130)
    except Exception as error:  # a fault of unet-ray itself
        say(f"unet-ray: {_unexpected(error)}")
        return 1
