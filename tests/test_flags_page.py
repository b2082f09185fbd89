"""docs/reference/flags.md names every verb and flag of the command line, with its default."""

import dataclasses
import re
from pathlib import Path

import click
import pytest

from unet_ray.cli import app
from unet_ray.training.recipes import Recipe

PAGE = Path(__file__).parent.parent / "docs/reference/flags.md"
NO_DEFAULT = "–"  # noqa: RUF001, a dash as the page prints it
ROW = re.compile(r"^\| `([^`]+)` \|[^|]*\| ([^|]+) \| (.+) \|$", re.MULTILINE)


def verbs_on_the_page():
    """The rows of each table, (flag, default, sentence), by verb."""
    _, *parts = re.split(r"^## ", PAGE.read_text(), flags=re.MULTILINE)
    return {part.split("\n", 1)[0]: ROW.findall(part) for part in parts}


def written(value):
    """A setting of a recipe as the page prints it."""
    if value is None:
        return NO_DEFAULT
    if isinstance(value, tuple):
        return str(value[0])
    return f"{value:g}" if isinstance(value, float) else str(value)


def of_recipe(name, field):
    """The default of a field of `Recipe` on the command line."""
    if field == "momentum" and name == "default":
        return NO_DEFAULT  # AdamW has none, and the flag is refused
    return written(getattr(Recipe.of(name).fitted(None), field))


def default_of(verb, parameter):
    """What the page should print as the default of a parameter."""
    if parameter.required:
        return "required"
    if getattr(parameter, "is_flag", False):
        return "off"
    settings = {field.name for field in dataclasses.fields(Recipe)} - {"recipe"}
    if verb == "train" and parameter.name in settings:
        default, paper = (of_recipe(name, parameter.name) for name in ("default", "paper"))
        return default if default == paper else f"{default}; paper: {paper}"
    default = parameter.default  # click marks a missing one with None or an object of its own
    return str(default) if isinstance(default, str | int | float) else NO_DEFAULT


def name_of(parameter):
    """The flag, or the name of an argument; a vertical bar would end the cell of a table."""
    if isinstance(parameter, click.Argument):
        return parameter.metavar.replace("|", " or ")
    return parameter.opts[0]


def test_the_page_has_every_verb():
    assert list(verbs_on_the_page()) == list(app.commands)


@pytest.mark.parametrize("verb", app.commands)
def test_the_page_has_every_flag_with_its_default(verb):
    expected = [(name_of(p), default_of(verb, p)) for p in app.commands[verb].params]
    assert [(flag, default) for flag, default, _ in verbs_on_the_page()[verb]] == expected


def test_every_flag_is_explained_in_one_sentence():
    for verb, rows in verbs_on_the_page().items():
        for flag, _, sentence in rows:
            assert sentence[0].isupper() and sentence.endswith("."), (verb, flag)
            assert not re.search(r"\. [A-Z]", sentence), (verb, flag)
            assert len(sentence.split()) <= 35, (verb, flag)
