"""The pictures and numbers of the demo, from the files that training and testing write."""

import io
import json
import pickle
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import set_random_seed
from PIL import Image
from pycocotools import mask as mask_utils

from ..datasets.demo import CLASSES, PALETTE

SPLIT = 'validation'


class Region(NamedTuple):
    """One class in an image, or one instance of it."""

    label: int  # index into CLASSES
    mask: np.ndarray  # (H, W), bool
    box: tuple[float, float, float, float] | None = None  # x1, y1, x2, y2


class Scene(NamedTuple):
    """An image, what is in it and what was predicted."""

    image: np.ndarray  # (H, W, 3), RGB, uint8
    truth: list[Region]
    predicted: list[Region]


def prepare_work_dir(config: str | Path, data: str | Path, work_dir: str | Path) -> bool:
    """Remove what an earlier run left, if it was of another config or data set.

    Args:
        config: config of the run.
        data: folder of the demo data.
        work_dir: folder of the run.

    Returns:
        bool: True if there was such a run.
    """
    recipe = Config.fromfile(config).pretty_text
    recipe += Path(data, 'demo.json').read_text()
    record = Path(work_dir, 'recipe.txt')
    stale = record.parent.exists()
    stale = stale and not (record.exists() and record.read_text() == recipe)
    if stale:
        shutil.rmtree(record.parent)
    record.parent.mkdir(parents=True, exist_ok=True)
    record.write_text(recipe)
    return stale


