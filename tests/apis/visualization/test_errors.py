"""Errors of segmentors against IoUMetric; of detectors, where each kind is planted once."""

import json
import pickle
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.structures import PixelData
from mmseg.evaluation import IoUMetric
from mmseg.structures import SegDataSample
from PIL import Image
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from overlock_mm.apis.test import test as evaluate
from overlock_mm.apis.visualization import errors as module
from overlock_mm.apis.visualization.errors import errors
from overlock_mm.apis.visualization.tide import KINDS, Objects, find_errors
from overlock_mm.errors import UserError


@pytest.fixture(autouse=True)
def cwd(demo_data, monkeypatch):
    monkeypatch.chdir(demo_data)


# Segmentors


def test_a_segmentor(configs, weights, tmp_path):
    """From label maps and from a checkpoint, the metrics of the test."""
    config, checkpoint = configs / 'segmentor.py', weights('segmentor')
    maps, out = tmp_path / 'maps', tmp_path / 'e.svg'
    expected = evaluate(config, checkpoint, work_dir=str(tmp_path), out=str(maps))
    text = errors(config, maps, out, json_path=tmp_path / 'maps.json')
    errors(config, checkpoint, tmp_path / 'e.png', json_path=tmp_path / 'checkpoint.json')
    numbers = json.loads((tmp_path / 'maps.json').read_text())
    assert numbers == json.loads((tmp_path / 'checkpoint.json').read_text())
    for name, value in expected.items():
        assert numbers[name] == pytest.approx(value, abs=0.0051)  # it is rounded
    true, found = (
        np.concatenate([np.array(Image.open(p)).ravel() for p in sorted(folder.iterdir())])
        for folder in (Path('data/demo/annotations/validation'), maps)
    )
    for i, row in enumerate(numbers['matrix']):
        assert row == [int(((true == i) & (found == j)).sum()) for j in range(10)]
    assert f'mIoU {numbers["mIoU"]:.2f}' in text
    drawn = out.read_text()
    assert f'mIoU {numbers["mIoU"]:.2f}' in drawn and 'mouse_traps' in drawn


@pytest.mark.parametrize('reduced', [False, True], ids=['plain', 'reduce_zero_label'])
def test_the_numbers_are_those_of_the_metric(tmp_path, reduced):
    """Random maps of 5 classes, with ignored pixels and a class that is not there."""
    generator = torch.Generator().manual_seed(0)
    classes = ('a', 'b', 'c', 'd', 'e')
    metric = IoUMetric(ignore_index=7)
    metric.dataset_meta = dict(classes=classes)
    samples = []
    for i in range(3):
        true, found = torch.randint(0, 4, (2, 1, 20 + i, 30), generator=generator)
        true[:, :3] = 7
        Image.fromarray((found[0].numpy() + reduced).astype(np.uint8)).save(
            tmp_path / f'{i}.png'
        )
        sample = SegDataSample(metainfo=dict(reduce_zero_label=reduced))
        sample.gt_sem_seg = PixelData(data=true)
        samples.append(sample)
        prediction = dict(pred_sem_seg=dict(data=found), gt_sem_seg=dict(data=true))
        metric.process({}, [prediction])
    areas = [sum(area) for area in zip(*metric.results, strict=True)]
    expected = metric.total_area_to_metrics(*areas)

    class DataSet(list):
        def get_data_info(self, i):
            return dict(img_path=f'{i}.jpg')

    dataset = DataSet(dict(data_samples=sample) for sample in samples)
    cfg = Config(dict(test_evaluator=[dict(type='IoUMetric', ignore_index=7)]))
    matrix = module._confusion(cfg, dataset, len(classes), tmp_path)
    scores = module._scores(matrix)
    np.testing.assert_allclose(scores['IoU'], 100 * expected['IoU'], rtol=1e-6)
    np.testing.assert_allclose(scores['Acc'], 100 * expected['Acc'], rtol=1e-6)
    assert scores['aAcc'] == pytest.approx(100 * float(expected['aAcc']))
    assert scores['mIoU'] == pytest.approx(100 * np.nanmean(expected['IoU']))
    assert np.isnan(scores['IoU'][4]) and 0 < scores['IoU'][0] < 100
    # a picture of it says so, too, and numbers in the cells are shares of rows
    figure = module._draw_matrix(scores, list(classes))
    heat, bars, _ = figure.axes
    cells = {t.get_position(): t.get_text() for t in heat.texts}
    assert cells[(1, 0)] == f'{100 * matrix[0, 1] / matrix[0].sum():.0f}'
    assert [t.get_text() for t in bars.texts][4] == 'not there'


