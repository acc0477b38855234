"""From a command line to options; what is wrong with it is said in words, all of it at once. tyro shows the help."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_type_hints

import tyro

from rcl_fast.train.arguments import ranges, spellings
from rcl_fast.train.arguments.ranges import flag, hints, shown
from rcl_fast.train.errors import refuse_each

Options = TypeVar("Options")


def parse(
    kind: type[Options],
    arguments: Sequence[str] | None,
    *,
    prog: str,
    description: str,
    elsewhere: Mapping[str, str] | None = None,
) -> Options:
    """Returns the options of a command line.

    Args:
        arguments: None: this process's.
        elsewhere: where to give options that this command does not have, by their names.

    Raises:
        UserError: a line for each mistake.
        SystemExit: --help was asked for, and is printed.
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    if asks_for_help(arguments):
        show_help(kind, prog=prog, description=description)
    values, wrong = read(kind, arguments, prog, elsewhere)
    wrong += [
        f"{prog} needs {_called(name, hint)}, which must {ranges.phrase(hint)}" for name, hint in _left(kind, values)
    ]
    refuse_each(wrong)
    return made(kind, values)


def asks_for_help(arguments: Sequence[str]) -> bool:
    return not {"-h", "--help"}.isdisjoint(arguments)


def show_help(kind: type[Options], *, prog: str, description: str, default: Options | None = None) -> None:
    """Prints the help, with the defaults where the dataclass doesn't have them all. Raises SystemExit."""
    defaults: dict[str, Any] = {} if default is None else {"default": default}
    show = (tyro.conf.OmitArgPrefixes,)
    tyro.cli(kind, args=["--help"], prog=prog, description=description, config=show, **defaults)


class Given(NamedTuple):
    """An option of a command line with its values."""

    word: str  # as it stands there: --batch-size, --no_compile
    values: list[str]

    def name(self, known: Mapping[str, Any]) -> str:
        """Returns the option's name: batch_size, compile."""
        name = self.word.removeprefix("--").replace("-", "_")
        positive = name.removeprefix("no_")
        return positive if name not in known and known.get(positive) is bool else name


def split(arguments: Sequence[str], known: Mapping[str, Any]) -> tuple[list[Given], list[str]]:
    """Returns the options of a command line, in its order, and the values that stand without one.

    Where a command has an argument without an option, the values that an option has no use for are this argument's.
    """
    options: list[Given] = []
    alone: list[str] = []
    for argument in arguments:
        if not _is_value(argument):
            word, equals, value = argument.partition("=")
            options.append(Given(word, [value] if equals else []))
        elif options and not (_positional(known) and _is_full(options[-1], known)):
            options[-1].values.append(argument)
        else:
            alone.append(argument)
    return options, alone


def names(kind: type, arguments: Sequence[str]) -> list[str]:
    """Returns the names of a command line's options, in its order."""
    known = hints(kind)
    return [option.name(known) for option in split(arguments, known)[0]]


def value_of(name: str, arguments: Sequence[str]) -> str | None:
    """Returns the value of an option on a command line; None where it is not there."""
    found = [option.values[0] for option in split(arguments, {})[0] if option.values and option.word == flag(name)]
    return found[-1] if found and found[-1] != "None" else None


def read(
    kind: type, arguments: Sequence[str], prog: str, elsewhere: Mapping[str, str] | None = None
) -> tuple[dict[str, Any], list[str]]:
    """Returns the values of a command line's options by their names, and a sentence for each mistake in it."""
    known, positional = hints(kind), _positional(hints(kind))
    options, alone = split(arguments, known)
    if positional and not alone:
        alone = _taken_for_a_value(options, known, ranges.choices(known[positional]))
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for option in options:
        name = option.name(known)
        if name in known and name != positional and option.word.startswith("--"):
            value, mistake = _read(option, name, known[name])
            joins = ranges.count(known[name]) is None and values.get(name) and value
            values[name] = values[name] + value if joins else value  # --rows A --rows B; of one value, the last counts
            wrong += [f"{option.word} {mistake}"] if mistake else []
        else:
            wrong.append(_unknown(option, known, prog, elsewhere or {}))
    if positional and alone:
        values[positional], mistake = _read(Given("", [alone.pop(0)]), positional, known[positional])
        wrong += [f"{positional.upper()} {mistake}"] if mistake else []
    wrong += [_standing_alone(value, known) for value in alone]
    return values, wrong


def _taken_for_a_value(options: list[Given], known: Mapping[str, Any], choices: Sequence[str]) -> list[str]:
    """Takes the argument without an option back from one that takes any number of values: --only BCL CE table1."""
    for option in options:
        many = ranges.count(known.get(option.name(known), str)) is None
        if many and option.values and option.values[-1] in choices:
            return [option.values.pop()]
    return []


def check(kind: type, arguments: Sequence[str], prog: str) -> None:
    """Raises UserError with a line for each mistake in a command line, on which nothing is required."""
    _, wrong = read(kind, arguments, prog)
    refuse_each(wrong)


