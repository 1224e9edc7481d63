"""From a folder of images and labels to a config."""

import json
from collections.abc import Sequence
from pathlib import Path

from ..config.init import Training, detection_config, segmentation_config
from ..datasets.survey.classes import read_classes
from ..datasets.survey.coco import survey_detection
from ..datasets.survey.images import listed, split
from ..datasets.survey.label_maps import survey_segmentation
from ..errors import UserError
from .files import check_output
from .messages import say


def init(
    task: str,
    images: str,
    *,
    masks: str | None = None,
    annotations: str | None = None,
    val: str | None = None,
    val_images: str | None = None,
    val_masks: str | None = None,
    arch: str = 't',
    classes: str | None = None,
    ignore: Sequence[int] = (255,),
    image_suffix: str | None = None,
    mask_suffix: str | None = None,
    boxes_only: bool = False,
    batch: int | None = None,
    small_gpu: bool = False,
    val_share: float = 0.15,
    seed: int = 0,
    out: str | None = None,
    fix: bool = False,
    force: bool = False,
) -> Path:
    """Look at all of a data set, and write a config that trains on it.

    Args:
        task: 'segmentation' or 'detection'.
        images: folder of the images.
        masks: folder of the label maps, for segmentation.
        annotations: COCO file, for detection.
        val: COCO file of the validation set; by default a part of the first is held out.
        val_images: folder of the validation images; for detection by default ``images``.
        val_masks: folder of their label maps; by default a part of ``masks`` is held out.
        arch: 'xt', 't', 's' or 'b'.
        classes: names with commas between them, or a file, see
            :func:`~overlock_mm.datasets.survey.classes.read_classes`; by default the
            values that label maps hold, or all categories.
        ignore: label values of pixels that have no class.
        image_suffix: how names of images end, where label maps do not have their names.
        mask_suffix: likewise of label maps.
        boxes_only: train without masks.
        batch: images in an iteration. Defaults to 4, and to 2 for a small GPU.
        small_gpu: activation checkpointing, gradients of several iterations added up, and,
            for segmentation, bfloat16.
        val_share: of the images that is held out.
        seed: of the division.
        out: config to write. Defaults to ``my_segmentation.py`` or ``my_detection.py``.
            Lists of images, and COCO files that were divided or fixed, are written beside
            it.
        fix: fix in copies and in the config what can be fixed.
        force: overwrite what is there.

    Returns:
        The path of the config.

    Raises:
        UserError: if an argument or the data cannot be used. Then nothing is written.
    """
    out = check_output(out or f'my_{task}.py', ('.py',), force)
    if not 0 < val_share < 1:
        raise UserError(f'--val-share {val_share} must be between 0 and 1, such as 0.15')
    if batch is not None and batch < 1:
        raise UserError(f'--batch {batch} must be at least 1')
    if seed < 0:
        raise UserError(f'--seed {seed} must be at least 0')
    how = Training.of(task, batch, small_gpu)
    named = read_classes(classes) if classes else None
    if task == 'segmentation':
        _require(task, masks=masks)
        _refuse(task, annotations=annotations, val=val, boxes_only=boxes_only)
        if bool(val_images) != bool(val_masks):
            raise UserError('--val-images and --val-masks belong together; give both')
        if batch == 1:
            raise UserError(
                '--batch 1 is too small for UperNet: it pools each image to one value per '
                'channel, of which batch norm has no variance. Give 2 or more'
            )
        folders = [(_folder(images), _folder(masks))]
        folders += [(_folder(val_images), _folder(val_masks))] if val_masks else []
        if val_images and _same(images, val_images) and _same(masks, val_masks):
            raise UserError(f'{val_images} is the training set; give other images')
        data, found = survey_segmentation(
            folders,
            classes=named,
            ignore=ignore,
            image_suffix=image_suffix,
            mask_suffix=mask_suffix,
            fix=fix,
        )
        write = _segmentation_files
    else:
        _require(task, annotations=annotations)
        _refuse(task, masks=masks, val_masks=val_masks)
        if val_images and not val:
            raise UserError('--val-images needs the annotations of these images: --val')
        if named and any(value is not None for _, value in named):
            raise UserError('--classes of a detector are names alone, without values')
        files = [(_folder(annotations), _folder(images))]
        files += [(_folder(val), _folder(val_images or images))] if val else []
        if val and _same(annotations, val):
            raise UserError(f'--val {val} is the training set; give another file')
        data, found = survey_detection(
            files,
            classes=named and [name for name, _ in named],
            boxes_only=boxes_only,
            fix=fix,
        )
        write = _detection_files
    say(found.report(fix))
    found.raise_problems(fix)
    parts = _parts(data, val_share, seed)
    names = data.classes if task == 'detection' else data.classes.names
    _check_parts(names, parts)
    texts = write(data, out, arch, how, parts)
    for path in texts:
        if path.exists() and (not force or not path.is_file()):
            raise UserError(f'{path} exists; give another --out, or --force')
    for path, text in texts.items():
        path.write_text(text, encoding='utf-8')
    say(f'wrote {", ".join(map(str, texts))}; next: overlock train {out}')
    return out


