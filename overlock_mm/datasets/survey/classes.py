"""The classes of a data set of label maps, from the values of the pixels."""

import colorsys
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ...errors import UserError
from .images import Findings, Problem, listed

_LINE = re.compile(r'(.+?)(?:[,:\t]\s*(\d+)(?:[,\s]+(\d+)[,\s]+(\d+))?[,:\s]*)?')
_HOW = '--classes FILE, with lines such as road,7 or road,128,64,128'


@dataclass
class Classes:
    """The classes of a data set.

    Attributes:
        names: one for each class.
        values: what the pixels of each hold, an int or a colour (red, green, blue).
        palette: a colour for each.
    """

    names: list[str] = field(default_factory=list)
    values: list = field(default_factory=list)
    palette: list[tuple[int, int, int]] = field(default_factory=list)


class _Tally:
    """The pixels and files of each value over all label maps."""

    def __init__(self, maps: Iterable):
        self.pixels, self.files, self.first = Counter(), Counter(), {}
        for label_map in maps:
            self.pixels.update(label_map.pixels)
            self.files.update(label_map.pixels.keys())
            for value in label_map.pixels:
                self.first.setdefault(value, label_map.path)

    def where(self, value) -> str:
        return f'{value} is in {self.first[value]}'


def find_classes(
    maps: Sequence,
    given: Sequence[tuple[str, object]] | None,
    ignore: Sequence[int],
    fix: bool,
    found: Findings,
) -> Classes:
    """The classes of label maps.

    Args:
        maps (Sequence[LabelMap]): what is known of each label map.
        given: name and value of each class, see :func:`read_classes`.
        ignore: values of pixels that have no class.
        fix: whether what can be fixed is.
        found: facts and problems go here.
    """
    tally = _Tally(maps)
    if not tally.pixels:  # reported elsewhere
        return Classes()
    colors = [value for value in tally.pixels if isinstance(value, tuple)]
    if colors and len(colors) < len(tally.pixels):
        index = next(value for value in tally.pixels if value not in colors)
        found.problems.append(
            Problem(
                f'some label maps hold colours ({tally.where(colors[0])}), others one '
                f'value for each pixel ({tally.where(index)})',
                'Convert all to one of both',
            )
        )
        return Classes()
    names = [name for name, _ in given or ()]
    values = [value for _, value in given or ()]
    if given and None not in values:
        _check_values(values, values, tally, ignore, found)
    elif given and colors:
        found.problems.append(
            Problem(
                f'label maps hold {len(colors)} colours ({tally.where(colors[0])}), and '
                'the classes have none',
                f'Give {_HOW}',
            )
        )
        return Classes()
    elif given:
        # the first numbers that are not ignored
        numbers = (v for v in range(256) if v not in ignore)
        values = [v for v, _ in zip(numbers, names, strict=False)]
        in_order = sorted(v for v in tally.pixels if v not in ignore)
        if len(in_order) != len(names):
            in_order = values
        _check_values(values, in_order, tally, ignore, found)
        values = in_order if fix else values
    else:
        values = _found_values(tally, ignore, found)
        names = [_name(value) for value in values]
    if len(names) > 255:
        text = f'there are {len(names)} classes'
        found.problems.append(Problem(text, 'Label maps can tell 255 apart'))
    classes = Classes(names, values, _palette(values, maps))
    _describe(classes, tally, found)
    return classes


def _check_values(values, fixed, tally: _Tally, ignore, found: Findings) -> None:
    """All values must be of a class, or ignored; ``fixed`` are those that --fix takes."""
    extra = [v for v in tally.pixels if v not in values and v not in ignore]
    if extra:
        are = 'label values' if len(extra) > 1 else 'label value'
        classes = f'the {len(values)} classes have {listed(values)}'
        in_order = f'take {listed(fixed)} for the classes, in this order'
        found.problems.append(
            Problem(
                f'{are} {listed(sorted(extra))} of no class ({tally.where(extra[0])}; '
                f'{classes})',
                f'Add classes, give their values by {_HOW}, or name values in --ignore',
                'ignore these pixels' if fixed is values else in_order,
            )
        )