def made(kind: Callable[..., Options], values: Mapping[str, Any], default: Any = None) -> Options:
    """Returns the options of these values; where there is none, of the default, else of the dataclass's own."""
    fields: dict[str, Any] = {}
    for name, hint in get_type_hints(kind).items():
        before, is_section = getattr(default, name, None), dataclasses.is_dataclass(hint)
        if is_section:
            fields[name] = made(hint, values, before)
        elif name in values:
            fields[name] = values[name]
        elif default is not None:
            fields[name] = before
    return kind(**fields)


def _left(kind: Any, values: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Gives the name and the annotation of each option that has no default, nor a value."""
    for name, hint in get_type_hints(kind, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            yield from _left(hint, values)
        elif name not in values and not hasattr(kind, name):  # defaults are attributes
            yield name, hint


_DASHES = "-\u2010\u2011\u2012\u2013\u2014\u2015\u2212"  # and those that typesetting makes of it


def _is_value(argument: str) -> bool:
    """Returns whether an argument is no option: it begins with no dash, or is a number, or "--lr 0.1" in one."""
    if argument[:1] not in {*_DASHES} or argument == "-" or " " in argument.partition("=")[0]:
        return True
    try:
        float(argument)
    except ValueError:
        return False
    return True


def _is_positional(hint: Any) -> bool:
    return tyro.conf.Positional in ranges.unwrapped(hint)[1]


def _positional(known: Mapping[str, Any]) -> str | None:
    return next((name for name, hint in known.items() if _is_positional(hint)), None)


def _called(name: str, hint: Any) -> str:
    return name.upper() if _is_positional(hint) else flag(name)


def _is_full(option: Given, known: Mapping[str, Any]) -> bool:
    """Returns whether an option has all values that it takes; one that is unknown takes one."""
    hint = known.get(option.name(known), str)
    return len(option.values) == (0 if hint is bool else ranges.count(hint))


def _read(option: Given, name: str, hint: Any) -> tuple[Any, str | None]:
    """Returns the value of a known option, and what is wrong with it, to follow its name, or None."""
    kind, optional = ranges.single(hint)
    values, wanted = option.values, ranges.count(hint)
    if kind is bool:
        is_on = option.word.removeprefix("--").replace("-", "_") == name
        return is_on, f"takes no value: it is {flag(name)} or {flag(f'no_{name}')}" if values else None
    if optional and values == ["None"]:
        return None, None
    if wanted is None and not values:
        return None, "takes values, got none"
    if wanted not in (None, len(values)):
        return None, f"takes {'one value' if wanted == 1 else f'{wanted} values'}, got {shown(tuple(values))}"
    try:
        found = tuple(_converted(kind, value) for value in values)
    except ValueError:
        return None, f"must {ranges.phrase(hint)}, got {shown(tuple(values))}{_meant(values, hint)}"
    value = found[0] if wanted == 1 else found
    wrong = ranges.broken(hint, value)
    return value, f"{wrong}, got {shown(tuple(values))}{_meant(values, hint)}" if wrong else None


def _converted(kind: Any, value: str) -> Any:
    if kind is Path and not value:
        raise ValueError("it would be the current folder")
    return kind(value) if kind in (int, float, Path) else value


def _meant(values: Sequence[str], hint: Any) -> str:
    meant = [word for value in values if (word := spellings.value(value, ranges.choices(hint)))]
    return f": did you mean {meant[0]}?" if meant else ""


def _unknown(option: Given, known: Mapping[str, Any], prog: str, elsewhere: Mapping[str, str]) -> str:
    """Returns a sentence for an option that the command doesn't have, with what was meant where that can be told."""
    word, name = option.word, option.word.lstrip(_DASHES).replace("-", "_")
    if {*_DASHES[1:]} & {*word[:2]}:
        return (
            f"{word} begins with another dash than -: write {'--' if name[:1].isalpha() else '-'}{word.lstrip(_DASHES)}"
        )
    if not word.startswith("--"):
        meant = spellings.option(name.rstrip("0123456789"), known)  # of -b8, too
        return f"{word} is no option: options have two dashes" + (f", {flag(meant)}" if meant else "")
    if word == "--help":
        return f"{word} is no option here: {prog} --help prints it"
    if meant := spellings.option(name, known):
        return f"{word} is no option of {prog}: it is {flag(meant)} here"
    other = spellings.option(name.removeprefix("no_"), elsewhere)
    why = elsewhere[other] if other else spellings.missing(name)
    return f"{word} is no option of {prog}" + (f": {why}" if why else _near(name, known))


def _near(name: str, known: Mapping[str, Any]) -> str:
    names = [*known, *(f"no_{other}" for other, hint in known.items() if hint is bool)]
    near = [other for other in names if name and other.startswith(name)][:3] or get_close_matches(name, names, n=1)
    return f": did you mean {' or '.join(map(flag, near))}?" if near else "; --help has all"


def _standing_alone(value: str, known: Mapping[str, Any]) -> str:
    name, _, rest = value.lstrip("-").replace(" ", "=", 1).partition("=")
    if name.replace("-", "_") in {*known, "help"}:
        near = [f"--{name} {rest}".rstrip()]
    else:
        options = {of: hint for of, hint in known.items() if not _is_positional(hint)}
        near = [f"{flag(of)} {value}" for of, hint in options.items() if value in ranges.choices(hint)]
    return f"{shown(value)!r} stands without an option" + (f": did you mean {near[0]}?" if near else "")
