"""COCO files: images, boxes, masks and categories."""

import copy
import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ...errors import UserError
from .images import (
    Findings,
    Image,
    Problem,
    check_images,
    in_parallel,
    listed,
    look_at_image,
    median_size,
)

_PARTS = ('images', 'annotations', 'categories')
_ID = int | float | str | None


@dataclass
class CocoSet:
    """One half of a data set.

    Attributes:
        path: the COCO file.
        folder: of its images.
        content: what is in the file, with what was fixed.
        changed: whether that is something else than the file has.
        looks: what is known of each image file.
        classes_of: the ids of the categories in each image.
    """

    path: Path
    folder: Path
    content: dict
    changed: bool
    looks: list[Image]
    classes_of: list[set]


@dataclass
class Detection:
    """A data set of boxes and, perhaps, masks, as a config describes it.

    Attributes:
        sets: the training set and, if one was given, the validation set.
        loading: how images are loaded, see :func:`~.images.check_images`.
        classes: names, in the order of the categories.
        has_masks: whether all annotations have masks.
        size: median width and height.
    """

    sets: list[CocoSet]
    loading: dict
    classes: list[str]
    has_masks: bool
    size: tuple[int, int]


def survey_detection(
    files: Sequence[tuple[Path, Path]],
    *,
    classes: Sequence[str] | None = None,
    boxes_only: bool = False,
    fix: bool = False,
) -> tuple[Detection, Findings]:
    """Look at all annotations and images.

    Args:
        files: COCO file and folder of images: that for training and, if there is one,
            that for validation.
        classes: the categories to detect; by default all.
        boxes_only: do without masks.
        fix: leave out or correct what cannot be used, in a copy.

    Returns:
        The data set, and what was found. The data set can be used if no problem is left.

    Raises:
        UserError: if a file is not a COCO file.
    """
    found, sets, looks, sizes = Findings(), [], [], []
    for path, folder in files:
        if not folder.is_dir():
            raise UserError(f'{folder} is not a folder; give the folder of the images')
        content = _read(path)
        before = copy.deepcopy(content)
        if json.detect_encoding(path.read_bytes()) != 'utf-8':
            before = None  # pycocotools reads nothing else
        _check(path, content, found)
        own = in_parallel(look_at_image, _image_files(folder, content), 'images')
        sizes += [_size(image) for image in content['images']]
        for image, entry in zip(own, content['images'], strict=True):
            if not image.path.is_file():
                image.error = 'there is no such file' + _where(folder, entry)
            elif not _size(entry):
                entry['width'], entry['height'] = image.shown_size
        looks += own
        sets.append(CocoSet(path, folder, content, content != before, own, []))
    for own in sets:
        found.facts.append(('images', f'{len(own.content["images"])} in {own.folder}'))
    if None in sizes:
        path = next(i.path for i, size in zip(looks, sizes, strict=True) if size is None)
        found.problems.append(
            Problem(
                f'images without width and height: {sizes.count(None)}, the first: '
                f'{path.name}',
                'Add them',
                'take those of the files',
            )
        )
    loading = check_images(looks, sizes, found)
    bad, start = loading.pop('bad'), 0
    for own in sets:
        left_out = {i for i in range(len(own.looks)) if start + i in bad}
        start += len(own.looks)
        if left_out:
            _leave_out(own, left_out)
        if not own.looks and fix:
            text = f'{own.path}: no image is left'
            found.problems.append(Problem(text, 'Replace the files named above'))
    names = _classes(sets, classes, found)
    has_masks = _check_masks(sets, names, boxes_only, found)
    _describe(sets, names, has_masks, found)
    size = median_size([i.shown_size for own in sets for i in own.looks] or [(0, 0)])
    return Detection(sets, loading, names, has_masks, size), found


def _read(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f'{path} does not exist; give a COCO file (.json)')
    try:
        content = json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise UserError(f'{path} is not JSON ({error}); give a COCO file') from error
    parts = content if isinstance(content, dict) else {}
    missing = [name for name in _PARTS if not isinstance(parts.get(name), list)]
    missing += [name for name in _PARTS[::2] if not missing and not content[name]]
    for name in _PARTS if not missing else ():
        odd = [item for item in content[name] if not _is_item(item)]
        if odd:
            raise UserError(
                f'{path}: {len(odd)} of the {name} are no objects with an id that is a '
                f'number or a string, the first: {str(odd[0])[:80]}; export them again'
            )
    if missing:
        raise UserError(
            f'{path} is not a COCO file for training: it has no {" or ".join(missing)}; '
            'export the annotations in the format of COCO instances'
        )
    return content


