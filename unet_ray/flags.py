"""What the verbs share on the command line: option types, common flags, parsers.

Knows click and the text of flags. Does not know what a verb does.
"""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import click
import yaml

from unet_ray.errors import InputError, nearest
from unet_ray.versions import VERSION

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


def options(*options: Function) -> Function:
    """A decorator that adds several flags, in the order of the help text."""

    def decorate(function: Function) -> Function:
        for option in reversed(options):
            function = option(function)
        return function

    return decorate


def read_config(ctx: click.Context, parameter: click.Parameter, value: str | None) -> None:
    """Takes flags from a YAML file; the command line wins over it."""
    if value is None:
        return
    try:
        settings = yaml.safe_load(Path(value).read_text()) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(
            f"{value}: cannot be read as YAML ({str(error).splitlines()[0]})."
        ) from error
    if not isinstance(settings, dict):
        raise InputError(f"{value}: must be a list of flags, as in `base-channels: 32`.")
    flags = {p.opts[0].removeprefix("--"): p for p in ctx.command.params if p is not parameter}
    defaults = {}
    for key, setting in settings.items():
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
TAKEOVER = click.option(
    "--takeover", is_flag=True, help="End another run that is writing to the same output."
)
WRITING = (
    click.option(
        "--overwrite",
        is_flag=True,
        help="Delete the store first, if it is ours. After a kill, leave it out to go on.",
    ),
    TAKEOVER,
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


def check_workers(workers: int | None) -> None:
    """Refuses a number of workers below 1."""
    if workers is not None and workers < 1:
        raise InputError(f"workers={workers} must be at least 1.")


def say(text: str) -> None:
    """Prints a line to standard error."""
    click.echo(text, err=True)
