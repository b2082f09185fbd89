"""The parts that verbs share on the command line: groups of flags, common flags, hints.

Knows click and the text of flags. Does not know what a verb does.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import click
import yaml

from unet_ray.errors import InputError, nearest, reason
from unet_ray.storage.parsing import read_file
from unet_ray.units import printable
from unet_ray.versions import VERSION

Function = Callable[..., Any]


DATA, NETWORK, TRAINING, OUTPUT, MACHINE = "Data", "Network", "Training", "Output", "Machine"
OBJECTS = "Objects"
LARGEST_CONFIG = 1 << 16  # bytes of a file of flags
HELP = {"help_option_names": ["-h", "--help"]}
# Names that users of other tools try first.
OTHER_VERBS = {
    "predict": "segment",
    "infer": "segment",
    "inference": "segment",
    "fit": "train",
    "score": "evaluate",
    "eval": "evaluate",
    "check": "verify",
}
OTHER_FLAGS = {
    "--gpu": "A GPU is used where torch finds one; no flag is needed.",
    "--device": "A GPU is used where torch finds one; no flag is needed.",
    "--epochs": "Set --steps or --minutes.",
    "--output": "Did you mean --out?",
    "--lr": "Did you mean --learning-rate?",
}


class Flag(click.Option):
    """An option that the help text shows under the heading of its group."""

    def __init__(self, *args: Any, group: str = "Options", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.group = group


flag = partial(click.option, cls=Flag)


class Verb(click.Command):
    """A command whose options may take several values at once, and which reads ``--config``."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"context_settings": HELP, **kwargs})

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Turns ``--images a b`` into ``--images a --images b`` before click reads it."""
        many = {name for p in self.params if getattr(p, "multiple", False) for name in p.opts}
        short = {"-h", *(name for p in self.params for name in p.opts if len(name) == 2)}
        args = _spread(args, many, short)
        try:
            return super().parse_args(ctx, list(args))
        except click.MissingParameter:
            given, _, _ = self.make_parser(ctx).parse_args(list(args))
            given |= ctx.default_map or {}
            missing = [p for p in self.params if p.required and not _is_set(given, p)]
            if len(missing) < 2:
                raise
            names = ", ".join(_name(parameter, ctx) for parameter in missing)
            raise click.UsageError(f"Missing: {names}.", ctx) from None
        except click.NoSuchOption as error:
            if hint := OTHER_FLAGS.get(error.option_name):
                raise click.UsageError(
                    f"No such option: {error.option_name}. {hint}", ctx
                ) from None
            raise

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Writes the flags under the headings of their groups."""
        groups: dict[str, list[tuple[str, str]]] = {}
        for parameter in self.get_params(ctx):
            if record := parameter.get_help_record(ctx):
                group = getattr(parameter, "group", "Options")
                groups.setdefault(group, []).append(record)
        for name, records in groups.items():
            with formatter.section(name):
                formatter.write_dl(records)

    def synopsis(self) -> str:
        """Returns all flags on one line, as the overview of all verbs shows them."""
        pieces = [_piece(p, click.Context(self)) for p in self.params]
        return " ".join([*pieces, "[--help]"])


def _spread(args: Sequence[str], many: set[str], short: set[str]) -> list[str]:
    spread: list[str] = []
    option = None
    for arg in args:
        if arg.startswith("--") or arg in short:
            option = arg if arg in many else None
            spread.append(arg)
        elif option and spread[-1] != option:
            spread += [option, arg]
        else:
            spread.append(arg)
    return spread


def _is_set(given: dict[str, Any], parameter: click.Parameter) -> bool:
    """Whether a parameter has a value; click marks a missing one with an object of its own."""
    value = given.get(parameter.name or "")
    return isinstance(value, str | int | float | list | tuple) and value != ()


def _name(parameter: click.Parameter, ctx: click.Context) -> str:
    return (
        parameter.make_metavar(ctx) if isinstance(parameter, click.Argument) else parameter.opts[0]
    )