def _is_item(item) -> bool:
    ids = [item.get(key) for key in ('id', 'image_id', 'category_id')] if item else [[]]
    return isinstance(item, dict) and all(isinstance(i, _ID) for i in ids)


def _size(image: dict) -> tuple[int, int] | None:
    """Width and height that the file gives, if it does."""
    size = image.get('width'), image.get('height')
    return size if all(isinstance(n, int | float) and n > 0 for n in size) else None


def _where(folder: Path, entry: dict) -> str:
    """A hint, if the name of an image has the folder in it."""
    found = (folder.parent / str(entry.get('file_name'))).is_file()
    return f'; --images {folder.parent} has it' if found else ''


def _image_files(folder: Path, content: dict) -> list[Path]:
    return [folder / str(image.get('file_name')) for image in content['images']]


class _Checks:
    """Checks of the items of one file, each of which fixes what it finds."""

    def __init__(self, path: Path, content: dict, found: Findings):
        self.path, self.content, self.found = path, content, found

    def drop(self, part: str, is_bad: Callable, what: str, advice: str) -> None:
        """Leave items out."""
        items = self.content[part]
        bad = [item for item in items if is_bad(item)]
        if bad:
            self._report(bad, part, what, advice, 'leave them out')
            self.content[part] = [item for item in items if not is_bad(item)]

    def change(self, part: str, is_bad: Callable, change: Callable, *texts: str) -> None:
        """Change items in place."""
        bad = [item for item in self.content[part] if is_bad(item)]
        if bad:
            self._report(bad, part, *texts)
            for item in bad:
                change(item)

    def _report(self, bad, part: str, what: str, advice: str, fix: str) -> None:
        first = {k: v for k, v in bad[0].items() if k != 'segmentation'}
        text = f'{part} {what}: {len(bad)}, the first: {_shown(first)}'
        self.found.problems.append(Problem(f'{self.path}: {text}', advice, fix))


def _shown(item: dict) -> str:
    keys = ('id', 'image_id', 'category_id', 'file_name', 'name', 'bbox', 'area')
    return ', '.join(f'{key} {item[key]}' for key in keys if key in item)


def _check(path: Path, content: dict, found: Findings) -> None:
    """Check a COCO file, and fix in ``content`` what can be fixed."""
    checks = _Checks(path, content, found)
    for part in ('images', 'categories'):
        ids = Counter(item.get('id') for item in content[part])
        names = 'file_name' if part == 'images' else 'name'
        stems = Counter(item.get(names) for item in content[part])
        for key, counts in (('id', ids), (names, stems)):
            double = [value for value, n in counts.items() if n > 1 or value is None]
            if double:
                found.problems.append(
                    Problem(
                        f'{path}: values of {key!r} of {part} that are missing or stand '
                        f'twice: {len(double)}, the first: {double[0]!r}',
                        f'Give each its own {key}',
                    )
                )
    categories = {item.get('id') for item in content['categories']}
    images = {item.get('id'): item for item in content['images']}
    checks.drop(
        'annotations',
        lambda a: a.get('category_id') not in categories,
        f'with a category_id that is not in {listed(sorted(categories, key=str))}',
        'Add the categories',
    )
    other_type = {str(i): i for i in images}
    checks.change(
        'annotations',
        lambda a: a.get('image_id') not in images and str(a.get('image_id')) in other_type,
        lambda a: a.update(image_id=other_type[str(a['image_id'])]),
        'with an image_id of another type than the id of the image',
        'Write both as numbers',
        'write the id of the image',
    )
    checks.drop(
        'annotations',
        lambda a: a.get('image_id') not in images,
        'of an image that is not listed',
        'Add the images',
    )
    checks.drop(
        'annotations',
        lambda a: not _is_box(a.get('bbox')),
        'without a usable bbox',
        'Add it',
    )
    _check_boxes(checks, images)
    ids = Counter(a.get('id') for a in content['annotations'])
    new = iter(range(1, len(content['annotations']) + 1))
    if any(n > 1 or i is None for i, n in ids.items()):
        checks.change(
            'annotations',
            lambda a: ids[a.get('id')] > 1 or a.get('id') is None,
            lambda a: None,
            'without an id of their own',
            'Give each its own',
            'number all anew',
        )
        for annotation in content['annotations']:
            annotation['id'] = next(new)
    checks.change(
        'annotations',
        lambda a: not isinstance(a.get('area'), int | float) or a['area'] <= 0,
        lambda a: a.update(area=a['bbox'][2] * a['bbox'][3]),
        'without an area above 0',
        'Correct it',
        'take the area of the box',
    )
    for annotation in content['annotations']:
        polygons = annotation.get('segmentation')
        if isinstance(polygons, list) and _is_polygon(polygons):  # one alone
            annotation['segmentation'] = [polygons]
        elif isinstance(polygons, list) and any(map(_is_polygon, polygons)):
            annotation['segmentation'] = [p for p in polygons if _is_polygon(p)]
    checks.change(
        'annotations',
        lambda a: a.get('segmentation') and not _is_mask(a, images[a['image_id']]),
        lambda a: a.update(segmentation=[_outline(a['bbox'])]),
        'with a mask that is not one of 3 points or more in the box, or of the size of the '
        'image',
        'Correct them',
        'take the outline of the box',
    )
    checks.change(
        'annotations',
        lambda a: a.get('iscrowd') not in (0, 1),
        lambda a: a.update(iscrowd=0),
        'without iscrowd, which the evaluation needs',
        'Add iscrowd 0',
        'add it',
    )