@pytest.mark.parametrize('count', [2, 20, 150])
def test_readable_for_any_number_of_classes(count):
    """Names do not overlap, and a small share does not look like zero."""
    matrix = np.eye(count, dtype=int) * 96
    matrix[0, 1] = 4
    names = [f'a class {i}' for i in range(count)]
    with module.figures.styled():
        figure = module._draw_matrix(module._scores(matrix), names)
        figure.draw_without_rendering()
    heat = figure.axes[0]
    boxes = [t.get_window_extent() for t in heat.get_yticklabels()]
    assert len(boxes) == count
    assert all(a.y0 >= b.y1 - 0.5 for a, b in zip(boxes, boxes[1:], strict=False))
    assert len(heat.texts) == (count + 1 if count <= 20 else 0)
    colours = heat.images[0].to_rgba(heat.images[0].get_array())
    small, nothing = colours[0, 1, :3], colours[1, 0, :3]
    assert np.abs(small - nothing).max() > 0.1


def break_map(folder, kind):
    path = folder / 'scene_0000.png'
    labels = np.array(Image.open(path))
    if kind == 'missing':
        path.unlink()
    elif kind == 'size':
        Image.fromarray(labels[:-1]).save(path)
    elif kind == 'class':
        Image.fromarray(labels + 100).save(path)
    elif kind == 'colour':
        Image.fromarray(np.stack([labels] * 3, -1)).save(path)
    else:
        path.write_text('no picture')


@pytest.mark.parametrize(
    'kind, message',
    [
        ('missing', '1 of 2 label maps are not there.*scene_0000.png; write them with'),
        ('size', 'scene_0000.png has 96x95 pixels, and the labels of its image have 96x96'),
        (
            'class',
            'scene_0000.png have the class 10., and the config has the classes 0 to 9',
        ),
        ('colour', 'scene_0000.png is a picture in colour'),
        ('text', 'scene_0000.png is not a picture that can be read'),
    ],
)
def test_label_maps_that_do_not_fit(configs, demo_data, tmp_path, kind, message):
    for path in (demo_data / 'data/demo/annotations/validation').iterdir():
        (tmp_path / path.name).write_bytes(path.read_bytes())
    config, out = configs / 'segmentor.py', tmp_path / 'e.png'
    if kind == 'missing':
        assert 'mIoU 100.00' in errors(config, tmp_path, out)  # the labels themselves
    break_map(tmp_path, kind)
    with pytest.raises(UserError, match=message):
        errors(config, tmp_path, out)


# Detectors

A, B = 0, 1
BOX, HALF, OTHER = [0, 0, 10, 10], [0, 0, 10, 4], [50, 50, 10, 10]  # x, y, width, height
# Of each image, the classes of its objects, all at BOX, and what was detected.
PLANTED = [
    ([A], [(A, BOX, 0.90)]),
    ([A], [(B, BOX, 0.80)]),  # wrong class
    ([A], [(A, HALF, 0.70)]),  # IoU 0.4
    ([A], [(A, BOX, 0.45), (B, HALF, 0.60)]),  # both wrong
    ([A], [(A, BOX, 0.95), (A, BOX, 0.50)]),  # the second one is a duplicate
    ([], [(A, OTHER, 0.48)]),  # background
    ([B], [(B, BOX, 0.30)]),
    ([B], []),  # missed
]
# AP of A: 41 recalls of 101 have precision 1, 20 have 1/2; of B: 51 have 1/3.
AP = (51 + 17) / 202
# The sums of both precisions over 101 recalls, with one kind fixed, less those of now.
GAINS = dict(
    classification=61 + 20 * 4 / 7 + 51 / 2 - 68,  # a right A above three errors
    localisation=61 + 20 * 4 / 6 + 17 - 68,
    both=51 + 51 / 2 - 68,
    duplicate=41 + 20 * 3 / 5 + 17 - 68,
    background=41 + 20 * 3 / 5 + 17 - 68,
    missed=51 + 101 / 3 - 68,
)
WITHOUT_WRONG, WITHOUT_UNDETECTED = 61 + 51 - 68, 67 + 34 / 2 + 101 / 3 - 68


