"""The confusion matrix of a segmentor; the kinds of errors of a detector."""

import io
import json
import os
import pickle
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from mmengine.registry import DATASETS
from PIL import Image
from tqdm import tqdm

from ...checkpoint import unpickling
from ...config.checks import check_dataset
from ...config.edit import evaluators, require_keys
from ...config.load import load_config, register_modules, toolbox_of
from ...errors import UserError
from ..files import check_file
from ..test import output_names, test
from . import figures

_PICKLES = ('.pkl', '.pickle')
_MEANS = 'mIoU', 'mAcc', 'aAcc'
# More classes than these get no numbers in the cells of their matrix, or no bar each.
_MOST_NUMBERS, _MOST_BARS = 20, 25
_SIZE = 0.115  # of the rows of large figures, in inches
_COLOURS = ('C0', 'C1', 'C2', 'C4', 'C7', 'C3')


@figures.styled()
def errors(
    config: str | Path,
    predictions: str | Path,
    out: str | Path,
    *,
    masks: bool = False,
    cfg_options: dict | None = None,
    json_path: str | None = None,
) -> str:
    """Draw what a model does wrong on the ``test_dataloader`` of its config.

    For a segmentor it is the confusion matrix, normalised by true class, and the IoU of
    each class, with the numbers of MMSegmentation's ``IoUMetric``. For a detector it is
    what each kind of error costs, as :mod:`overlock_mm.apis.visualization.tide` defines
    them, and their numbers by class.

    Args:
        config: path of a config of MMDetection or MMSegmentation.
        predictions: what ``overlock test --out`` saved: a folder of label maps of a
            segmentor, a .pkl file of a detector; or a .json file of detections in the
            format of COCO; or a checkpoint, which is evaluated first.
        out: picture to write.
        masks: of a detector, compare masks in place of boxes.
        cfg_options: values to override, by key.
        json_path: file for all numbers.

    Returns:
        str: the main numbers as text.

    Raises:
        UserError: if the config, the data or the predictions cannot be used.
        CheckpointError: if the weights cannot be loaded, or do not fit.
    """
    out = figures.check_picture(out)
    cfg = load_config(config, cfg_options)
    toolbox = toolbox_of(cfg)
    path = Path(predictions).expanduser()
    _check_predictions(path, str(predictions), toolbox, masks)
    require_keys(cfg, 'test_dataloader')
    check_dataset(cfg, 'test_dataloader')
    with TemporaryDirectory() as folder:
        if not path.is_dir() and path.suffix not in ('.json', *_PICKLES):
            path = Path(folder, 'maps' if toolbox == 'mmseg' else 'detections.pkl')
            path.parent.mkdir(exist_ok=True)
            options = dict(work_dir=folder, cfg_options=cfg_options, out=str(path))
            test(config, predictions, **options)
        register_modules(toolbox)
        dataset = DATASETS.build(cfg.test_dataloader.dataset)
        classes = dataset.metainfo.get('classes')
        if not classes:
            raise UserError(
                f'the data set of {config} does not name its classes; give it '
                "metainfo=dict(classes=('name', ...))"
            )
        draw = _segmentor if toolbox == 'mmseg' else _detector
        figure, numbers, text = draw(cfg, dataset, list(classes), path, masks)
    figure.suptitle(f'{figure.get_suptitle()} ({Path(config).stem})')
    figures.save(figure, out)
    figures.write_json(numbers, json_path)
    return f'{text}\nsaved as {out}'


def _check_predictions(path: Path, given: str, toolbox: str, masks: bool) -> None:
    """Raise :class:`UserError` for what is not there, or of the other toolbox."""
    saved = path.suffix in ('.json', *_PICKLES)
    if toolbox == 'mmseg' and (saved or masks):
        what = '--masks is for detectors' if masks else f'{given} is for detectors'
        raise UserError(
            f'{what}, and the config is a segmentor; give a folder of label maps, as '
            '`overlock test --out FOLDER` writes them, or a checkpoint'
        )
    if path.is_dir():
        if toolbox == 'mmdet':
            raise UserError(
                f'{given} is a folder, and the config is a detector; give a .pkl file, as '
                '`overlock test --out FILE.pkl` writes it, a .json file of detections in '
                'the format of COCO, or a checkpoint'
            )
    else:
        check_file(given, 'predictions')