def _folder(path: str) -> Path:
    return Path(path).expanduser()


def _same(path: str, other: str) -> bool:
    return _folder(path).resolve() == _folder(other).resolve()


def _require(task: str, **arguments) -> None:
    for name, value in arguments.items():
        if value is None:
            raise UserError(f'--task {task} needs --{name.replace("_", "-")}')


def _refuse(task: str, **arguments) -> None:
    for name, value in arguments.items():
        if value:
            raise UserError(f'--{name.replace("_", "-")} is not an option of --task {task}')


def _parts(data, val_share: float, seed: int) -> list[tuple]:
    """For training and for validation, a set and the indices of its images."""
    if len(data.sets) == 2:
        return [(own, range(len(own.classes_of))) for own in data.sets]
    (own,) = data.sets
    train, val = split(own.classes_of, val_share, seed)
    say(f'no validation set was given: {len(val)} of {len(train) + len(val)} images are it')
    return [(own, train), (own, val)]


def _check_parts(names: Sequence[str], parts: list[tuple]) -> None:
    """Training must have objects, and should have all classes that there are."""
    train, val = (set().union(*(own.classes_of[i] for i in part)) for own, part in parts)
    if not train:
        raise UserError('the training images have no objects; change --seed or --val-share')
    if val - train:
        missing = [name for i, name in enumerate(names) if {i, name} & (val - train)]
        say(f'warning: only validation images have {listed(missing)}')


def _segmentation_files(data, out: Path, arch, how, parts) -> dict[Path, str]:
    texts, lists = {}, []
    for part, (own, indices) in zip(('train', 'val'), parts, strict=True):
        names = {}
        for i in indices:
            names.setdefault(own.pairs[i].suffixes, []).append(own.pairs[i].name)
        by_suffix = {}
        for number, (suffixes, group) in enumerate(sorted(names.items()), 1):
            end = '' if len(names) == 1 else f'_{number}'
            path = out.with_name(f'{out.stem}_{part}{end}.txt')
            texts[path] = '\n'.join(group) + '\n'
            by_suffix[suffixes] = str(path), len(group)
        lists.append(by_suffix)
    return {out: segmentation_config(data, lists, arch, how), **texts}


def _detection_files(data, out: Path, arch, how, parts) -> dict[Path, str]:
    texts, files = {}, []
    for part, (own, indices) in zip(('train', 'val'), parts, strict=True):
        path, content = own.path, own.content
        if own.changed or len(indices) < len(own.classes_of):
            path = out.with_name(f'{out.stem}_{part}.json')
            kept = [content['images'][i] for i in indices]
            ids = {image['id'] for image in kept}
            objects = [a for a in content['annotations'] if a['image_id'] in ids]
            texts[path] = json.dumps(dict(content, images=kept, annotations=objects))
        count = sum(bool(own.classes_of[i]) for i in indices)
        files.append((str(path), str(own.folder), count))
    return {out: detection_config(data, files, arch, how), **texts}