def polygon(x, y, width, height):
    return [[x, y, x + width, y, x + width, y + height, x, y + height]]


@pytest.fixture(scope='module')
def planted(tmp_path_factory, configs):
    """The config's options for the planted data, and its detections in both formats."""
    folder = tmp_path_factory.mktemp('planted')
    images = [
        dict(id=i, file_name=f'{i}.png', width=100, height=100) for i in range(len(PLANTED))
    ]
    annotations = [
        dict(image_id=i, category_id=10 * (label + 1), bbox=BOX, area=100, iscrowd=0)
        | dict(segmentation=polygon(*BOX))
        for i, (labels, _) in enumerate(PLANTED)
        for label in labels
    ]
    annotations = [dict(a, id=i) for i, a in enumerate(annotations, 1)]
    categories = [dict(id=10, name='first'), dict(id=20, name='second')]
    content = dict(images=images, annotations=annotations, categories=categories)
    (folder / 'truth.json').write_text(json.dumps(content))
    found = [
        dict(image_id=i, category_id=10 * (label + 1), bbox=box, score=score)
        for i, (_, detections) in enumerate(PLANTED)
        for label, box, score in detections
    ]
    (folder / 'found.json').write_text(json.dumps(found))
    samples = []
    for i, (_, detections) in enumerate(PLANTED):
        labels, boxes, scores = zip(*detections, strict=True) if detections else ([],) * 3
        corners = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        masks = np.zeros((100, 100, len(boxes)), np.uint8, 'F')
        for n, (x, y, w, h) in enumerate(boxes):
            masks[y : y + h, x : x + w, n] = 1
        if i == 0:
            masks[5:] = 0  # the box is right, 0.5 of the mask is not found
            masks[4] = 0
        instances = dict(
            bboxes=corners,
            labels=torch.tensor(labels, dtype=torch.int64),
            scores=torch.tensor(scores, dtype=torch.float32),
            masks=coco_mask.encode(masks),
        )
        samples.append(dict(img_id=i, pred_instances=instances))
    (folder / 'found.pkl').write_bytes(pickle.dumps(samples))
    dataset = 'test_dataloader.dataset'
    options = {
        f'{dataset}.data_root': str(folder),
        f'{dataset}.ann_file': 'truth.json',
        f'{dataset}.data_prefix.img': '',
        f'{dataset}.metainfo': dict(classes=('first', 'second')),
    }
    return SimpleNamespace(
        folder=folder, config=configs / 'detector.py', options=options, samples=samples
    )


def found_in(planted, name, tmp_path, **options):
    out, numbers = tmp_path / 'e.svg', tmp_path / 'e.json'
    options = dict(cfg_options=planted.options, json_path=numbers, **options)
    text = errors(planted.config, planted.folder / name, out, **options)
    return json.loads(numbers.read_text()), text, out.read_text()