def _found_values(tally: _Tally, ignore, found: Findings) -> list:
    """The values that are classes where none were given."""
    values = sorted(v for v in tally.pixels if v not in ignore)
    if values == list(range(len(values))) and len(values) > 1:
        return values
    if len(values) < 2:  # such as 0, and 255 for an object
        values = sorted(tally.pixels)
    if len(values) < 2:
        found.problems.append(
            Problem(f'all pixels have the label {listed(values)}', f'Give {_HOW}')
        )
        return values
    kind = 'colours' if isinstance(values[0], tuple) else 'values'
    found.problems.append(
        Problem(
            f'the label {kind} {listed(values)} are not 0 to {len(values) - 1}, the '
            f'indices of classes ({tally.where(values[-1])})',
            f'Give {_HOW}',
            f'make each of the {len(values)} {kind} a class',
        )
    )
    return values


def _name(value) -> str:
    if isinstance(value, tuple):
        return 'color_' + bytes(value).hex()
    return f'class_{value}'


def _describe(classes: Classes, tally: _Tally, found: Findings) -> None:
    total = sum(tally.pixels.values()) or 1
    found.facts.append(('label values', listed(sorted(tally.pixels), 24)))
    found.facts.append(('classes', str(len(classes.names))))
    for name, value in zip(classes.names, classes.values, strict=True):
        share = 100 * tally.pixels[value] / total
        text = f'{name} ({value}): {share:.2f}% of the pixels, {tally.files[value]} images'
        found.facts.append(('', text))
    ignored = {v: n for v, n in tally.pixels.items() if v not in classes.values}
    if ignored:
        share = 100 * sum(ignored.values()) / total
        found.facts.append(('', f'ignored ({listed(sorted(ignored))}): {share:.2f}%'))
    pairs = list(zip(classes.names, classes.values, strict=True))
    unused = [name for name, value in pairs if not tally.pixels[value]]
    if unused:
        found.warnings.append(f'no pixel is of {listed(unused)}')
    for name, value in pairs:
        if tally.pixels[value] > 0.99 * total:
            found.warnings.append(f'{name} covers more than 99% of all pixels')


def _palette(values, maps) -> list[tuple[int, int, int]]:
    """A colour for each class: that of its label, of the files' palette, or a new one."""
    known = {value: value for value in values if isinstance(value, tuple)}
    for label_map in maps:
        known |= label_map.palette
    palette = [known.get(value) for value in values]
    usable = None not in palette and len(set(palette)) == len(palette)
    return palette if usable else make_palette(len(values))


def make_palette(count: int) -> list[tuple[int, int, int]]:
    """Colours (red, green, blue) that differ, the first of them grey."""
    colors = [(96, 96, 96)]
    for i in range(count - 1):
        # steps of the golden ratio spread hues evenly, however many there are
        hue = i * 0.618034 % 1
        color = colorsys.hsv_to_rgb(hue, (0.9, 0.6)[i % 2], (1.0, 0.75)[i // 2 % 2])
        colors.append(tuple(round(255 * part) for part in color))
    return colors[:count]


def read_classes(text: str) -> list[tuple[str, object]]:
    """Names of classes, and their values if they have any.

    Args:
        text: names with commas between them, or the path of a file with one name a line,
            which may go on with a value (``road,7``) or a colour (``road,128,64,128``).

    Returns:
        For each class its name, and None, an int or a tuple of three.

    Raises:
        UserError: if a name is missing or stands twice.
    """
    path = Path(text).expanduser()
    if path.is_file():
        lines = path.read_text(encoding='utf-8-sig').splitlines()
        lines = [line for line in lines if line.strip() and not line.startswith('#')]
        classes = []
        for line in lines:
            name, *numbers = _LINE.fullmatch(line.strip()).groups()
            numbers = tuple(int(n) for n in numbers if n is not None)
            value = {0: None, 1: numbers[0] if numbers else None}.get(len(numbers), numbers)
            classes.append((name.strip(), value))
    elif ',' not in text and (Path(text).suffix or '/' in text):
        raise UserError(
            f'--classes {text} does not exist; give a file with one name a line, or names '
            'with commas between them'
        )
    else:
        classes = [(name.strip(), None) for name in text.split(',')]
    names = Counter(name for name, _ in classes)
    bad = [name for name, n in names.items() if n > 1 or not name]
    if bad or not classes:
        raise UserError(
            f'--classes {text}: {"a name is empty" if "" in names else "stands twice"}'
            f'{"" if "" in names else ": " + listed(bad)}; give each class one name'
        )
    values = {type(value) for _, value in classes}
    if len(values) > 1:
        raise UserError(
            f'--classes {text}: some classes have a value and others none, or a colour; '
            'write the same for all'
        )
    return classes
