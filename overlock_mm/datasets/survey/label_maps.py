"""Label maps: their values, and which belongs to which image."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from PIL import Image as PillowImage

from ...errors import UserError
from .classes import Classes, find_classes
from .images import (
    Findings,
    Image,
    Problem,
    check_images,
    in_parallel,
    list_images,
    listed,
    look_at_image,
    median_size,
)

_MOST_VALUES = 256
_LOSSY = ('.jpg', '.jpeg', '.webp')


@dataclass
class LabelMap:
    """What is known of one label map; ``error`` says why it cannot be used."""

    path: Path
    size: tuple[int, int] = (0, 0)
    pixels: dict = field(default_factory=dict)  # value or colour -> number of pixels
    palette: dict = field(default_factory=dict)  # value -> colour
    error: str = ''


@dataclass
class Pair:
    """An image and its label map, both found by the same name and a suffix each."""

    name: str
    image: Path
    label_map: Path
    suffixes: tuple[str, str]


@dataclass
class ImageSet:
    """One half of a data set: its folders and what is in them.

    Attributes:
        images, masks: the folders.
        pairs: the usable pairs.
        looks: what is known of their images.
        classes_of: the indices of the classes in each.
    """

    images: Path
    masks: Path
    pairs: list[Pair] = field(default_factory=list)
    looks: list[Image] = field(default_factory=list)
    classes_of: list[set] = field(default_factory=list)


@dataclass
class Segmentation:
    """A data set of label maps, as a config describes it.

    Attributes:
        sets: the training set and, if one was given, the validation set.
        loading: how images are loaded, see :func:`~.images.check_images`.
        classes: what the pixels are.
        size: median width and height.
    """

    sets: list[ImageSet]
    loading: dict
    classes: Classes
    size: tuple[int, int]


def look_at_label_map(path: Path) -> LabelMap:
    """Read a whole label map.

    Args:
        path: the file.

    Returns:
        LabelMap: its values. Files that cannot be used have an ``error``.
    """
    found = LabelMap(path)
    try:
        with PillowImage.open(path) as file:
            found.size = file.size
            if file.mode == 'P':
                colors = np.reshape(file.getpalette('RGB') or [], (-1, 3))
            labels = np.array(file)
            found.error = _count(labels, found.pixels)
            if file.mode == 'P':
                used = [v for v in found.pixels if v < len(colors)]
                found.palette = {v: tuple(colors[v].tolist()) for v in used}
    except Exception as error:  # noqa: BLE001  decoders raise what they like
        found.error = f'cannot be read ({type(error).__name__}: {error})'
    return found


def _count(labels: np.ndarray, pixels: dict) -> str:
    """Count the pixels of each value or colour; return what is wrong."""
    if labels.ndim == 3 and labels.shape[2] in (3, 4):
        packed = labels[..., :3].astype(np.int64) @ (65536, 256, 1)
        values, counts = np.unique(packed, return_counts=True)
        if len(values) > _MOST_VALUES:
            return f'has {len(values)} colours, and label maps have one for each class'
        colors = [(v >> 16, v >> 8 & 255, v & 255) for v in values.tolist()]
        pixels.update(zip(colors, counts.tolist(), strict=True))
        return ''
    if labels.ndim != 2 or labels.dtype.kind not in 'bui' and labels.dtype != np.int32:
        return (
            f'has an array of shape {labels.shape} and type {labels.dtype}, not of labels'
        )
    if labels.min() < 0 or labels.max() > 255:
        value = int(labels.max() if labels.max() > 255 else labels.min())
        return f'has the value {value}, and labels are 0 to 255'
    counts = np.bincount(labels.ravel().astype(np.uint8))
    pixels.update({int(v): int(counts[v]) for v in counts.nonzero()[0]})
    return ''


def pair_files(
    images: Path,
    masks: Path,
    image_suffix: str | None,
    mask_suffix: str | None,
    found: Findings,
) -> list[Pair]:
    """Find the label map of each image: the same path and name, another suffix.

    Args:
        images: folder of the images.
        masks: folder of the label maps; it may be the same.
        image_suffix: how the names of images end; by default in any suffix of images.
        mask_suffix: how those of the label maps end, such as ``'_mask.png'``; found by
            default.
        found: facts and problems go here.

    Returns:
        The pairs, sorted.

    Raises:
        UserError: if there is none.
    """
    if images.resolve() == masks.resolve() and not (image_suffix and mask_suffix):
        raise UserError(
            f'images and label maps are both in {images}; say how their names end, such as '
            '--image-suffix .jpg --mask-suffix _mask.png'
        )
    image_files, others = list_images(images)
    mask_files, _ = list_images(masks)
    if image_suffix:
        image_files = [p for p in image_files if p.name.endswith(image_suffix)]
    if image_suffix and mask_suffix and mask_suffix.endswith(image_suffix):
        image_files = [p for p in image_files if not p.name.endswith(mask_suffix)]
    stems = {}
    for path in image_files:
        name = path.relative_to(images).as_posix()
        suffix = image_suffix or path.suffix
        stems.setdefault(name[: len(name) - len(suffix)], []).append((path, suffix))
    names = {path.relative_to(masks).as_posix(): path for path in mask_files}
    suffixes = [mask_suffix] if mask_suffix else _mask_suffixes(stems, names)
    pairs, missing, double, odd = [], [], [], []
    for stem, files in sorted(stems.items()):
        own = [s for s in suffixes if stem + s in names]
        own = [s for s in own if names[stem + s] not in [path for path, _ in files]]
        if not own:
            missing.append(files[0][0])
        elif len(files) > 1 or len(own) > 1:
            double.append([path for path, _ in files] + [names[stem + s] for s in own])
        elif stem != stem.strip() or not stem.isprintable():
            odd.append(files[0][0])
        else:
            path, suffix = files[0]
            pairs.append(Pair(stem, path, names[stem + own[0]], (suffix, own[0])))
    if not pairs and not double and not odd:
        raise UserError(
            f'no label map in {masks} has the name of an image in {images}: there are '
            f'{listed(sorted(names), 2)} and {listed(sorted(stems), 2)}. Rename the files, '
            'or say how names end: --image-suffix _image.png --mask-suffix _label.png'
        )
    _report_pairs(images, pairs, missing, double, others, found)
    if odd:
        found.problems.append(
            Problem(
                f'names that begin or end with a space, or hold a line end: {len(odd)}, '
                f'the first: {str(odd[0])!r}',
                'Rename these files',
                'leave them out',
            )
        )
    taken = {pair.label_map for pair in pairs} | {path for own in double for path in own}
    extra = [p for p in mask_files if p not in taken and p not in image_files]
    if extra:
        found.warnings.append(
            f'label maps without an image: {len(extra)}, the first: {extra[0]}'
        )
    return pairs


def _mask_suffixes(stems: dict, names: dict) -> list[str]:
    """How the names of label maps go on behind the names of their images."""
    exact = {suffix for name in names for stem, suffix in [_cut(name)] if stem in stems}
    if exact:
        return sorted(exact)
    endings = Counter()
    for name in names:
        for i in range(len(name), 0, -1):
            if name[:i] in stems:
                endings[name[i:]] += 1
                break
    first = endings.most_common(2)
    if len(first) == 2 and first[0][1] == first[1][1]:
        raise UserError(
            f'label maps could be those that end in {first[0][0]} or in {first[1][0]}; say '
            f'which: --mask-suffix {first[0][0]}'
        )
    return [suffix for suffix, _ in first[:1]]


def _cut(name: str) -> tuple[str, str]:
    suffix = Path(name).suffix
    return name[: len(name) - len(suffix)], suffix


def _report_pairs(images, pairs, missing, double, others, found: Findings) -> None:
    endings = Counter(pair.suffixes for pair in pairs)
    text = ', '.join(f'{n} of *{a} with *{b}' for (a, b), n in endings.most_common())
    found.facts.append(('images', f'{len(pairs)} with label maps in {images}: {text}'))
    if others:
        text = ', '.join(f'{n} of {suffix}' for suffix, n in others.most_common(4))
        found.warnings.append(f'{images} also has files that are no images: {text}')
    if missing:
        found.problems.append(
            Problem(
                f'images without a label map: {len(missing)}, the first: {missing[0]}',
                'Add the label maps',
                'leave them out',
            )
        )
    if double:
        found.problems.append(
            Problem(
                f'names that stand for several files: {len(double)}, the first: '
                f'{listed(double[0])}',
                'Remove all but one image and one label map of each, or set --image-suffix '
                'and --mask-suffix',
            )
        )
    folded = Counter(pair.name.lower() for pair in pairs)
    same = [pair.image for pair in pairs if folded[pair.name.lower()] > 1]
    if same:
        found.warnings.append(
            f'names differ only in upper and lower case, as {listed(same, 2)} do: some '
            'file systems take them for one'
        )


def survey_segmentation(
    folders: Sequence[tuple[Path, Path]],
    *,
    classes: Sequence[tuple[str, object]] | None = None,
    ignore: Sequence[int] = (255,),
    image_suffix: str | None = None,
    mask_suffix: str | None = None,
    fix: bool = False,
) -> tuple[Segmentation, Findings]:
    """Look at all images and label maps.

    Args:
        folders: folders of images and of label maps: those for training and, if there are
            any, those for validation.
        classes: name and value of each class; the value is None, an int or a colour.
        ignore: values of pixels that have no class.
        image_suffix: see :func:`pair_files`.
        mask_suffix: likewise.
        fix: leave out what cannot be used, and pixels of other values than the classes'.

    Returns:
        The data set, and what was found. The data set can be used if no problem is left.

    Raises:
        UserError: if there are no images with label maps.
    """
    found = Findings()
    sets, maps = [], []
    for images, masks in folders:
        own = ImageSet(images, masks)
        own.pairs = pair_files(images, masks, image_suffix, mask_suffix, found)
        own.looks = in_parallel(look_at_image, [p.image for p in own.pairs], 'images')
        maps.append(
            in_parallel(look_at_label_map, [p.label_map for p in own.pairs], 'label maps')
        )
        sets.append(own)
    flat, looks = [m for part in maps for m in part], [i for own in sets for i in own.looks]
    bad = _check_files(flat, found)
    sizes = [m.size if m.size != (0, 0) else None for m in flat]
    loading = check_images(looks, sizes, found)
    bad |= loading.pop('bad')
    good = [m for i, m in enumerate(flat) if i not in bad]
    found_classes = find_classes(good, classes, ignore, fix, found)
    index = {value: i for i, value in enumerate(found_classes.values)}
    start = 0
    for own, part in zip(sets, maps, strict=True):
        kept = [i for i in range(len(part)) if start + i not in bad]
        own.classes_of = [{index[v] for v in part[i].pixels if v in index} for i in kept]
        own.pairs, own.looks = [own.pairs[i] for i in kept], [own.looks[i] for i in kept]
        start += len(part)
        if not kept and fix:
            text = f'no image in {own.images} is left'
            found.problems.append(Problem(text, 'Replace the files named above'))
    looks = [image for own in sets for image in own.looks]
    size = median_size([i.shown_size for i in looks]) if looks else (0, 0)
    return Segmentation(sets, loading, found_classes, size), found


def _check_files(maps: list[LabelMap], found: Findings) -> set[int]:
    bad = {i for i, label_map in enumerate(maps) if label_map.error}
    if bad:
        first = maps[min(bad)]
        found.problems.append(
            Problem(
                f'label maps that cannot be used: {len(bad)}, the first: {first.path} '
                f'{first.error}',
                'Replace them: one channel that holds the index of the class at each pixel',
                'leave them and their images out' if len(bad) < len(maps) else '',
            )
        )
    lossy = [m.path for m in maps if m.path.suffix.lower() in _LOSSY]
    if lossy:
        found.problems.append(
            Problem(
                'label maps that are compressed with losses, so that edges are wrong: '
                f'{len(lossy)}, the first: {lossy[0]}',
                'Export the labels again, as PNG',
            )
        )
    return bad
