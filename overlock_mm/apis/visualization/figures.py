"""Shared by the figures: style, sizes, colour maps and saving.

A figure is made with matplotlib's object interface, which opens no window.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ...errors import UserError
from ..files import check_output

SUFFIXES = ('.png', '.svg', '.pdf')
# Widths in inches of a column and of the text in a paper of two columns.
COLUMN, TEXT = 3.3, 6.9
_TALLEST = 9.0  # of a page
# Colour maps: of amounts, of what differs to both sides of a middle. Both are readable in
# grey or with colour vision deficiency.
AMOUNTS, DIFFERENCES = 'magma', 'RdBu_r'
_STYLE = {
    'font.size': 7,
    'axes.titlesize': 7,
    'axes.labelsize': 7,
    'xtick.labelsize': 6,
    'ytick.labelsize': 6,
    'legend.fontsize': 6,
    'figure.titlesize': 8,
    'axes.linewidth': 0.5,
    'lines.linewidth': 1,
    'xtick.major.width': 0.5,
    'ytick.major.width': 0.5,
    'pdf.fonttype': 42,  # fonts that publishers accept and that can be edited
    'svg.fonttype': 'none',
    'svg.hashsalt': 'overlock_mm',  # else names in the file are random
}
# What would make two files of the same figure differ.
_DATES = {'.svg': {'Date': None}, '.pdf': {'CreationDate': None}}


def styled():
    """The style of the figures, as a context or, called so, as a decorator."""
    return matplotlib.rc_context(_STYLE)


def check_picture(path: str) -> Path:
    """Check that a picture can be written, before what it shows is computed.

    Args:
        path: path of the picture, ending in one of ``SUFFIXES``.

    Returns:
        The path, with ``~`` expanded. A file that exists will be replaced.

    Raises:
        UserError: if it ends in something else or its folder cannot be written to.
    """
    return check_output(Path(path).expanduser(), SUFFIXES, force=True)


def panels(
    rows: int, columns: int, width: float = TEXT, aspect: float = 1.0, extra: float = 0.0
) -> tuple[Figure, np.ndarray]:
    """A figure with a grid of equal axes.

    Args:
        rows: rows of the grid.
        columns: columns of the grid.
        width: width of the figure in inches.
        aspect: height of an axes over its width, in about.
        extra: height in inches for titles and legends.

    Returns:
        The figure, and its axes as an array ``(rows, columns)``.
    """
    height = min(width / columns * aspect * rows + extra, _TALLEST)
    figure = Figure(figsize=(width, height), layout='constrained')
    return figure, figure.subplots(rows, columns, squeeze=False)


def without_ticks(axes: Axes, frame: bool = True) -> Axes:
    """Remove ticks, and with ``frame=False`` the frame, too."""
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(frame)
    return axes


def save(figure: Figure, path: Path) -> Path:
    """Write a picture in the format of its suffix.

    The same figure gives the same file. Its resolution is matplotlib's ``savefig.dpi`` if
    that is set, else 200 dots per inch.

    Args:
        figure: the figure.
        path: what :func:`check_picture` returned.

    Returns:
        The path.

    Raises:
        UserError: if it cannot be written.
    """
    given = matplotlib.rcParams['savefig.dpi']
    dpi = 200 if given == 'figure' else given
    try:
        with styled():
            figure.savefig(path, dpi=dpi, metadata=_DATES.get(path.suffix))
    except OSError as error:
        raise UserError(
            f'{path} cannot be written ({error}); choose another --out'
        ) from error
    return path


def write_json(content, path: str | None) -> None:
    """Write what a figure shows as JSON, if there is a path.

    Raises:
        UserError: if it cannot be written.
    """
    if path is None:
        return
    try:
        Path(path).write_text(json.dumps(content, indent=1) + '\n')
    except OSError as error:
        raise UserError(f'{path} cannot be written ({error}); choose another') from error


def table(header: Sequence[str], rows: Sequence[Sequence]) -> str:
    """Text in columns: the first one to the left, others to the right."""
    cells = [[str(cell) for cell in row] for row in (header, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return '\n'.join(
        '  '.join(
            cell.rjust(width) if i else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in cells
    )