def _is_box(box) -> bool:
    return (
        isinstance(box, list)
        and len(box) == 4
        and all(isinstance(v, int | float) and abs(v) < 1e9 for v in box)
    )


def _is_polygon(polygon) -> bool:
    return (
        isinstance(polygon, list)
        and len(polygon) >= 6
        and len(polygon) % 2 == 0
        and all(isinstance(v, int | float) and abs(v) < 1e9 for v in polygon)
    )


def _is_mask(annotation: dict, image: dict) -> bool:
    segmentation = annotation['segmentation']
    if isinstance(segmentation, dict):  # run lengths
        counts, size = segmentation.get('counts'), segmentation.get('size')
        if not isinstance(size, list) or _size(image) not in (None, tuple(size[::-1])):
            return False
        if isinstance(counts, list):
            return all(isinstance(n, int) for n in counts) and sum(counts) == math.prod(
                size
            )
        return isinstance(counts, str) and _decodes(segmentation)
    if not isinstance(segmentation, list) or not all(map(_is_polygon, segmentation)):
        return False
    points = np.concatenate(segmentation).reshape(-1, 2)
    x, y, w, h = annotation['bbox']
    return bool((points.min(0) <= (x + w, y + h)).all() and (points.max(0) >= (x, y)).all())


def _decodes(run_lengths: dict) -> bool:
    try:
        from pycocotools import mask
    except ModuleNotFoundError:  # only detection needs it, which is not installed
        return True
    try:
        return mask.decode(run_lengths).shape == tuple(run_lengths['size'])
    except ValueError:
        return False


def _outline(box: list) -> list:
    x, y, w, h = box
    return [x, y, x + w, y, x + w, y + h, x, y + h]


def _check_boxes(checks: _Checks, images: dict) -> None:
    """Boxes must have an area, inside of their image."""

    def sides(annotation) -> tuple[float, float]:
        """Width and height of what is inside of the image."""
        x, y, w, h = annotation['bbox']
        right, bottom = _size(images[annotation['image_id']]) or (math.inf, math.inf)
        return min(x + w, right) - max(x, 0), min(y + h, bottom) - max(y, 0)

    boxes = [a['bbox'] for a in checks.content['annotations']]
    if boxes and np.max(boxes) <= 1:
        checks.found.problems.append(
            Problem(
                f'{checks.path}: all boxes are within 0 to 1, the first: {boxes[0]}',
                'Write them in pixels: left, top, width, height',
            )
        )
        return
    outside = [a for a in checks.content['annotations'] if _reaches_out(a, sides(a))]
    checks.drop(
        'annotations',
        lambda a: min(a['bbox'][2:]) < 1,
        'with a box less than 1 pixel wide or high',
        'Correct them',
    )
    checks.drop(
        'annotations',
        lambda a: min(sides(a)) < 1,
        'with a box outside of their image',
        'Correct them',
    )
    if outside:
        share = len(outside) / len(boxes)
        hint = '; is bbox left, top, right, bottom?' * (share > 0.2)
        checks.found.warnings.append(
            f'{checks.path}: boxes that reach out of their image, and are cut off: '
            f'{len(outside)}, the first: {_shown(outside[0])}{hint}'
        )