# Segmentors


def _segmentor(cfg, dataset, classes: list[str], folder: Path, masks: bool):
    matrix = _confusion(cfg, dataset, len(classes), folder)
    if not matrix.any():
        raise UserError('the annotations of the test data have no pixel of any class')
    scores = _scores(matrix)
    figure = _draw_matrix(scores, classes)
    means = {name: scores[name] for name in _MEANS}
    confused = scores['shares'].copy()
    np.fill_diagonal(confused, 0)
    order = np.argsort(-np.nan_to_num(confused), axis=None, kind='stable')[:10]
    rows = []
    for true, predicted in zip(*np.unravel_index(order, confused.shape), strict=True):
        if confused[true, predicted] > 0:
            share = f'{confused[true, predicted]:.1%}'
            rows.append((classes[true], classes[predicted], share))
    text = ', '.join(f'{name} {value:.2f}' for name, value in means.items())
    if rows:
        header = ('true', 'predicted', 'share of true')
        text += f'\nlargest confusions:\n{figures.table(header, rows)}'
    numbers = dict(
        **means,
        classes=classes,
        IoU=_listed(scores['IoU']),
        Acc=_listed(scores['Acc']),
        matrix=matrix.tolist(),
    )
    return figure, numbers, text


def _confusion(cfg, dataset, num_classes: int, folder: Path) -> np.ndarray:
    """Pixels by true and predicted class, ``(classes, classes)``."""
    ignored = next((e['ignore_index'] for e in evaluators(cfg) if 'ignore_index' in e), 255)
    paths = [dataset.get_data_info(i)['img_path'] for i in range(len(dataset))]
    names = output_names(paths)
    files = [folder / f'{names[os.path.normpath(path)]}.png' for path in paths]
    missing = [file for file in files if not file.is_file()]
    if missing:
        raise UserError(
            f'{len(missing)} of {len(files)} label maps are not there, for instance '
            f'{missing[0]}; write them with `overlock test --out {folder}`, with the same '
            'test_dataloader'
        )
    matrix = np.zeros((num_classes, num_classes), np.int64)
    for i, file in enumerate(tqdm(files, 'label maps', disable=None)):
        sample = dataset[i]['data_samples']
        if 'gt_sem_seg' not in sample:
            raise UserError(
                f'there are no labels of {paths[i]}, so nothing to compare predictions '
                'with; the test pipeline needs LoadAnnotations'
            )
        true = sample.gt_sem_seg.data.squeeze().numpy()
        found = _read_map(file).astype(np.int64)
        if sample.get('reduce_zero_label', False):
            found -= 1  # as it was written
        if found.shape != true.shape:
            size, other = (f'{s[1]}x{s[0]}' for s in (found.shape, true.shape))
            raise UserError(
                f'{file} has {size} pixels, and the labels of its image have {other}; '
                'write the label maps with the same test_dataloader'
            )
        valid = true != ignored
        true, found = true[valid], found[valid]
        for labels, what in ((true, f'the labels of {paths[i]}'), (found, str(file))):
            wrong = labels[(labels < 0) | (labels >= num_classes)]
            if len(wrong):
                raise UserError(
                    f'{what} have the class {wrong[0]}, and the config has the classes 0 '
                    f'to {num_classes - 1}; `overlock test` checks data and config'
                )
        pairs = true.astype(np.int64) * num_classes + found
        matrix += np.bincount(pairs, minlength=matrix.size).reshape(matrix.shape)
    return matrix


def _read_map(file: Path) -> np.ndarray:
    try:
        labels = np.array(Image.open(file))
    except OSError as error:
        raise UserError(f'{file} is not a picture that can be read: {error}') from error
    if labels.ndim != 2:
        raise UserError(
            f'{file} is a picture in colour, and a label map has the index of a class in '
            'each pixel; write them with `overlock test --out FOLDER`'
        )
    return labels


def _scores(matrix: np.ndarray) -> dict:
    """IoU and accuracy in percent, as MMSegmentation's ``IoUMetric`` defines them."""
    right, true, found = matrix.diagonal(), matrix.sum(1), matrix.sum(0)
    with np.errstate(invalid='ignore'):
        iou, accuracy = 100 * right / (true + found - right), 100 * right / true
        shares = matrix / true[:, None]
    return dict(
        aAcc=100 * right.sum() / true.sum(),
        mIoU=float(np.nanmean(iou)),
        mAcc=float(np.nanmean(accuracy)),
        IoU=iou,
        Acc=accuracy,
        shares=shares,
    )


