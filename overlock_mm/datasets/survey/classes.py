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
_MOST_UNNAMED = 100
_HOW = '--classes FILE, with lines such as road,7 or road,128,64,128'


@dataclass
class Classes:
    """The classes of a data set.

    Attributes:
        names: one for each class.
        values: what the pixels of each hold, an int or a colour (red, green, blue).
        palette: a colour for each.
        are_indices: whether pixels hold the index of their class, or 255 to be ignored.
    """

    names: list[str] = field(default_factory=list)
    values: list = field(default_factory=list)
    palette: list[tuple[int, int, int]] = field(default_factory=list)
    are_indices: bool = True


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
    if len(names) == 1:
        text = f'{names[0]} is the only class'
        found.problems.append(Problem(text, 'Name what surrounds it, too: background,name'))
        return Classes()
    if given and None not in values:
        both = [value for value in values if value in ignore and value != 255]
        if both:
            text = f'{listed(both)} is the value of a class, and is to be ignored'
            found.problems.append(Problem(text, 'Change --classes or --ignore'))
        _check_values(values, tally, ignore, found)
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
        if len(in_order) < len(names):  # such as 0, and 255 for an object
            in_order = sorted(tally.pixels)
        if len(in_order) == len(names) and in_order != values:
            _order_values(values, in_order, tally, found)
            values = in_order if fix else values
        else:
            _check_values(values, tally, ignore, found)
    else:
        values = _found_values(tally, ignore, found)
        names = [_name(value) for value in values]
    if len(names) > 255:
        text = f'there are {len(names)} classes'
        found.problems.append(Problem(text, 'Label maps can tell 255 apart'))
    classes = Classes(names, values, _palette(values, maps, found))
    others = {value for value in tally.pixels if value not in values}
    classes.are_indices = values == list(range(len(names))) and others <= {255}
    _describe(classes, tally, found)
    return classes


def _check_values(values, tally: _Tally, ignore, found: Findings) -> None:
    """All values must be of a class, or ignored."""
    extra = [v for v in tally.pixels if v not in values and v not in ignore]
    if extra:
        are = 'label values' if len(extra) > 1 else 'label value'
        used = [v for v in tally.pixels if v in values]
        found.problems.append(
            Problem(
                f'{are} {listed(sorted(extra))} of no class ({tally.where(extra[0])}; the '
                f'{len(values)} classes have {listed(values)})',
                f'Add classes, give their values by {_HOW}, or name values in --ignore',
                'ignore these pixels' if len(used) > 1 else '',
            )
        )


def _order_values(values, in_order, tally: _Tally, found: Findings) -> None:
    """As many values as classes, and not those that the classes should have."""
    extra = [value for value in in_order if value not in values]
    found.problems.append(
        Problem(
            f'the label values {listed(in_order)} are not those of the {len(values)} '
            f'classes, {listed(values)} ({tally.where((extra or in_order)[0])})',
            f'Give {_HOW}',
            f'take {listed(in_order)} for the classes, in this order',
        )
    )


def _found_values(tally: _Tally, ignore, found: Findings) -> list:
    """The values that are classes where none were given."""
    values = sorted(v for v in tally.pixels if v not in ignore)
    if values == list(range(len(values))) and 1 < len(values) <= _MOST_UNNAMED:
        return values
    if len(values) < 2:  # such as 0, and 255 for an object
        values = sorted(tally.pixels)
    if len(values) < 2:
        found.problems.append(
            Problem(f'all pixels have the label {listed(values)}', f'Give {_HOW}')
        )
        return values
    if len(values) > _MOST_UNNAMED:
        found.problems.append(
            Problem(
                f'label maps hold {len(values)} values, as photos do '
                f'({tally.where(values[-1])})',
                f'Give the folder of the label maps, or name all classes: {_HOW}',
            )
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


def _palette(values, maps, found: Findings) -> list[tuple[int, int, int]]:
    """A colour for each class: that of its label, of the files' palette, or a new one."""
    known = {value: value for value in values if isinstance(value, tuple)}
    for label_map in maps:
        other = [
            v for v, color in label_map.palette.items() if known.get(v, color) != color
        ]
        if other:
            found.problems.append(
                Problem(
                    f'palettes give one value several colours: {other[0]} is '
                    f'{label_map.palette[other[0]]} in {label_map.path}, and '
                    f'{known[other[0]]} in another file',
                    'Check that the values mean the same in all files',
                    'take the values for the classes, whatever their colours',
                )
            )
            return make_palette(len(values))
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
        try:
            lines = path.read_text(encoding='utf-8-sig').splitlines()
        except UnicodeDecodeError as error:
            raise UserError(f'--classes {text} is not in UTF-8 ({error})') from error
        lines = [line.strip() for line in lines]
        classes = [_class_of(line, text) for line in lines if line and line[0] != '#']
    elif ',' not in text and (Path(text).suffix or '/' in text):
        raise UserError(
            f'--classes {text} does not exist; give a file with one name a line, or names '
            'with commas between them'
        )
    else:
        classes = [(name.strip(), None) for name in text.split(',')]
    names = Counter(name for name, _ in classes)
    if '' in names or not classes:
        raise UserError(f'--classes {text}: a name is empty, or there are none')
    kinds = {type(value) for _, value in classes}
    if len(kinds) > 1:
        raise UserError(
            f'--classes {text}: some classes have a value and others none, or a colour; '
            'write the same for all'
        )
    values = Counter(value for _, value in classes if value is not None)
    twice = [item for item, n in (*names.items(), *values.items()) if n > 1]
    if twice:
        raise UserError(f'--classes {text}: {listed(twice)} stands twice')
    return classes


def _class_of(line: str, text: str) -> tuple[str, object]:
    """Name and value of a line."""
    name, *numbers = _LINE.fullmatch(line).groups()
    numbers = tuple(int(number) for number in numbers if number is not None)
    if (
        re.search(r'[,\t]', name)
        or re.match(r'\d+[ :]', line)
        or max(numbers, default=0) > 255
    ):
        raise UserError(
            f'--classes {text}: {line!r} is none of NAME, NAME,VALUE and '
            'NAME,RED,GREEN,BLUE, with values of 0 to 255'
        )
    if len(numbers) > 1:
        return name.strip(), numbers
    return name.strip(), numbers[0] if numbers else None
