"""The look at a data set: what it finds in tidy and in messy folders."""

import json
import os

import cv2
import numpy as np
import pytest
import tifffile
from PIL import Image

from overlock_mm.datasets.survey.classes import make_palette, read_classes
from overlock_mm.datasets.survey.coco import survey_detection
from overlock_mm.datasets.survey.images import Layout, look_at_image, mean_and_std, split
from overlock_mm.datasets.survey.label_maps import survey_segmentation
from overlock_mm.errors import UserError

SIZE = (40, 48)  # height and width


def save(path, array, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == '.tif':
        tifffile.imwrite(path, array, **options)
    elif array.dtype == np.uint16:
        cv2.imwrite(str(path), array)
    else:
        Image.fromarray(array).save(path, **options)


def photo(size=SIZE, channels=3, dtype=np.uint8, seed=0):
    high = np.iinfo(dtype).max
    shape = (*size, channels) if channels > 1 else size
    return np.random.default_rng(seed).integers(0, high, shape, dtype)


def labels(*values, size=SIZE):
    """A label map that has all of the values."""
    found = np.full(size, values[0], np.uint8)
    for i, value in enumerate(values[1:], 1):
        found[4 * i : 4 * i + 4] = value
    return found


@pytest.fixture
def data(tmp_path):
    """Three images with label maps of the classes 0, 1 and 2."""
    for i in range(3):
        save(tmp_path / f'images/{i}.png', photo(seed=i))
        save(tmp_path / f'masks/{i}.png', labels(0, 1, 2))
    return tmp_path


def look(folder, **options):
    return survey_segmentation([(folder / 'images', folder / 'masks')], **options)


def problems(folder, **options):
    """What is wrong, a text each, with what --fix does."""
    _, found = look(folder, **options)
    return [f'{p.text} | {p.fix}' for p in found.problems]


def test_a_tidy_folder(data):
    found, findings = look(data)
    assert not findings.problems and not findings.warnings
    assert found.classes.names == ['class_0', 'class_1', 'class_2']
    assert found.classes.values == [0, 1, 2] and found.size == (48, 40)
    assert found.loading['layout'] == Layout() and len(found.sets[0].pairs) == 3
    facts = findings.report(fix=False)
    assert '3 with label maps' in facts and '48x40 (median)' in facts
    assert 'class_2 (2): 10.00% of the pixels, 3 images' in facts


@pytest.mark.parametrize(
    'values, options, text, names, kept',
    [
        # an object as 255, which is usually ignored
        ((0, 255), {}, 'values 0, 255 are not 0 to 1', ['class_0', 'class_255'], [0, 255]),
        ((0, 50, 100), {}, 'values 0, 50, 100 are not 0 to 2', None, [0, 50, 100]),
        ((1, 2), {}, 'values 1, 2 are not 0 to 1', None, [1, 2]),
        (
            (0, 1, 7, 9),
            dict(classes=[('a', None), ('b', None)]),
            '7, 9 of no class (7 is in',
            ['a', 'b'],
            [0, 1],
        ),
        # as many values as names
        (
            (3, 5),
            dict(classes=[('a', None), ('b', None)]),
            '3, 5 are not those of the 2 classes, 0, 1',
            None,
            [3, 5],
        ),
        (
            (0, 1, 7),
            dict(classes=[('a', 0), ('b', 1)]),
            'label value 7 of no class',
            ['a', 'b'],
            [0, 1],
        ),
    ],
)
def test_label_values(data, values, options, text, names, kept):
    save(data / 'masks/1.png', labels(*values))
    for i in (0, 2):
        save(data / f'masks/{i}.png', labels(*values[:2]))
    (problem,) = problems(data, **options)
    assert text in problem and 'masks/' in problem and not problem.endswith('| ')
    found, _ = look(data, fix=True, **options)
    assert found.classes.values == kept
    assert found.classes.names == (names or found.classes.names)


@pytest.mark.parametrize(
    'values, options, names, kept',
    [
        ((0, 1, 255), {}, ['class_0', 'class_1'], [0, 1]),
        ((0, 1, 2), dict(ignore=(0,)), None, [1, 2]),
        ((0, 1), dict(classes=[('a', None), ('b', None), ('c', None)]), None, [0, 1, 2]),
        ((0, 1, 2), dict(ignore=(0,), classes=[('a', None), ('b', None)]), None, [1, 2]),
        ((7, 30), dict(classes=[('a', 30), ('b', 7)]), ['a', 'b'], [30, 7]),
    ],
)
def test_label_values_that_are_right(data, values, options, names, kept):
    for i in range(3):
        save(data / f'masks/{i}.png', labels(*values))
    found, findings = look(data, fix=(0 in options.get('ignore', ())), **options)
    assert [p for p in findings.problems if not p.fix] == []
    assert found.classes.values == kept
    assert found.classes.names == (names or found.classes.names)


def test_colours(data):
    colors = np.array([(0, 0, 0), (128, 64, 128), (0, 0, 142)], np.uint8)
    for i in range(3):
        save(data / f'masks/{i}.png', colors[labels(0, 1, 2)])
    (problem,) = problems(data)
    assert 'colours (0, 0, 0), (0, 0, 142), (128, 64, 128) are not 0 to 2' in problem
    found, _ = look(data, fix=True)
    assert found.classes.names == ['color_000000', 'color_00008e', 'color_804080']
    assert found.classes.palette == found.classes.values
    (problem,) = problems(data, classes=[('a', None), ('b', None), ('c', None)], fix=True)
    assert 'and the classes have none | ' in problem
    given = [('void', (0, 0, 0)), ('road', (128, 64, 128)), ('car', (0, 0, 142))]
    found, findings = look(data, classes=given)
    assert not findings.problems and found.classes.names == ['void', 'road', 'car']
    save(data / 'masks/1.png', labels(0, 1, 2))
    assert 'some label maps hold colours' in problems(data)[0]
    save(data / 'masks/1.png', photo())
    assert '1.png has 1920 colours' in problems(data)[0]


def test_a_palette_of_the_files_is_kept(data):
    for i in range(3):
        image = Image.fromarray(labels(0, 1, 2)).convert('P')
        image.putpalette([0, 0, 0, 10, 20, 30, 40, 50, 60])
        image.save(data / f'masks/{i}.png')
    found, _ = look(data)
    assert found.classes.palette == [(0, 0, 0), (10, 20, 30), (40, 50, 60)]
    assert len(set(make_palette(100))) == 100


def test_files_that_cannot_be_used(data):
    (data / 'images/0.png').write_bytes((data / 'images/0.png').read_bytes()[:900])
    save(data / 'images/1.png', photo((30, 48)))
    (data / 'masks/2.png').write_text('no image')
    save(data / 'images/3.png', photo())
    save(data / 'masks/4.png', labels(0, 1))
    save(data / 'images/._5.png', photo())
    save(data / 'images/6.png', photo())
    cv2.imwrite(str(data / 'masks/6.png'), labels(0, 1).astype(np.uint16) * 300)
    (data / 'images/notes.txt').touch()
    texts = problems(data)
    assert [text.partition(',')[0] for text in texts] == [
        'images without a label map: 1',
        'label maps that cannot be used: 2',
        'images that cannot be read: 1 of 4',
        'images of another size than their labels: 1',
    ]
    for text, words in zip(texts, ('3.png', '2.png', '0.png', '48x30'), strict=True):
        assert words in text and '| leave them' in text
    _, findings = look(data)
    assert any('label maps without an image: 1' in w for w in findings.warnings)
    assert any('1 of .txt' in w for w in findings.warnings)
    found, findings = look(data, fix=True)
    assert not found.sets[0].pairs
    with pytest.raises(UserError, match='no image in .* is left'):
        findings.raise_problems(fix=True)


@pytest.mark.parametrize(
    'values, options, text',
    [
        # what was meant is that 255 is the object
        (
            (0, 255),
            dict(classes=[('a', None), ('b', None)]),
            '0, 255 are not those of the 2',
        ),
        ((0, 255), dict(classes=[('a', None)]), 'a is the only class'),
        (
            (0, 7),
            dict(classes=[('a', 0), ('b', 7)], ignore=(7,)),
            '7 is the value of a class',
        ),
        (tuple(range(120)), {}, 'label maps hold 40 values, as photos do'),
        ((9, 9), dict(classes=[('a', (0, 0, 0)), ('b', (9, 9, 9))]), '9 of no class'),
    ],
)
def test_classes_that_cannot_be(data, values, options, text, monkeypatch):
    monkeypatch.setattr('overlock_mm.datasets.survey.classes._MOST_UNNAMED', 30)
    for i in range(3):
        labels_of = np.arange(40, dtype=np.uint8) if len(values) > 100 else None
        array = labels(*values) if labels_of is None else np.tile(labels_of[:, None], 48)
        save(data / f'masks/{i}.png', array)
    (problem,) = problems(data, **options)
    assert text in problem
    if values == (9, 9):
        assert problem.endswith('| ')  # to ignore all pixels is no way out


def test_ignored_values_do_not_stay(data):
    for i in range(3):
        save(data / f'masks/{i}.png', labels(0, 1, 3))
    found, _ = look(data, ignore=(3,))
    assert found.classes.values == [0, 1] and not found.classes.are_indices


def test_palettes_that_differ(data):
    for i in range(3):
        image = Image.fromarray(labels(0, 1, 2)).convert('P')
        image.putpalette([0, 0, 0, 10, 20, 30 + i, 40, 50, 60])
        image.save(data / f'masks/{i}.png')
    (problem,) = problems(data)
    assert '1 is (10, 20, 31) in' in problem and 'whatever their colours' in problem


def test_odd_files(data):
    """Hidden folders are left out, links are followed, names must be usable."""
    save(data / 'images/.cache/0.png', photo())
    save(data / 'elsewhere/a.png', photo())
    save(data / 'masks/more/a.png', labels(0, 1))
    (data / 'images/more').symlink_to(data / 'elsewhere')
    found, findings = look(data)
    names = [pair.name for pair in found.sets[0].pairs]
    assert names == ['0', '1', '2', 'more/a'] and not findings.problems
    save(data / 'images/b .png', photo())
    save(data / 'masks/b .png', labels(0, 1))
    assert 'begin or end with a space' in problems(data)[0]
    (data / 'images' / os.fsdecode(b'\xff.png')).touch()
    with pytest.raises(UserError, match='is not in UTF-8; rename'):
        look(data)


def test_several_kinds_of_label_maps(tmp_path):
    for kind in ('_ids', '_color'):
        save(tmp_path / f'masks/a{kind}.png', labels(0, 1))
    save(tmp_path / 'images/a.png', photo())
    with pytest.raises(UserError, match='could be those that end in _.*--mask-suffix _'):
        look(tmp_path)
    assert look(tmp_path, mask_suffix='_ids.png')[0].sets[0].pairs


def test_lossy_label_maps(data):
    for i in range(3):
        Image.fromarray(labels(0, 1, 2)).save(data / f'masks/{i}.jpg')
        (data / f'masks/{i}.png').unlink()
    assert any('compressed with losses' in p and 'wrong: 3' in p for p in problems(data))


def test_truncated_jpeg(tmp_path):
    path = tmp_path / 'a.jpg'
    Image.fromarray(photo((300, 400))).save(path)
    assert not look_at_image(path).error
    path.write_bytes(path.read_bytes()[:-3000])
    assert 'truncated' in look_at_image(path).error


@pytest.mark.parametrize('kind', ['one folder', 'suffixes', 'other case', 'two images'])
def test_pairs(tmp_path, kind):
    images, masks, options = tmp_path / 'images', tmp_path / 'masks', {}
    if kind == 'one folder':
        masks, options = images, dict(image_suffix='.png', mask_suffix='_mask.png')
    name = dict(suffixes='a_gtFine.png').get(kind, 'a.png')
    if kind == 'one folder':
        name = 'a_mask.png'
    save(images / ('sub/a.JPG' if kind != 'one folder' else 'sub/a.png'), photo())
    save(masks / f'sub/{name}', labels(0, 1))
    if kind == 'other case':
        save(images / 'sub/A.png', photo())
        save(masks / 'sub/A.png', labels(0, 1))
    if kind == 'two images':
        save(images / 'sub/a.png', photo())
    found, findings = survey_segmentation([(images, masks)], **options)
    pairs = found.sets[0].pairs
    if kind == 'two images':
        assert not pairs and 'a.JPG' in findings.problems[0].text
        return
    assert not findings.problems and {p.name.lower() for p in pairs} == {'sub/a'}
    if kind == 'suffixes':
        assert pairs[0].suffixes == ('.JPG', '_gtFine.png')
    if kind == 'other case':
        assert 'upper and lower case' in findings.warnings[0] and len(pairs) == 2
    if kind == 'one folder':
        with pytest.raises(UserError, match='both in .*--image-suffix .jpg'):
            survey_segmentation([(images, masks)])


def test_no_pairs(data):
    with pytest.raises(UserError, match='is not a folder'):
        look(data / 'none')
    with pytest.raises(UserError, match='no label map in .*--mask-suffix'):
        look(data, mask_suffix='_x.png')
    for path in (data / 'masks').iterdir():
        path.rename(path.with_suffix('.npy'))
    with pytest.raises(UserError, match='masks has no images .* there are 3 of .npy'):
        look(data)


@pytest.mark.parametrize(
    'suffix, array, layout',
    [
        ('.png', photo(channels=1), Layout()),
        ('.png', photo(channels=4), Layout()),
        ('.tif', photo(), Layout()),
        ('.png', photo(channels=1, dtype=np.uint16), Layout(1, 'uint16')),
        ('.png', photo(dtype=np.uint16), Layout(3, 'uint16')),
        ('.png', photo(channels=4, dtype=np.uint16), Layout(4, 'uint16')),
        ('.tif', photo(dtype=np.uint16), Layout(3, 'uint16', True)),
        ('.tif', photo(channels=6), Layout(6, 'uint8', True)),
        (
            '.tif',
            np.moveaxis(photo(channels=5, dtype=np.uint16), -1, 0),
            Layout(5, 'uint16', True, True),
        ),
    ],
)
def test_layouts(tmp_path, suffix, array, layout):
    path = tmp_path / f'a{suffix}'
    options = {}
    if layout.channels > 3:
        contiguous = dict(planarconfig='contig')
        options = dict(photometric='minisblack', **({} if layout.planar else contiguous))
    save(path, array, **options)
    image = look_at_image(path)
    assert not image.error and image.layout == layout and image.size == SIZE[::-1]
    if not layout.is_common:
        pixels = np.moveaxis(array, 0, -1) if layout.planar else array
        pixels = pixels.reshape(-1, layout.channels).astype(float)
        mean, std = mean_and_std([image])
        assert mean == pytest.approx(pixels.mean(0).tolist(), rel=1e-3)
        assert std == pytest.approx(pixels.std(0).tolist(), rel=1e-3)


def test_mixed_layouts_and_kinds(data):
    save(data / 'images/1.png', photo(channels=1))
    save(data / 'images/2.png', photo(channels=4))
    _, findings = look(data)
    assert not findings.problems
    assert 'grey images' in findings.warnings[0] and 'alpha' in findings.warnings[1]
    save(data / 'images/1.png', photo(channels=1, dtype=np.uint16))
    (problem,) = problems(data)
    assert 'do not have 3 channels of 8 bits, as most do: 1' in problem
    assert '1.png (1 channel of 16 bits)' in problem


def test_values_that_are_not_finite(tmp_path):
    array = photo(channels=4).astype(np.float32)
    array[0, 0] = np.nan
    for i in range(2):
        save(
            tmp_path / f'images/{i}.tif',
            array,
            photometric='minisblack',
            planarconfig='contig',
        )
        save(tmp_path / f'masks/{i}.png', labels(0, 1))
    found, findings = look(tmp_path)
    assert 'not finite' in findings.warnings[0]
    assert np.isfinite(found.loading['mean']).all()


@pytest.mark.parametrize('stored', [True, False])
def test_exif_orientation(data, stored):
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    Image.fromarray(photo()).save(data / 'images/1.jpg', exif=exif)
    (data / 'images/1.png').unlink()
    save(data / 'masks/1.png', labels(0, 1, 2, size=SIZE if stored else SIZE[::-1]))
    texts = problems(data)
    if stored:
        assert (
            'turned by their EXIF tag' in texts[0] and '1.jpg (orientation 6)' in texts[0]
        )
    else:
        assert not texts
    assert look(data)[0].loading['ignore_orientation'] is stored
    # upside down: sizes do not tell
    exif[0x0112] = 3
    Image.fromarray(photo()).save(data / 'images/1.jpg', exif=exif)
    save(data / 'masks/1.png', labels(0, 1, 2))
    _, findings = look(data)
    assert '1.jpg (3)' in findings.warnings[0]


def test_split():
    rare = [{0}, {0}, {0, 1}, {0}, {0, 1}, {0}, {0}, {0}, {0}, {0}]
    train, val = split(rare, 0.2, 0)
    assert sorted(train + val) == list(range(10)) and len(val) == 2
    assert {i for i in (2, 4) if i in val} and {i for i in (2, 4) if i in train}
    assert split(rare, 0.2, 0) == (train, val)
    assert any(split(rare, 0.2, seed) != (train, val) for seed in (1, 2, 3))
    # a class in a single image goes to training, and something is left for it
    for seed in range(10):
        assert 3 in split([{0}, {0}, {0}, {0, 1}, {0}], 0.4, seed)[0]
    assert [len(part) for part in split([{0}] * 4, 0.99, 0)] == [1, 3]
    with pytest.raises(UserError, match='1 usable images cannot be divided'):
        split([{0}], 0.5, 0)


def test_reading_classes(tmp_path):
    assert read_classes('road, car') == [('road', None), ('car', None)]
    path = tmp_path / 'classes.txt'
    path.write_text('﻿# a comment\nroad sign,128,64,128\ncar:0,0,142::\n\n')
    assert read_classes(str(path)) == [('road sign', (128, 64, 128)), ('car', (0, 0, 142))]
    path.write_text('road\t7\ncar,30')
    assert read_classes(str(path)) == [('road', 7), ('car', 30)]
    path.write_text('class 1\nclass 2')
    assert read_classes(str(path)) == [('class 1', None), ('class 2', None)]
    path.write_text('road,7\ncar')
    with pytest.raises(UserError, match='some classes have a value and others none'):
        read_classes(str(path))
    with pytest.raises(UserError, match='a stands twice'):
        read_classes('a,b,a')
    for line in ('0,a', '0 a', 'a,1,2', 'b,300', 'c,0,0,999'):
        path.write_text(f'road,7\n{line}')
        with pytest.raises(UserError, match=f'{line}. is none of NAME, NAME,VALUE and'):
            read_classes(str(path))
    path.write_text('a,0\nb,0')
    with pytest.raises(UserError, match='0 stands twice'):
        read_classes(str(path))
    path.write_bytes('straße'.encode('latin-1'))
    with pytest.raises(UserError, match='is not in UTF-8'):
        read_classes(str(path))
    with pytest.raises(UserError, match='a name is empty'):
        read_classes('a,,b')
    with pytest.raises(UserError, match='none.txt does not exist'):
        read_classes('none.txt')


@pytest.fixture
def coco(tmp_path):
    """Three images with two boxes each; the function that writes and looks at it."""
    images = [dict(id=i, file_name=f'{i}.png', width=48, height=40) for i in range(3)]
    annotations = [
        dict(
            id=2 * i + j,
            image_id=i,
            category_id=(1, 7)[j],
            bbox=[4 + 8 * j, 4, 16, 20],
            area=320,
            iscrowd=0,
            segmentation=[[4, 4, 20, 4, 20, 24]],
        )
        for i in range(3)
        for j in range(2)
    ]
    categories = [dict(id=1, name='cat'), dict(id=7, name='dog')]
    content = dict(images=images, annotations=annotations, categories=categories)
    for i in range(3):
        save(tmp_path / f'images/{i}.png', photo(seed=i))

    def look_at(change=lambda content: None, **options):
        changed = json.loads(json.dumps(content))
        change(changed)
        path = tmp_path / 'train.json'
        path.write_text(json.dumps(changed))
        return survey_detection([(path, tmp_path / 'images')], **options)

    return look_at


def test_a_tidy_coco_file(coco):
    found, findings = coco()
    assert not findings.problems and not found.sets[0].changed
    assert found.classes == ['cat', 'dog'] and found.has_masks and found.size == (48, 40)
    facts = findings.report(fix=False)
    assert '6 boxes and masks' in facts and 'dog: 3 boxes in 3 images' in facts
    assert 'category ids have holes (1, 7)' in facts
    assert coco(classes=['dog'])[0].classes == ['dog']
    assert not coco(boxes_only=True)[0].has_masks
    with pytest.raises(UserError, match='--classes has fox; .* the categories cat, dog'):
        coco(classes=['fox'])


def on(part, index, **values):
    """A change of an item of a COCO file; None removes a key."""

    def change(content):
        item = content[part][index]
        item.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del item[key]

    return change


@pytest.mark.parametrize(
    'change, text, left',
    [
        (on('annotations', 2, category_id=5), 'annotations with a category_id', 5),
        (on('annotations', 2, image_id=9), 'of an image that is not listed', 5),
        (on('annotations', 2, bbox=None), 'without a usable bbox: 1', 5),
        (on('annotations', 2, bbox=[1, 2, 3]), 'without a usable bbox: 1', 5),
        (on('annotations', 2, bbox=[1, 2, 30, 0.5]), 'less than 1 pixel wide or high', 5),
        (on('annotations', 2, bbox=[60, 2, 9, 9]), 'outside of their image', 5),
        (on('annotations', 2, id=1), 'without an id of their own: 2', 6),
        (on('annotations', 2, area=None), 'without an area above 0', 6),
        (on('annotations', 2, iscrowd=None), 'without iscrowd', 6),
        (on('annotations', 2, image_id='1'), 'with an image_id of another type', 6),
        (on('annotations', 2, segmentation=[[1, 2, 3, 4]]), 'with a mask that is not', 6),
        (on('annotations', 2, segmentation=[[0.1] * 6]), 'with a mask that is not', 6),
        (on('annotations', 2, segmentation=[[1, 2, 3, 4, 5, 'x']]), 'with a mask that', 6),
        (
            on('annotations', 2, segmentation=[[1, 2, 3, 4, 5, float('nan')]]),
            'with a mask that is not',
            6,
        ),
        (
            on('annotations', 2, segmentation=dict(size=[48, 40], counts=[0, 1920])),
            'with a mask that is not',
            6,
        ),
        (
            on('annotations', 2, segmentation=dict(size=[40, 48], counts=[10, 5])),
            'with a mask that is not',
            6,
        ),
        (
            on('annotations', 2, segmentation=dict(size=[40, 48], counts='garbage!')),
            'with a mask that is not',
            6,
        ),
        (on('images', 1, width='48'), 'without width and height: 1', 6),
        (on('annotations', 2, segmentation=[]), 'without a mask (segmentation): 1 of 6', 6),
        (on('images', 1, width=None), 'without width and height: 1', 6),
        (on('images', 1, file_name='none.png'), 'images that cannot be read: 1 of 3', 4),
        (on('images', 1, width=50), 'of another size than their labels: 1', 4),
    ],
)
def test_faults_of_coco_files(coco, change, text, left):
    found, findings = coco(change)
    (problem,) = findings.problems
    assert text in problem.text and problem.fix and problem.advice
    with pytest.raises(UserError, match='(?s)1 problem with the data.*--fix'):
        findings.raise_problems(fix=False)
    findings.raise_problems(fix=True)
    own = found.sets[0]
    assert len(own.content['annotations']) == left
    ids = [a['id'] for a in own.content['annotations']]
    assert len(set(ids)) == left
    assert all(a['area'] > 0 and 'iscrowd' in a for a in own.content['annotations'])
    assert all(i['width'] == 48 for i in own.content['images'])
    assert found.has_masks == ('without a mask' not in text)


@pytest.mark.parametrize(
    'change, text',
    [
        (on('images', 1, id=0), "'id' of images that are missing or stand twice: 1"),
        (on('images', 1, file_name='0.png'), "'file_name' of images"),
        (
            on('categories', 1, name='cat'),
            "'name' of categories",
        ),
    ],
)
def test_faults_that_only_the_user_can_fix(coco, change, text):
    _, findings = coco(change)
    assert text in findings.problems[0].text
    with pytest.raises(UserError, match='no config was written'):
        findings.raise_problems(fix=True)


def test_boxes_in_other_units(coco):
    def relative(content):
        for annotation in content['annotations']:
            annotation['bbox'] = [0.1, 0.1, 0.5, 0.5]

    assert 'within 0 to 1' in coco(relative)[1].problems[0].text

    def corners(content):
        for annotation in content['annotations']:
            annotation['bbox'] = [20, 20, 44, 38]

    _, findings = coco(corners)
    warning = next(w for w in findings.warnings if 'reach out' in w)
    assert warning.endswith('is bbox left, top, right, bottom?')


def test_images_without_objects(coco):
    def empty(content):
        content['annotations'] = content['annotations'][:4]

    _, findings = coco(empty)
    assert any('images without objects' in w and '1 of 3' in w for w in findings.warnings)
    _, findings = coco(lambda content: content['annotations'].clear())
    assert any('has no objects' in p.text for p in findings.problems)
    _, findings = coco(lambda content: content['annotations'].__delitem__(slice(0, 6, 2)))
    assert 'no box is of cat' in findings.warnings[0]


def test_masks_that_are_kept(coco):
    """Run lengths of both kinds, a polygon alone, and what is left of a broken one."""
    from pycocotools import mask

    pixels = np.zeros((40, 48), np.uint8, order='F')
    pixels[4:24, 4:20] = 1
    packed = mask.encode(pixels)
    polygon = [4, 4, 20, 4, 20, 24]
    kept = [
        dict(size=[40, 48], counts=packed['counts'].decode()),
        dict(size=[40, 48], counts=[164, 20, 1736]),
        polygon,
        [polygon, [1, 2]],
    ]

    def change(content):
        for annotation, own in zip(content['annotations'], kept, strict=False):
            annotation['segmentation'] = own

    found, findings = coco(change)
    assert not findings.problems
    masks = [a['segmentation'] for a in found.sets[0].content['annotations'][:4]]
    assert masks == [*kept[:2], [polygon], [polygon]] and found.sets[0].changed


def test_what_training_does_not_learn_from(coco):
    def crowds(content):
        for annotation in content['annotations']:
            annotation['iscrowd'] = 1

    assert any('has no objects' in p.text for p in coco(crowds)[1].problems)


def test_names_that_hold_the_folder(coco, tmp_path):
    def change(content):
        for image in content['images']:
            image['file_name'] = f'images/{image["file_name"]}'

    texts = [p.text for p in coco(change)[1].problems]
    assert f'--images {tmp_path} has it' in texts[0]


def test_another_encoding(coco, tmp_path):
    coco()
    path = tmp_path / 'train.json'
    path.write_text(path.read_text(), encoding='utf-8-sig')
    found, findings = survey_detection([(path, tmp_path / 'images')])
    assert not findings.problems and found.sets[0].changed


def test_files_that_are_not_coco(tmp_path):
    (tmp_path / 'images').mkdir()
    path = tmp_path / 'a.json'
    for text, message in (
        (None, 'does not exist'),
        ('{', 'is not JSON'),
        ('[]', 'has no images or annotations or categories'),
        ('{"images": [], "annotations": [], "categories": [{}]}', 'it has no images'),
        ('{"images": [null], "annotations": [], "categories": [1]}', '1 of the images are'),
        (
            '{"images": [{"id": []}], "annotations": [], "categories": [1]}',
            'are no objects',
        ),
    ):
        if text is not None:
            path.write_text(text)
        with pytest.raises(UserError, match=message):
            survey_detection([(path, tmp_path / 'images')])
    with pytest.raises(UserError, match='none is not a folder'):
        survey_detection([(path, tmp_path / 'none')])


def test_other_categories_for_validation(coco, tmp_path):
    coco()
    path = tmp_path / 'train.json'
    content = json.loads(path.read_text())
    content['categories'].reverse()
    other = tmp_path / 'val.json'
    other.write_text(json.dumps(content))
    images = tmp_path / 'images'
    _, findings = survey_detection([(path, images), (other, images)])
    assert 'other categories, or in another order' in findings.problems[0].text