def _draw_matrix(scores: dict, classes: list[str]) -> Figure:
    count = len(classes)
    width = max(figures.TEXT, 3 + _SIZE * count)
    height = 1.8 + max(0.21 * min(count, 12), _SIZE * count)
    figure = Figure(figsize=(width, height), layout='constrained')
    axes, bars = figure.subplots(1, 2, sharey=True, width_ratios=(3.4, 1))
    colours = figures.matplotlib.colormaps['Blues'].with_extremes(bad='0.85')
    norm = PowerNorm(0.5, 0, 1)  # else small shares cannot be seen
    image = axes.imshow(scores['shares'], colours, norm=norm, aspect='auto')
    if count <= _MOST_NUMBERS:
        for true, row in enumerate(scores['shares']):
            for found, share in enumerate(row):
                if share >= 0.005:
                    colour = 'white' if norm(share) > 0.6 else 'black'
                    place = dict(ha='center', va='center', color=colour, fontsize=6)
                    axes.text(found, true, f'{100 * share:.0f}', **place)
    axes.set_xticks(range(count), classes, rotation=90)
    axes.set_yticks(range(count), classes)
    axes.tick_params(length=0)
    title = 'Share of the pixels of the true class'
    title += ' (numbers: %)' if count <= _MOST_NUMBERS else ''
    axes.set(xlabel='predicted', ylabel='true', title=title)
    size = dict(fraction=0.03, aspect=30, shrink=min(1, 3 / height))
    bar = figure.colorbar(image, ax=[axes, bars], **size)
    ticks = (0, 0.01, 0.05, 0.1, 0.25, 0.5, 1)
    bar.set_ticks(ticks, labels=[f'{tick:.0%}' for tick in ticks])
    bars.barh(range(count), np.nan_to_num(scores['IoU']), color='C0', height=0.8)
    bars.axvline(scores['mIoU'], color='black', lw=0.6, ls='--')
    for i, value in enumerate(scores['IoU']):
        text = 'not there' if np.isnan(value) else f'{value:.1f}'
        look = dict(va='center', fontsize=5, bbox=dict(fc='white', ec='none', pad=0.2))
        bars.text(np.nan_to_num(value) + 2, i, text, **look)
    bars.set(title=f'IoU (mean {scores["mIoU"]:.2f})', xlabel='%', xlim=(0, 118))
    bars.set_xticks((0, 25, 50, 75, 100))
    bars.tick_params(axis='y', labelleft=False, length=0)
    figure.suptitle(', '.join(f'{n} {scores[n]:.2f}' for n in _MEANS))
    return figure


# Detectors


def _detector(cfg, dataset, classes: list[str], path: Path, masks: bool):
    from . import tide

    infos = [dataset.get_data_info(i) for i in range(len(dataset))]
    read = _read_json if path.suffix == '.json' else _read_pickle
    by_image = read(path, dataset, [info['img_id'] for info in infos], masks)
    wrong = [i for f in by_image.values() for i in f.labels if not 0 <= i < len(classes)]
    if wrong:
        raise UserError(
            f'{path} has the class {wrong[0]}, and the config has the classes 0 to '
            f'{len(classes) - 1}: it is of another model'
        )
    objects = [_objects(info, masks) for info in infos]
    found = tide.find_errors(objects, [by_image[i['img_id']] for i in infos], len(classes))
    if not found.objects.any():
        raise UserError('the annotations of the test data have no object of any class')
    counts = dict(zip(tide.KINDS, found.counts.sum(0).tolist(), strict=True))
    kind = 'mask' if masks else 'box'
    rows = [(k, counts[k], f'{found.gains[k]:.4f}') for k in tide.KINDS]
    text = f'{kind} AP50 {found.ap:.4f}, and what it gains when one kind is fixed:\n'
    lines = figures.table(('error', 'number', 'AP50'), rows).splitlines()
    meanings = ('', *tide.KINDS.values())
    text += '\n'.join(map('  '.join, zip(lines, meanings, strict=True)))
    text += (
        f'\nwithout any wrong detection it gains {found.false_positives:.4f}, without any '
        f'object that was not detected {found.false_negatives:.4f}'
    )
    numbers = dict(
        compared=kind,
        AP50=found.ap,
        gains=found.gains,
        gain_without_false_positives=found.false_positives,
        gain_without_false_negatives=found.false_negatives,
        numbers=counts,
        classes={
            name: dict(
                objects=int(found.objects[i]),
                AP50=_listed(found.class_aps)[i],
                right=int(found.right[i]),
                **dict(zip(tide.KINDS, found.counts[i].tolist(), strict=True)),
            )
            for i, name in enumerate(classes)
        },
    )
    return _draw_errors(found, list(tide.KINDS), classes, kind), numbers, text


