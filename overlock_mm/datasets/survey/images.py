"""Images: whether they can be read, sizes, channels, and a division of them."""

import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage
from tqdm import tqdm

from ...errors import UserError

SUFFIXES = ('.jpg', '.jpeg', '.png', '.bmp', '.tif', '.tiff', '.webp', '.pgm', '.ppm')
_TIFF = ('.tif', '.tiff')
# Pixels of an image, at most, of which mean and standard deviation are computed.
_PIXELS = 2**18
# Larger values mark holes in satellite images, as what is not finite does.
LARGEST = 1e30
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = (5, 6, 7, 8)  # its values that swap width and height


@dataclass
class Problem:
    """What would break a training, or quietly spoil it.

    Attributes:
        text: what is wrong, with the name of a file and the value.
        advice: what the user can do.
        fix: what ``--fix`` does; empty if it can do nothing.
    """

    text: str
    advice: str
    fix: str = ''


@dataclass
class Findings:
    """What a look at a data set has found.

    Attributes:
        facts: lines of a table, a name and a value each.
        problems: errors.
        warnings: what may be intended.
    """

    facts: list[tuple[str, str]] = field(default_factory=list)
    problems: list[Problem] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def report(self, fix: bool) -> str:
        """The table, what was fixed, and the warnings."""
        lines = [f'{name:14}{value}' for name, value in self.facts]
        fixed = [p for p in self.problems if p.fix and fix]
        lines += [f'fixed: {p.text}: {p.fix}' for p in fixed]
        return '\n'.join(lines + [f'warning: {text}' for text in self.warnings])

    def raise_problems(self, fix: bool) -> None:
        """Raise :class:`UserError` with the problems that are left."""
        left = [p for p in self.problems if not (p.fix and fix)]
        if not left:
            return
        lines = []
        for i, problem in enumerate(left, 1):
            cure = f'; or --fix: {problem.fix}' if problem.fix else ''
            lines.append(f'\n  {i}. {problem.text}. {problem.advice}{cure}')
        count = '1 problem' if len(left) == 1 else f'{len(left)} problems'
        raise UserError(f'{count} with the data, no config was written:{"".join(lines)}')


@dataclass(frozen=True)
class Layout:
    """How the pixels of an image are stored, and so how a pipeline must load it.

    Attributes:
        channels: that the network sees.
        dtype: 'uint8', 'uint16' or another of NumPy's.
        tiff: the image needs tifffile.
        planar: its array is ``(C, H, W)``.
    """

    channels: int = 3
    dtype: str = 'uint8'
    tiff: bool = False
    planar: bool = False

    @property
    def is_common(self) -> bool:
        """Whether OpenCV loads it as the three channels that pretrained weights expect."""
        return self == Layout()

    def __str__(self) -> str:
        bits = np.dtype(self.dtype).itemsize * 8
        return f'{self.channels} channel{"s" * (self.channels > 1)} of {bits} bits'


@dataclass
class Image:
    """What is known of one image file; ``error`` says why it cannot be read."""

    path: Path
    size: tuple[int, int] = (0, 0)  # width and height as stored
    mode: str = ''
    layout: Layout = Layout()
    orientation: int = 1
    sums: np.ndarray | None = None  # per channel: pixels, sum, sum of squares
    has_holes: bool = False  # values that are not finite
    error: str = ''

    @property
    def shown_size(self) -> tuple[int, int]:
        """Width and height after turning it as its EXIF tag says."""
        return self.size[::-1] if self.orientation in _TURNED else self.size


def look_at_image(path: Path) -> Image:
    """Read a whole image file.

    Args:
        path: the file.

    Returns:
        Image: what it is. Files that cannot be read have an ``error``.
    """
    image = Image(path)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            if path.suffix.lower() in _TIFF:
                _look_at_tiff(image)
            else:
                _look_at_photo(image)
    except ModuleNotFoundError:
        raise
    except Exception as error:  # noqa: BLE001  decoders raise what they like
        image.error = f'{type(error).__name__}: {error}'
    return image