@pytest.mark.parametrize('name', ['found.json', 'found.pkl'])
def test_each_kind_of_error_is_found(planted, tmp_path, name):
    numbers, text, drawn = found_in(planted, name, tmp_path)
    assert numbers['numbers'] == dict.fromkeys(KINDS, 1)
    assert numbers['AP50'] == pytest.approx(AP)
    expected = {kind: pytest.approx(gain / 202) for kind, gain in GAINS.items()}
    assert numbers['gains'] == expected
    assert numbers['gain_without_false_positives'] == pytest.approx(WITHOUT_WRONG / 202)
    assert numbers['gain_without_false_negatives'] == pytest.approx(
        WITHOUT_UNDETECTED / 202
    )
    first, second = numbers['classes'].values()
    counts = dict.fromkeys(KINDS, 0)
    of_a = counts | dict(localisation=1, duplicate=1, background=1, objects=5, right=3)
    of_b = counts | dict(classification=1, both=1, missed=1, objects=2, right=1)
    assert first == of_a | dict(AP50=pytest.approx(51 / 101))
    assert second == of_b | dict(AP50=pytest.approx(17 / 101))
    assert f'box AP50 {AP:.4f}' in text and 'second' in drawn
    for kind, gain in GAINS.items():
        assert f'{gain / 202:.4f}' in text and f' {gain / 202:.3f}<' in drawn, kind


def test_masks(planted, tmp_path):
    """A box that is right around a mask that is not."""
    numbers, text, _ = found_in(planted, 'found.pkl', tmp_path, masks=True)
    assert numbers['compared'] == 'mask' and 'mask AP50' in text
    assert numbers['numbers'] == dict.fromkeys(KINDS, 1) | dict(localisation=2)


def test_average_precision_is_that_of_pycocotools(capsys):
    """On random boxes, with crowds, classes without objects, and images without any."""
    rng = np.random.default_rng(0)
    objects, detections, annotations, results = [], [], [], []
    for image in range(40):
        count = rng.integers(0, 5)
        boxes = np.c_[rng.uniform(0, 60, (count, 2)), rng.uniform(10, 40, (count, 2))]
        labels, crowd = rng.integers(0, 3, count), rng.random(count) < 0.2
        found = np.concatenate([boxes.repeat(3, 0), [[1.0, 1, 20, 20]]])
        found += rng.normal(0, 5, found.shape)
        found[:, 2:] = found[:, 2:].clip(2)
        classes = np.append(labels.repeat(3), 0)
        wrong = rng.random(len(classes)) < 0.3
        classes[wrong] = rng.integers(0, 4, wrong.sum())
        scores = rng.random(len(found)).round(2)  # some are equal
        objects.append(Objects(labels, boxes, crowd))
        detections.append(Objects(classes, found, scores))
        for box, label, is_crowd in zip(boxes.tolist(), labels, crowd, strict=True):
            area = box[2] * box[3]
            annotation = dict(id=len(annotations) + 1, image_id=image, bbox=box, area=area)
            annotation |= dict(category_id=int(label), iscrowd=int(is_crowd))
            annotations.append(annotation)
        for box, label, score in zip(found.tolist(), classes, scores, strict=True):
            result = dict(image_id=image, category_id=int(label), bbox=box)
            results.append(result | dict(score=float(score)))
    coco = COCO()
    categories = [dict(id=i) for i in range(4)]
    images = [dict(id=i) for i in range(40)]
    coco.dataset = dict(images=images, annotations=annotations, categories=categories)
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(results), 'bbox')
    evaluation.evaluate()
    evaluation.accumulate()
    evaluation.summarize()
    capsys.readouterr()
    result = find_errors(objects, detections, 4)
    assert result.ap == pytest.approx(evaluation.stats[1]) and 0.1 < result.ap < 0.9
    assert np.isnan(result.class_aps[3])
    # every detection is right, ignored or one kind of error
    total = sum(len(d.labels) for d in detections)
    assert 0 < total - result.right.sum() - result.counts[:, :-1].sum() < 0.2 * total
    assert (
        result.right.sum()
        <= result.objects.sum()
        == len(annotations) - sum(a['iscrowd'] for a in annotations)
    )