def _objects(info: dict, masks: bool):
    """The objects of an image, from its annotations."""
    from . import tide

    instances = info.get('instances') or []
    labels = np.array([i['bbox_label'] for i in instances], int)
    crowd = np.array([bool(i.get('ignore_flag')) for i in instances], bool)
    if not masks:
        return tide.Objects(labels, _boxes([i['bbox'] for i in instances]), crowd)
    if any(not i.get('mask') for i in instances):
        raise UserError(f'{info["img_path"]} has objects without a mask; leave out --masks')
    size = info['height'], info['width']
    return tide.Objects(labels, [_encoded(i['mask'], size) for i in instances], crowd)


def _encoded(mask: dict | list, size: tuple[int, int]) -> dict:
    """A mask of COCO (polygons or RLE) as a compressed RLE."""
    from pycocotools import mask as coco_mask

    if isinstance(mask, list):
        return coco_mask.merge(coco_mask.frPyObjects(mask, *size))
    if isinstance(mask['counts'], list):
        return coco_mask.frPyObjects(mask, *size)
    return mask


def _boxes(corners) -> np.ndarray:
    """Boxes as x, y, width and height, from their corners."""
    boxes = np.array(corners, float).reshape(-1, 4)
    boxes[:, 2:] -= boxes[:, :2]
    return boxes


def _read_pickle(path: Path, dataset, images: list, masks: bool) -> dict:
    """The detections of each image from what ``overlock test --out`` wrote."""
    from . import tide

    try:
        with path.open('rb') as file:
            content = _Unpickler(file).load()
        samples = {sample['img_id']: sample['pred_instances'] for sample in content}
        found = {}
        for image, sample in samples.items():
            boxes, labels, scores = (
                np.asarray(sample[name]) for name in ('bboxes', 'labels', 'scores')
            )
            shapes = list(sample['masks']) if masks else _boxes(boxes)
            found[image] = tide.Objects(labels.astype(int), shapes, scores.astype(float))
    except KeyError as error:
        if not isinstance(error.args[0], str):  # a byte that is no instruction of a pickle
            raise UserError(f'{path} does not hold detections; {_HOW}') from error
        hint = 'leave out --masks' if error.args == ('masks',) else _HOW
        raise UserError(f'{path} has no {error.args[0]}; {hint}') from error
    except unpickling.Refused as error:
        raise UserError(f'{path} holds {error}, which is not read; {_HOW}') from error
    except (pickle.UnpicklingError, *_BROKEN) as error:
        raise UserError(f'{path} does not hold detections ({error}); {_HOW}') from error
    _check_images(path, found, images)
    missing = set(images) - set(found)
    if missing:
        raise UserError(
            f'{path} has no detections of {len(missing)} of the {len(images)} images, for '
            f'instance {min(missing, key=str)}; write it with the same test_dataloader'
        )
    return found


# What reading anything else as a pickle raises, or finding something else in it.
_BROKEN = AttributeError, EOFError, IndexError, RuntimeError, TypeError, ValueError
_HOW = 'write it with `overlock test --out FILE.pkl`'