def _look_at_photo(image: Image) -> None:
    with PillowImage.open(image.path) as file:
        image.size, image.mode = file.size, file.mode
        image.orientation = file.getexif().get(_ORIENTATION, 1)
        if file.format == 'JPEG':  # read all of it, but compute little
            file.draft(file.mode, (file.width // 8, file.height // 8))
        file.load()
    content = image.path.read_bytes()
    deep = content[24:25] == b'\x10' if file.format == 'PNG' else file.format == 'PPM'
    if deep or image.mode.startswith('I'):
        import cv2  # Pillow reads 16-bit colours as 8 bits

        array = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
        if array is not None and array.dtype != np.uint8:
            channels = 1 if array.ndim == 2 else array.shape[2]
            image.layout, image.orientation = Layout(channels, str(array.dtype)), 1
            _sum(image, array.reshape(-1, channels))


def _look_at_tiff(image: Image) -> None:
    try:
        import tifffile
    except ModuleNotFoundError as error:
        raise UserError(
            f'{image.path}: tifffile is not installed; run: pip install tifffile'
        ) from error
    with tifffile.TiffFile(image.path) as file:
        series, page = file.series[0], file.pages[0]
        image.orientation = int(getattr(page.tags.get(_ORIENTATION), 'value', 1))
        axes = series.axes
        try:
            array = series.asarray()
        except ValueError as error:
            if 'imagecodecs' not in str(error):
                raise
            if page.dtype != np.uint8 or series.shape[2:] not in ((), (1,), (3,)):
                raise ValueError(f'{error}; run: pip install imagecodecs') from error
            with PillowImage.open(image.path) as photo:  # OpenCV will read it, too
                array = np.array(photo.convert('RGB'))
                axes = 'YXS'
    if array.ndim not in (2, 3):
        raise ValueError(
            f'it has axes {axes} of {array.shape}, and an image has two or three'
        )
    planar = array.ndim == 3 and axes.endswith('YX')
    array = np.moveaxis(array, 0, -1) if planar else array
    channels = 1 if array.ndim == 2 else array.shape[2]
    image.size = array.shape[1], array.shape[0]
    if array.dtype != np.uint8 or channels not in (1, 3) or planar:
        image.layout = Layout(channels, str(array.dtype), True, planar)
        image.orientation = 1  # tifffile leaves it alone
        _sum(image, array.reshape(-1, channels))


def _sum(image: Image, pixels: np.ndarray) -> None:
    """Number, sum and sum of squares of an image's pixels ``(N, C)``, as ``(3, C)``."""
    pixels = pixels[:: max(1, len(pixels) // _PIXELS)].astype(np.float64)
    finite = np.abs(pixels) < LARGEST
    image.has_holes = not finite.all()
    pixels = np.where(finite, pixels, 0)
    image.sums = np.stack([finite.sum(0), pixels.sum(0), (pixels**2).sum(0)])


def mean_and_std(images: Iterable[Image]) -> tuple[list[float], list[float]]:
    """Mean and standard deviation of each channel over all images, to four digits."""
    count, total, squares = sum(image.sums for image in images)
    count = np.maximum(count, 1)
    mean = total / count
    std = np.sqrt(np.maximum(squares / count - mean**2, 0))
    return tuple(
        [float(f'{value:.4g}') for value in values]
        for values in (mean, np.maximum(std, 1e-6))
    )


def in_parallel(function: Callable, items: Sequence, what: str) -> list:
    """The results of a function for all items, in order, with a progress bar."""
    with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
        return list(
            tqdm(pool.map(function, items), what, len(items), leave=False, unit=' files')
        )


def list_images(folder: Path) -> tuple[list[Path], Counter]:
    """The image files below a folder, and how many other files there are by suffix."""
    if not folder.is_dir():
        raise UserError(f'{folder} is not a folder; give the folder of the files')
    images, others = [], Counter()
    for path in sorted(files_below(folder)):
        try:
            str(path).encode()
        except UnicodeEncodeError as error:
            raise UserError(
                f'{os.fsencode(path)!r} is not in UTF-8; rename files with such names'
            ) from error
        if path.suffix.lower() in SUFFIXES:
            images.append(path)
        else:
            others[path.suffix or path.name] += 1
    if not images:
        there = ', '.join(f'{n} of {s}' for s, n in others.most_common(3)) or 'no files'
        raise UserError(
            f'{folder} has no images ({", ".join(SUFFIXES)}); there are {there}. Give '
            'another folder, or convert the files'
        )
    return images, others


def files_below(folder: Path) -> Iterator[Path]:
    """All files below a folder, but for hidden ones; links are followed, loops are not."""
    for root, folders, names in os.walk(folder, followlinks=True):
        here = os.path.realpath(root) + os.sep
        folders[:] = [
            name
            for name in folders
            if not name.startswith('.')
            and not here.startswith(os.path.realpath(Path(root, name)) + os.sep)
        ]
        yield from (Path(root, name) for name in names if not name.startswith('.'))


def check_images(images: list[Image], labelled_sizes: list, found: Findings) -> dict:
    """Check images against each other and against the sizes of their labels.

    Args:
        images: all images.
        labelled_sizes: (width, height) of the labels of each; None if that is not known.
        found: facts and problems go here.

    Returns:
        How to load them: ``layout``, ``mean`` and ``std`` of a layout that is not common,
        and ``ignore_orientation``. ``bad`` has the indices of images to leave out.
    """
    bad = {i for i, image in enumerate(images) if image.error}
    if bad:
        first = images[min(bad)]
        found.problems.append(
            Problem(
                f'images that cannot be read: {len(bad)} of {len(images)}, the first: '
                f'{first.path} ({first.error})',
                'Replace them',
                'leave them out',
            )
        )
    readable = [i for i in range(len(images)) if i not in bad]
    if not readable:
        return dict(layout=Layout(), ignore_orientation=False, bad=bad)
    good = [images[i] for i in readable]
    _describe_images(good, found)
    layouts = Counter(image.layout for image in good)
    layout = layouts.most_common(1)[0][0]
    if len(layouts) > 1:
        odd = next(image for image in good if image.layout != layout)
        found.problems.append(
            Problem(
                f'images that do not have {layout}, as most do: '
                f'{len(good) - layouts[layout]}, the first: {odd.path} ({odd.layout})',
                'Convert them to one layout',
            )
        )
    loading = dict(layout=layout, ignore_orientation=False, bad=bad)
    if not layout.is_common and len(layouts) == 1:
        loading['mean'], loading['std'] = mean_and_std(good)
        found.facts.append(('  mean', ' '.join(map(str, loading['mean']))))
        found.facts.append(('  std', ' '.join(map(str, loading['std']))))
    bad |= _check_sizes(images, readable, labelled_sizes, loading, found)
    return loading


def _describe_images(images: list[Image], found: Findings) -> None:
    sizes = sorted((image.shown_size for image in images), key=lambda s: s[0] * s[1])
    small, middle, large = (
        f'{w}x{h}' for w, h in (sizes[0], median_size(sizes), sizes[-1])
    )
    found.facts.append(
        ('  size', f'{small} (smallest), {middle} (median), {large} (largest)')
    )
    layouts = Counter(str(image.layout) for image in images)
    text = ', '.join(f'{n} images with {layout}' for layout, n in layouts.most_common())
    found.facts.append(('  channels', text))
    for modes, what in (
        (('L', '1', 'LA'), 'grey images, which are loaded as three equal channels'),
        (('RGBA', 'PA'), 'images with an alpha channel, which is dropped'),
        (('CMYK',), 'CMYK images, which are loaded as RGB'),
    ):
        own = [i for i in images if i.mode in modes and i.layout.is_common]
        if own:
            found.warnings.append(
                f'{what}: {len(own)} of {len(images)}, the first: {own[0].path}'
            )
    holes = [image for image in images if image.has_holes]
    if holes:
        found.warnings.append(
            f'images with values that are not finite: {len(holes)}, the first: '
            f'{holes[0].path}; these become the mean'
        )
    tiny = [image for image in images if min(image.size) < 32]
    if tiny:
        w, h = tiny[0].size
        found.warnings.append(
            f'images with a side below 32 pixels: {len(tiny)}, the first: {tiny[0].path} '
            f'({w}x{h}); they are enlarged'
        )


def _check_sizes(images, readable, labelled_sizes, loading, found: Findings) -> set[int]:
    """Labels must be of the size of their image, turned or not as its EXIF tag says."""
    wrong, stored, shown = [], [], []
    for i in readable:
        image, size = images[i], labelled_sizes[i]
        if size is None:
            continue
        if image.size != image.shown_size and size in (image.size, image.shown_size):
            (stored if size == image.size else shown).append(image)
        elif size != image.shown_size:
            wrong.append(i)
    if wrong:
        image, (w, h) = images[wrong[0]], labelled_sizes[wrong[0]]
        found.problems.append(
            Problem(
                f'images of another size than their labels: {len(wrong)}, the first: '
                f'{image.path} is {"x".join(map(str, image.shown_size))}, its labels are '
                f'{w}x{h}',
                'Replace the image or the labels',
                'leave them out',
            )
        )
    if stored:
        loading['ignore_orientation'] = True
        found.problems.append(
            Problem(
                'images that are turned by their EXIF tag when they are loaded, and whose '
                f'labels are not: {len(stored)}, the first: {stored[0].path} (orientation '
                f'{stored[0].orientation})',
                'Save them without the tag',
                # OpenCV always turns TIFF files
                'load all images as they are stored'
                if not any(image.path.suffix.lower() in _TIFF for image in stored)
                else '',
            )
        )
    if stored and shown:
        found.problems.append(
            Problem(
                f'labels of {shown[0].path} are of the image turned as its EXIF tag says, '
                f'those of {stored[0].path} are not',
                'Save the images without the tag',
            )
        )
    unclear = [
        images[i]
        for i in readable
        if images[i].orientation != 1 and images[i] not in (*stored, *shown)
    ]
    if unclear:
        found.warnings.append(
            f'images with an EXIF orientation: {len(unclear)}, the first: '
            f'{unclear[0].path} ({unclear[0].orientation}). They are turned when they are '
            'loaded: labels must be of the turned image'
        )
    return set(wrong)


def median_size(sizes: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """Median width and median height."""
    return tuple(int(np.median(side)) for side in zip(*sizes, strict=True))


def split(classes_of: Sequence[set], share: float, seed: int) -> tuple[list, list]:
    """Divide images at random into training and validation.

    Of many random divisions it is one with the most classes on both sides.

    Args:
        classes_of: the classes in each image.
        share: of the images that is for validation.
        seed: of the random numbers.

    Returns:
        Indices of the training images, and of the validation images, in order.
    """
    count = len(classes_of)
    if count < 2:
        raise UserError(f'{count} usable images cannot be divided; give 2 or more')
    generator = np.random.default_rng(seed)
    held_out, best = min(max(1, round(share * count)), count - 1), ((-1, -1), None)
    for _ in range(50):
        order = generator.permutation(count)
        parts = order[held_out:], order[:held_out]
        train, val = (set().union(*(classes_of[i] for i in part)) for part in parts)
        covered = len(train & val), len(train)
        if covered > best[0]:
            best = covered, parts
    return tuple(sorted(part.tolist()) for part in best[1])


def listed(values: Iterable, most: int = 8) -> str:
    """Values in a line, not more than ``most``."""
    values = list(values)
    return ', '.join(map(str, values[:most])) + ', ...' * (len(values) > most)