def _reaches_out(annotation: dict, sides: tuple[float, float]) -> bool:
    w, h = annotation['bbox'][2:]
    return w - sides[0] > 1 or h - sides[1] > 1


def _leave_out(own: CocoSet, bad: set[int]) -> None:
    """Take images and their annotations out of a set."""
    images = own.content['images']
    kept = [i for i in range(len(images)) if i not in bad]
    own.content['images'] = [images[i] for i in kept]
    own.looks = [own.looks[i] for i in kept]
    ids = {image['id'] for image in own.content['images']}
    own.content['annotations'] = [
        a for a in own.content['annotations'] if a['image_id'] in ids
    ]
    own.changed = True


def _classes(sets: list[CocoSet], wanted, found: Findings) -> list[str]:
    """Names of the classes, in the order of the categories of the first file."""
    names = [category.get('name') for category in sets[0].content['categories']]
    for own in sets[1:]:
        others = [category.get('name') for category in own.content['categories']]
        if [n for n in others if not wanted or n in wanted] != [
            n for n in names if not wanted or n in wanted
        ]:
            odd = sorted(set(map(str, names)) ^ set(map(str, others)))
            found.problems.append(
                Problem(
                    f'{sets[0].path} and {own.path} have other categories, or in another '
                    f'order: {listed(odd or names)}',
                    'Write the same list of categories in both',
                )
            )
    unknown = [name for name in wanted or () if name not in names]
    if unknown:
        raise UserError(
            f'--classes has {listed(unknown)}; {sets[0].path} has the categories '
            f'{listed(names, 30)}'
        )
    return [name for name in names if not wanted or name in wanted]


def _check_masks(sets: list[CocoSet], names, boxes_only: bool, found: Findings) -> bool:
    """Whether the annotations have masks: all of them, or none."""
    annotations = []
    for own in sets:
        ids = {c.get('id') for c in own.content['categories'] if c.get('name') in names}
        annotations += [a for a in own.content['annotations'] if a['category_id'] in ids]
    without = [a for a in annotations if not a.get('segmentation')]
    if boxes_only or len(without) == len(annotations):
        return False
    if without:
        found.problems.append(
            Problem(
                f'annotations without a mask (segmentation): {len(without)} of '
                f'{len(annotations)}, the first: {_shown(without[0])}',
                'Add the masks, or give --boxes-only',
                'train boxes only',
            )
        )
        return False
    return True


def _describe(sets: list[CocoSet], names, has_masks: bool, found: Findings) -> None:
    boxes, images_of = Counter(), Counter()
    ids = []
    for own in sets:
        name_of = {c.get('id'): c.get('name') for c in own.content['categories']}
        ids += name_of
        in_image = {image.get('id'): set() for image in own.content['images']}
        for annotation in own.content['annotations']:
            name = name_of.get(annotation['category_id'])
            boxes[name] += 1
            if not annotation.get('iscrowd'):  # which nothing is learned from
                in_image.setdefault(annotation['image_id'], set()).add(name)
        own.classes_of = [in_image[i.get('id')] & set(names) for i in own.content['images']]
        images_of.update(name for present in own.classes_of for name in present)
        empty = sum(not present for present in own.classes_of)
        count = len(own.content['images'])
        if empty:
            found.warnings.append(
                f'{own.path}: images without objects: {empty} of {count}'
                + ', which training leaves out (filter_cfg)' * (own is sets[0])
            )
        if empty == count:
            found.problems.append(
                Problem(f'{own.path} has no objects of the classes', 'Add annotations')
            )
    kind = 'boxes and masks' if has_masks else 'boxes without masks'
    found.facts.append(('objects', f'{sum(boxes[n] for n in names)} {kind}'))
    found.facts.append(('classes', str(len(names))))
    for name in names:
        found.facts.append(('', f'{name}: {boxes[name]} boxes in {images_of[name]} images'))
    unused = [name for name in names if not boxes[name]]
    if unused:
        found.warnings.append(f'no box is of {listed(unused)}')
    numbers = sorted(i for i in set(ids) if isinstance(i, int))
    if numbers and len(numbers) != numbers[-1] - numbers[0] + 1:
        found.warnings.append(
            f'category ids have holes ({listed(numbers)}); only their order counts'
        )