def _read_json(path: Path, dataset, images: list, masks: bool) -> dict:
    """The detections of each image from a file in the format of COCO's results."""
    from . import tide

    label_of = getattr(getattr(dataset, 'datasets', [dataset])[0], 'cat2label', None)
    if label_of is None:
        raise UserError(
            f'{path}: the data set has no category ids as COCO has them; give a .pkl file '
            'that `overlock test --out FILE.pkl` wrote'
        )
    key = 'segmentation' if masks else 'bbox'
    found = {}
    try:
        content = json.loads(path.read_text())
        for item in content:
            label, score = label_of.get(item['category_id'], -1), float(item['score'])
            found.setdefault(item['image_id'], []).append((label, item[key], score))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(
            f'{path} is not a list of detections in the format of COCO, with image_id, '
            f'category_id, score and {key} ({type(error).__name__}: {error})'
        ) from error
    _check_images(path, found, images)
    result = {}
    for image in images:
        labels, shapes, scores = (
            zip(*found[image], strict=True) if image in found else [()] * 3
        )
        shapes = list(shapes) if masks else np.array(shapes, float).reshape(-1, 4)
        result[image] = tide.Objects(np.array(labels, int), shapes, np.array(scores))
    return result


def _check_images(path: Path, found: dict, images: list) -> None:
    if len(set(images)) < len(images):
        raise UserError('the test data have two images with the same id; make them differ')
    other = set(found) - set(images)
    if other:
        raise UserError(
            f'{path} has detections of {len(other)} images that the test data do not have, '
            f'for instance {min(other, key=str)}; it is of other data'
        )


def _storage(data: bytes):
    """Read the values of a tensor as ``torch.storage._load_from_bytes`` does, safely."""
    return torch.load(io.BytesIO(data), pickle_module=unpickling, weights_only=False)


class _Unpickler(unpickling.Unpickler):
    """The unpickler of checkpoints, which also reads tensors that pickle itself wrote."""

    dispatch = dict(unpickling.Unpickler.dispatch)

    def find_class(self, module: str, name: str):
        if (module, name) == ('torch.storage', '_load_from_bytes'):
            return _storage
        return super().find_class(module, name)

    def load_reduce(self):
        if self.stack[-2] is not _storage:
            return super().load_reduce()
        (data,) = self.stack.pop()
        self.stack[-1] = _storage(data)

    dispatch[pickle.REDUCE[0]] = load_reduce


def _draw_errors(found, kinds: list[str], classes: list[str], compared: str) -> Figure:
    shown = np.argsort(-found.counts.sum(1), kind='stable')[:_MOST_BARS]
    shown = [i for i in shown if found.counts[i].any()]
    height = max(2.4, 0.9 + _SIZE * len(shown) * 1.2)
    figure = Figure(figsize=(figures.TEXT, height), layout='constrained')
    gains, counts = figure.subplots(1, 2, width_ratios=(1, 1.25))
    bars = [*found.gains.items()]
    bars += [
        ('all wrong detections', found.false_positives),
        ('all undetected objects', found.false_negatives),
    ]
    colours = [*_COLOURS, '0.6', '0.6']
    for i, ((_, value), colour) in enumerate(zip(bars, colours, strict=True)):
        gains.barh(i + (i >= len(kinds)) * 0.5, value, color=colour)
        gains.text(value, i + (i >= len(kinds)) * 0.5, f' {value:.3f}', va='center', size=6)
    places = [i + (i >= len(kinds)) * 0.5 for i in range(len(bars))]
    gains.set_yticks(places, [name for name, _ in bars])
    gains.invert_yaxis()
    gains.set(title='Gain when one kind is fixed', xlabel='AP50')
    gains.set_xlim(0, 1.25 * max(value for _, value in bars) or 1)
    left = np.zeros(len(shown))
    for kind, name, colour in zip(range(len(kinds)), kinds, _COLOURS, strict=True):
        values = found.counts[shown, kind]
        counts.barh(range(len(shown)), values, left=left, color=colour, label=name)
        left = left + values
    counts.set_yticks(range(len(shown)), [classes[i] for i in shown])
    counts.invert_yaxis()
    title = 'Errors by class'
    if len(shown) < len(classes):
        title += f': the {len(shown)} of {len(classes)} classes with most'
    counts.set(title=title, xlabel='wrong detections and missed objects')
    counts.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    counts.margins(x=0.05)
    figure.legend(loc='outside lower center', ncols=6, frameon=False)
    figure.suptitle(f'{compared.capitalize()} AP50 {found.ap:.3f}')
    return figure


def _listed(values: Sequence[float]) -> list[float | None]:
    """Numbers for JSON, which knows no NaN."""
    return [None if np.isnan(value) else float(value) for value in values]
