"""The demo's picture: what is drawn, in which colour, and what is not."""

import json
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from overlock_mm.apis import demo
from overlock_mm.apis.demo import Region, Scene
from overlock_mm.datasets.demo import CLASSES, PALETTE


@pytest.fixture
def data(demo_data):
    return demo_data / 'data/demo'


def label_maps(data):
    paths = sorted((data / 'annotations/validation').glob('*.png'))
    return [np.array(Image.open(path)) for path in paths]


def covered(regions, shape):
    """The label map that regions without overlap make."""
    labels = np.zeros(shape, int)
    for region in regions:
        assert not labels[region.mask].any()
        labels[region.mask] = region.label
    return labels


def test_segmentation_scenes(data, tmp_path):
    maps = label_maps(data)
    for i, labels in enumerate(maps):
        Image.fromarray(labels[::-1]).save(tmp_path / f'scene_{i:04}.png')
    scenes = demo.segmentation_scenes(data, tmp_path)
    assert len(scenes) == len(maps) == 2
    for i, (scene, labels) in enumerate(zip(scenes, maps, strict=True)):
        image = Image.open(data / f'images/validation/scene_{i:04}.png')
        assert np.array_equal(scene.image, np.array(image))
        assert np.array_equal(covered(scene.truth, labels.shape), labels)
        assert np.array_equal(covered(scene.predicted, labels.shape), labels[::-1])


def test_detection_scenes(data, tmp_path):
    """The ground truth given as prediction: the same again, but for the low scores."""
    coco = json.loads((data / 'annotations/instances_validation.json').read_text())
    samples, kept = [], []
    for image in coco['images']:
        found = [a for a in coco['annotations'] if a['image_id'] == image['id']]
        boxes = [[x, y, x + w, y + h] for x, y, w, h in (a['bbox'] for a in found)]
        instances = dict(
            labels=torch.tensor([a['category_id'] - 1 for a in found]),
            masks=[a['segmentation'] for a in found],
            bboxes=torch.tensor(boxes),
            scores=torch.tensor([0.4] + [0.2] * (len(found) - 1)),
        )
        samples.insert(0, dict(img_id=image['id'], pred_instances=instances))
        kept.append((found[0]['category_id'], boxes[0]))
    (tmp_path / 'out.pkl').write_bytes(pickle.dumps(samples))
    scenes = demo.detection_scenes(data, tmp_path / 'out.pkl', min_score=0.3)
    for scene, labels, (label, box) in zip(scenes, label_maps(data), kept, strict=True):
        assert np.array_equal(covered(scene.truth, labels.shape), labels)
        (region,) = scene.predicted
        (truth,) = (r for r in scene.truth if np.array_equal(r.mask, region.mask))
        assert (region.label, truth.label) == (label, label)
        assert region.box == truth.box == tuple(box)


def near(pixels, color, tolerance=12):
    return (np.abs(pixels.astype(int) - color) <= tolerance).all(axis=-1)


def test_picture(tmp_path):
    """Columns of ground truth and prediction, and a legend with every class but one."""
    mask = np.zeros((100, 100), bool)
    mask[30:70, 30:70] = True
    label = CLASSES.index('person')
    black = np.zeros((100, 100, 3), np.uint8)
    region = Region(label, mask, (20, 20, 110, 80))
    path = tmp_path / 'out.png'
    demo.draw_scenes([Scene(black, [region], [])], path, pairs_per_row=1)
    picture = np.array(Image.open(path).convert('RGB'))
    height, width = picture.shape[:2]
    assert width > 600 and path.stat().st_size < 2**20

    # from the last row that has black from one of the pictures
    dark = near(picture, (0, 0, 0), 0).sum(axis=1) > 0.5 * width
    bottom = np.flatnonzero(dark)[-1] + 1
    legend = picture[bottom:]
    for color in PALETTE[1:]:
        assert near(legend, color).sum() > 200, color
    assert near(legend, PALETTE[0], 3).sum() < 200  # the background is no class
    # the legend is not cut: white at the edges
    assert (picture[-1] == 255).all() and (legend[:, [0, -1]] == 255).all()

    left, right = picture[:bottom, : width // 2], picture[:bottom, width // 2 :]
    painted = np.multiply(PALETTE[label], 0.55)
    assert near(left, painted).sum() > 0.1 * left[..., 0].size
    assert not near(right, painted).any()
    # outline and box
    assert near(left, PALETTE[label]).any() and not near(right, PALETTE[label]).any()
    # the pictures are of one size, though a box reaches beyond one
    row = bottom - 5
    spans = [np.ptp(np.flatnonzero(near(half[row], (0, 0, 0)))) for half in (left, right)]
    assert abs(spans[0] - spans[1]) <= 2


def test_an_image_keeps_its_brightness_where_nothing_is():
    image = np.full((4, 4, 3), 90, np.uint8)
    mask = np.zeros((4, 4), bool)
    mask[0] = True
    painted = demo._painted(image, [Region(3, mask)])
    assert (painted[1:] == 90).all()
    expected = 0.45 * 90 + 0.55 * np.array(PALETTE[3])
    assert np.abs(painted[0] - expected).max() <= 1


def test_background_miou(data):
    maps = label_maps(data)
    shares = np.mean([(labels == 0).mean() for labels in maps])
    classes = len(np.unique(maps))
    assert demo.background_miou(data) == pytest.approx(shares / classes)


def test_work_dir_of_another_config(data, tmp_path):
    config, work_dir = tmp_path / 'config.py', tmp_path / 'work'
    config.write_text('a = 1')
    assert demo.prepare_work_dir(config, data, work_dir) is False
    (work_dir / 'epoch_1.pth').touch()
    assert demo.prepare_work_dir(config, data, work_dir) is False
    assert (work_dir / 'epoch_1.pth').exists()
    config.write_text('a = 2')
    assert demo.prepare_work_dir(config, data, work_dir) is True
    assert not (work_dir / 'epoch_1.pth').exists()


def test_log_of_an_interrupted_run(tmp_path):
    for run, records in (
        ('1', [dict(loss=4.0, iter=1, step=1), dict(loss=3.0, iter=2, step=2)]),
        ('2', [dict(loss=2.0, iter=2, step=2), dict(loss=1.0, iter=3, step=3)]),
        ('3', [dict(mIoU=50.0, step=3)]),
    ):
        folder = tmp_path / run / 'vis_data'
        folder.mkdir(parents=True)
        (folder / 'scalars.json').write_text('\n'.join(map(json.dumps, records)))
    assert demo.losses_of(tmp_path) == {'loss': (4.0, 1.0)}
    assert [r['step'] for r in demo.training_log(tmp_path)] == [3, 1, 2, 3]
    Image.open(demo.plot_curve(tmp_path)).verify()