def save_untrained(config: str | Path, path: str | Path) -> None:
    """Write a checkpoint of the model as it is before training."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    set_random_seed(cfg.randomness.seed)
    model = MODELS.build(cfg.model)
    model.init_weights()
    torch.save(dict(state_dict=model.state_dict()), path)


def metrics_of(work_dir: str | Path) -> dict:
    """The metrics that the latest run of ``tools/test.py`` in ``work_dir`` logged."""
    log = max(Path(work_dir).glob('*/*.json'), key=lambda p: p.stat().st_mtime)
    return json.loads(log.read_text().splitlines()[-1])


def training_log(work_dir: str | Path) -> list[dict]:
    """All logged records of training, in order, also over interrupted runs."""
    records = {}
    for path in sorted(Path(work_dir).glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            key = ('loss' in record, record.get('iter', record['step']))
            records[key] = record
    return [records[key] for key in sorted(records)]


def losses_of(work_dir: str | Path) -> dict[str, tuple[float, float]]:
    """First and last logged value of every loss."""
    records = [r for r in training_log(work_dir) if 'loss' in r]
    return {k: (records[0][k], records[-1][k]) for k in records[0] if 'loss' in k}


def background_miou(data: str | Path) -> float:
    """The mIoU of predicting background everywhere: its own IoU, over all classes."""
    maps = [np.array(Image.open(p)) for p in Path(data, 'annotations', SPLIT).glob('*.png')]
    labels = np.concatenate([m.ravel() for m in maps])
    return float((labels == 0).mean() / len(np.unique(labels)))


def plot_curve(work_dir: str | Path) -> Path:
    """Draw the training loss and the validation metric as ``curve.png``."""
    from matplotlib.figure import Figure

    records = training_log(work_dir)
    train = [r for r in records if 'loss' in r]
    figure = Figure(figsize=(6, 3.5), layout='constrained')
    axes = figure.subplots()
    axes.plot([r['step'] for r in train], [r['loss'] for r in train], color='tab:blue')
    axes.set(xlabel='iteration', ylim=(0, None))
    axes.set_ylabel('training loss', color='tab:blue')
    for metric in ('mIoU', 'coco/segm_mAP_50'):
        # nothing is logged where no object was found
        scores = [(r['step'], r[metric]) for r in records if metric in r]
        if not scores:
            continue
        if metric.startswith('coco'):  # logged by epoch
            per_epoch = max(r['step'] for r in train) / max(s for s, _ in scores)
            scores = [(s * per_epoch, v) for s, v in scores]
        right = axes.twinx()
        right.plot(*zip(*scores, strict=True), 'o-', color='tab:orange')
        right.set_ylim(0, None)
        right.set_ylabel(f'validation {metric}', color='tab:orange')
    path = Path(work_dir, 'curve.png')
    figure.savefig(path, dpi=150)
    return path


def segmentation_scenes(data: str | Path, predictions: str | Path) -> list[Scene]:
    """The validation scenes with the label maps that ``tools/test.py --out`` wrote.

    Args:
        data: folder of the demo data.
        predictions: folder with a predicted label map for each image.
    """
    predicted = {path.name: path for path in Path(predictions).rglob('*.png')}
    return [
        Scene(
            np.array(Image.open(path)),
            _regions(Path(data, 'annotations', SPLIT, path.name)),
            _regions(predicted[path.name]),
        )
        for path in sorted(Path(data, 'images', SPLIT).glob('*.png'))
    ]


def _regions(label_map: Path) -> list[Region]:
    labels = np.array(Image.open(label_map))
    return [Region(label, labels == label) for label in np.unique(labels) if label]


def detection_scenes(
    data: str | Path, predictions: str | Path, min_score: float = 0.3
) -> list[Scene]:
    """The validation scenes with the instances that ``tools/test.py --out`` wrote.

    Args:
        data: folder of the demo data.
        predictions: pickle file of the predicted instances. Unpickling runs code: give a
            file that you wrote.
        min_score: score from which an instance is drawn.
    """
    coco = json.loads(Path(data, 'annotations', f'instances_{SPLIT}.json').read_text())
    truth = {image['id']: [] for image in coco['images']}
    for instance in coco['annotations']:
        x, y, w, h = instance['bbox']
        mask = mask_utils.decode(instance['segmentation']).astype(bool)
        region = Region(instance['category_id'], mask, (x, y, x + w, y + h))
        truth[instance['image_id']].append(region)
    with open(predictions, 'rb') as file:
        samples = {sample['img_id']: sample for sample in pickle.load(file)}
    scenes = []
    for image in coco['images']:
        found = samples[image['id']]['pred_instances']
        names = ('labels', 'masks', 'bboxes', 'scores')
        predicted = [
            # the detector does not count background
            Region(int(label) + 1, mask_utils.decode(mask).astype(bool), tuple(box))
            for label, mask, box, score in zip(*(found[n] for n in names), strict=True)
            if score >= min_score
        ]
        picture = np.array(Image.open(Path(data, 'images', SPLIT, image['file_name'])))
        scenes.append(Scene(picture, truth[image['id']], predicted))
    return scenes


def draw_scenes(
    scenes: list[Scene],
    path: str | Path,
    predicted: str = 'prediction',
    pairs_per_row: int = 2,
) -> None:
    """Draw pairs of ground truth and prediction, with a legend of the classes below.

    Args:
        scenes: what to draw, from left to right and from top to bottom.
        path: PNG file to write.
        predicted: title of the columns of predictions.
        pairs_per_row: scenes in a row.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch, Rectangle

    columns, rows = 2 * pairs_per_row, -(-len(scenes) // pairs_per_row)
    legend_columns = 5 * pairs_per_row // 2
    lines = 1 + -(-len(CLASSES[1:]) // legend_columns)
    # inches: 2.5 for a picture, 0.28 for a line of titles or legend
    size = (2.5 * columns, 2.5 * rows + 0.28 * lines)
    figure = Figure(figsize=size, layout='constrained')
    figure.get_layout_engine().set(w_pad=0.02, h_pad=0.02, wspace=0, hspace=0)
    axes = figure.subplots(rows, columns, squeeze=False)
    for i, axis in enumerate(axes.flat):
        axis.set_axis_off()
        if i < columns:
            title = ('ground truth', predicted)[i % 2]
            axis.set_title(title, fontsize=12)
        if i // 2 >= len(scenes):
            continue
        scene = scenes[i // 2]
        regions = scene.predicted if i % 2 else scene.truth
        axis.imshow(_painted(scene.image, regions))
        for region in regions:
            color = np.array(PALETTE[region.label]) / 255
            axis.contour(region.mask, [0.5], colors=[color], linewidths=1.5)
            if region.box is not None:
                x1, y1, x2, y2 = region.box
                box = Rectangle((x1, y1), x2 - x1, y2 - y1, fill=False, edgecolor=color)
                axis.add_patch(box)
        height, width = scene.image.shape[:2]  # boxes may reach beyond
        axis.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))
    patches = [
        Patch(color=np.array(color) / 255, label=name.replace('_', ' '))
        for name, color in zip(CLASSES[1:], PALETTE[1:], strict=True)
    ]
    place = dict(loc='outside lower center', ncols=legend_columns, fontsize=11)
    figure.legend(handles=patches, frameon=False, **place)
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=130, format='png')
    # photos are large as PNG; 256 colours show no difference at this size
    Image.open(buffer).convert('RGB').quantize(256).save(path, optimize=True)


def _painted(image: np.ndarray, regions: list[Region]) -> np.ndarray:
    """The image with its regions in the colours of their classes, grey elsewhere."""
    grey = image.mean(axis=-1, keepdims=True).repeat(3, axis=-1)
    painted = 0.5 * grey + 0.5 * image
    for region in regions:
        color = np.array(PALETTE[region.label])
        painted[region.mask] = 0.45 * image[region.mask] + 0.55 * color
    return painted.astype(np.uint8)