def test_a_fix_counts_once_for_an_object():
    """Of two detections that could become right, that with the higher score does."""
    objects = [Objects(np.array([A]), np.array([BOX], float), np.array([False]))]
    labels, shapes = np.array([A, B, A]), np.array([HALF, BOX, HALF], float)
    found = [Objects(labels, shapes, np.array([0.9, 0.8, 0.7]))]
    result = find_errors(objects, found, 2)
    assert result.counts.sum(0).tolist() == [1, 2, 0, 0, 0, 0]
    assert result.ap == 0 and result.gains['localisation'] == pytest.approx(1)
    # its object is that of the first one, also where that is not fixed
    assert result.gains['classification'] == 0 and result.gains['missed'] == 0


def test_a_detector(configs, weights, tmp_path):
    """What a test saves, with the AP of that test."""
    found, numbers = tmp_path / 'found.pkl', tmp_path / 'e.json'
    config = configs / 'detector.py'
    metrics = evaluate(config, weights('detector'), work_dir=str(tmp_path), out=str(found))
    errors(config, found, tmp_path / 'e.png', json_path=numbers)
    result = json.loads(numbers.read_text())
    assert result['AP50'] == pytest.approx(metrics['coco/bbox_mAP_50'], abs=0.00051)
    boxes = sum(
        len(s['pred_instances']['labels']) for s in pickle.loads(found.read_bytes())
    )
    wrong = sum(result['numbers'].values()) - result['numbers']['missed']
    right = sum(c['right'] for c in result['classes'].values())
    assert wrong + right == boxes > 0  # there are no crowds


class Planted:
    """What runs when it is unpickled."""

    def __reduce__(self):
        return open, ('ran', 'w')


class InsideTensor:
    """The same in the place of a tensor's values."""

    def __reduce__(self):
        return torch.storage._load_from_bytes, (pickle.dumps(Planted()),)


def spoilt(planted, kind):
    sample = planted.samples[0]
    instances = sample['pred_instances']
    other = dict(instances, labels=instances['labels'] + 5)
    return dict(
        code=[Planted()],
        inside=[InsideTensor()],
        keys=[dict(sample, pred_instances={})],
        number=3,
        images=[dict(sample, img_id=99)],
        few=[sample],
        labels=[*planted.samples[1:], dict(sample, pred_instances=other)],
    )[kind]


@pytest.mark.parametrize(
    'kind, message',
    [
        ('code', 'holds .*open, which is not read; write it with'),
        ('inside', 'holds .*open, which is not read; write it with'),
        ('keys', 'has no bboxes; write it with `overlock test --out FILE.pkl`'),
        ('number', 'does not hold detections .*not iterable'),
        ('images', 'has detections of 1 images that the test data do not have.* 99'),
        ('few', 'has no detections of 7 of the 8 images, for instance 1; write it'),
        ('labels', 'has the class 5, and the config has the classes 0 to 1'),
    ],
)
def test_files_that_do_not_fit(planted, tmp_path, monkeypatch, kind, message):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / 'spoilt.pkl'
    path.write_bytes(pickle.dumps(spoilt(planted, kind)))
    options = {**planted.options, 'test_evaluator': None}
    with pytest.raises(UserError, match=message):
        errors(planted.config, path, tmp_path / 'e.png', cfg_options=options)
    assert not (tmp_path / 'ran').exists()


def test_predictions_of_the_other_kind(configs, demo_data, tmp_path, draw):
    """As plain messages of the command."""
    (tmp_path / 'data').symlink_to(demo_data / 'data')
    (tmp_path / 'note.pkl').write_text('a note')
    (tmp_path / 'note.json').write_text('{"a": 1}')
    segmentor, detector = (configs / f'{name}.py' for name in ('segmentor', 'detector'))
    for arguments, message in (
        ([segmentor, 'none'], 'predictions none does not exist'),
        ([segmentor, 'note.pkl'], 'note.pkl is for detectors, and the config is a segm'),
        ([segmentor, '.', '--masks'], '--masks is for detectors'),
        ([detector, '.'], '. is a folder, and the config is a detector'),
        ([detector, 'note.pkl'], 'note.pkl does not hold detections'),
        ([detector, 'note.json'], 'note.json is not a list of detections'),
    ):
        assert message in draw('errors', *arguments, '--out', 'e.png', status=2)