def _piece(parameter: click.Parameter, ctx: click.Context) -> str:
    if isinstance(parameter, click.Argument):
        return parameter.make_metavar(ctx)
    option = parameter.opts[0]
    has_no_value = isinstance(parameter, click.Option) and parameter.is_flag
    text = option if has_no_value else f"{option} {parameter.make_metavar(ctx)}"
    return text if parameter.required else f"[{text}]"


class Overview(click.Group):
    """The list of verbs, each with all its flags and an example."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **{"context_settings": HELP, **kwargs})

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
        """Suggests the nearest verb for an unknown one."""
        if args and not args[0].startswith("-") and args[0] not in self.commands:
            other = OTHER_VERBS.get(args[0])
            hint = f" (did you mean {other!r}?)" if other else nearest(args[0], self.commands)
            raise InputError(
                f"{args[0]!r} is not a verb{hint}; choose from {', '.join(self.commands)}."
            )
        return super().resolve_command(ctx, args)


def options(*options: Function) -> Function:
    """Returns a decorator that adds several flags, in the order of the help text."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


class _PlainLoader(yaml.SafeLoader):
    """Reads YAML without aliases, which can turn a few lines into any amount of data."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """Returns the next node of the document."""
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError("an alias such as *name is not a setting")
        return super().compose_node(parent, index)


def read_config(ctx: click.Context, option: click.Parameter, value: str | None) -> None:
    """Reads flags from a YAML file; the command line overrides them."""
    if value is None:
        return
    try:
        settings = yaml.load(read_file(Path(value), LARGEST_CONFIG), _PlainLoader) or {}
    except Exception as error:  # a parser of arbitrary bytes may fail in any way
        raise InputError(f"{value}: cannot be read as YAML ({reason(error)}).") from error
    if not isinstance(settings, dict):
        raise InputError(f"{value}: must be a list of flags, as in `base-channels: 32`.")
    flags = {p.opts[0].removeprefix("--"): p for p in ctx.command.params if p is not option}
    defaults = {}
    for key, setting in settings.items():
        parameter = flags.get(str(key).replace("_", "-"))
        if parameter is None or parameter.name is None:
            raise InputError(f"{value}: {key!r} is not a flag of train{nearest(str(key), flags)}.")
        items = setting if isinstance(setting, list) else [setting]
        if any(isinstance(item, list | dict) for item in items):
            raise InputError(f"{value}: {key!r} takes values, not lists of lists or of names.")
        # As text, so that a value is checked as it would be on the command line.
        values = [str(item) for item in items]
        many = getattr(parameter, "multiple", False)
        if not many and isinstance(setting, list):
            raise InputError(
                f"{value}: {key!r} takes one value, not {setting}; see {parameter.opts[0]}."
            )
        defaults[parameter.name] = values if many else values[0]
    ctx.default_map = {**(ctx.default_map or {}), **defaults}


ENGINE = flag(
    "--engine",
    group=MACHINE,
    type=click.Choice(["auto", "ray", "local"]),
    default="auto",
    show_default=True,
    help="Run on Ray or in this process. auto: Ray in jobs/, with RAY_ADDRESS set or with several "
    "GPUs; else local.",
)
PRECISION = flag(
    "--precision",
    group=MACHINE,
    type=click.Choice(["auto", "float32", "bfloat16"]),
    default="auto",
    show_default=True,
    help="Number format of the network. auto: bfloat16 if the hardware computes in it.",
)
TAKEOVER = flag(
    "--takeover",
    group=OUTPUT,
    is_flag=True,
    help="End another run that is writing to the same output.",
)
STRICT = flag(
    "--strict",
    group=DATA,
    is_flag=True,
    help="Refuse inputs that are read only in part, such as the first image of several.",
)
QUIET = flag("--quiet", "-q", group=MACHINE, is_flag=True, help="Show no progress.")
WRITING = (
    flag(
        "--overwrite",
        group=OUTPUT,
        is_flag=True,
        help="Delete an existing unet-ray store first. Omit to resume.",
    ),
    TAKEOVER,
)
MODEL = flag(
    "--model",
    group=DATA,
    required=True,
    metavar="RUN|FILE",
    help="RUN folder of `train`, or a model file.",
)
TILING = (
    flag(
        "--outputs",
        group=OUTPUT,
        metavar="A,B",
        help="Outputs to store: probabilities, classes, instances. Default: the first two.",
    ),
    flag(
        "--no-pyramid",
        group=OUTPUT,
        is_flag=True,
        help="Store no coarser levels, which viewers need for large volumes.",
    ),
    flag(
        "--threshold",
        group=OBJECTS,
        type=float,
        metavar="T",
        help="Probability above which a voxel is foreground, for 2 classes. [that of the model]",
    ),
    flag(
        "--connect",
        group=OBJECTS,
        type=click.Choice(["volume", "slice"]),
        default="volume",
        show_default=True,
        help="Objects extend over the volume, or each slice is an image of its own.",
    ),
    flag(
        "--connectivity",
        group=OBJECTS,
        type=click.Choice(["6", "18", "26"]),
        default="6",
        show_default=True,
        help="Neighbours of a voxel: over faces, also over edges, also over corners.",
    ),
    flag(
        "--split",
        group=OBJECTS,
        is_flag=True,
        help="Separate touching objects by a watershed.",
    ),
    flag(
        "--min-size",
        group=OBJECTS,
        type=int,
        default=0,
        metavar="N",
        help="Remove objects of fewer than N voxels.",
    ),
    flag(
        "--fill-holes",
        group=OBJECTS,
        is_flag=True,
        help="Add enclosed background to the objects around it.",
    ),
    flag(
        "--exclude-border",
        group=OBJECTS,
        is_flag=True,
        help="Remove objects that touch the border of the volume.",
    ),
    flag(
        "--ids",
        group=OBJECTS,
        type=click.Choice(["dense", "first-voxel"]),
        default="dense",
        show_default=True,
        help="1, 2, 3, … in the order of first voxels, or 1 + the index of the first voxel, which "
        "needs less memory.",
    ),
    flag(
        "--region",
        group=DATA,
        metavar="z0:z1,y0:y1,x0:x1",
        help="Segment this part only, in voxels; rounded outwards to whole tiles.",
    ),
    flag(
        "--mask",
        group=DATA,
        metavar="PATH",
        help="Segment only tiles in which this volume is not zero; it may be coarser.",
    ),
    flag("--level", group=DATA, type=int, default=0, help="Resolution level of an OME-Zarr input."),
    flag("--channel", group=DATA, type=int, help="Channel of the input, from 0."),
    flag("--time", group=DATA, type=int, help="Time point of the input, from 0."),
    flag(
        "--nan",
        group=DATA,
        type=click.Choice(["error", "zero"]),
        default="error",
        show_default=True,
        help="For voxels that are not finite: quarantine their tiles, or read them as 0.",
    ),
    STRICT,
    flag(
        "--tta",
        group=NETWORK,
        is_flag=True,
        help="Average over 8 symmetries, in 3-D 16 or 48; takes that many times as long.",
    ),
    flag(
        "--tile",
        group=MACHINE,
        metavar="Z,Y,X",
        help="Voxels of a tile, rounded up to the step of the network. Default: from --memory.",
    ),
    flag(
        "--memory",
        group=MACHINE,
        metavar="SIZE",
        default="4GiB",
        show_default=True,
        help="Memory limit of one predicting worker.",
    ),
    flag(
        "--workers",
        group=MACHINE,
        type=int,
        metavar="N",
        help="Tiles at the same time. Default: one per core or GPU.",
    ),
    ENGINE,
    PRECISION,
)


def check_workers(workers: int | None) -> None:
    """Refuses a number of workers below 1.

    Raises:
        InputError: naming the number.
    """
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers} must be at least 1.")


def say(text: str) -> None:
    """Prints a line to standard error, with control characters as escapes."""
    click.echo(printable(text), err=True)


def show(text: object) -> None:
    """Prints a result to standard output, with control characters as escapes."""
    click.echo(printable(str(text)))
