"""overlock infer: which files are predicted, and what is saved under which name."""

import argparse
import json
import os
from pathlib import Path

import cv2
import numpy as np
import pytest
from helpers import ROOT, run, tool
from mmengine.config import Config
from PIL import Image

from overlock_mm.apis.infer import find_inputs, infer, output_names
from overlock_mm.cli.infer import add_arguments
from overlock_mm.errors import UserError

PHOTO = np.random.default_rng(0).integers(0, 256, (64, 80, 3), np.uint8)


@pytest.fixture
def photos(tmp_path, monkeypatch):
    """A messy folder, which is also the current one: (names of images in it)."""
    monkeypatch.chdir(tmp_path)
    names = ['photos/a/1.png', 'photos/b/1.png', 'photos/b/1.jpg', 'photos/ü/x y.PNG']
    for name in names:
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PHOTO).save(name)
    Path('photos/b/bad.jpg').write_text('no image')
    Path('photos/readme.txt').write_text('not an image')
    Path('photos/.hidden').mkdir()
    Image.fromarray(PHOTO).save('photos/.hidden/1.png')
    return names


def files_in(folder):
    return sorted(
        str(p.relative_to(folder)) for p in Path(folder).rglob('*') if p.is_file()
    )


def test_folders_patterns_and_files(photos):
    everything = sorted([*photos, 'photos/b/bad.jpg'])
    found, problems, others = find_inputs(['photos'], Path('out'))
    assert sorted(found) == everything and not problems and others == {'.txt': 1}
    given = ['photos/*/1.*', 'photos/a/1.png', 'nowhere', 'x*.png']
    found, problems, _ = find_inputs(given, Path('out'))
    assert sorted(found) == sorted(photos[:3])
    assert len(problems) == 2 and all('does not exist' in p for p in problems)
    found = find_inputs(['photos/**/*.jpg'], Path('out'))[0]
    assert found == ['photos/b/1.jpg', 'photos/b/bad.jpg']
    found = find_inputs(['photos/readme.txt'], Path('out'))[0]
    assert found == ['photos/readme.txt']  # as was said
    Path('empty').mkdir()
    with pytest.raises(UserError, match='nothing to predict.*empty has no images'):
        find_inputs(['empty'], Path('out'))


def test_results_are_no_inputs(photos):
    Path('photos/out/pictures').mkdir(parents=True)
    Image.fromarray(PHOTO).save('photos/out/pictures/1.png')
    found, _, _ = find_inputs(['photos'], Path('photos/out'))
    assert sorted(found) == sorted([*photos, 'photos/b/bad.jpg'])
    found, _, _ = find_inputs(['photos/**/1.png'], Path('photos/out'))
    assert sorted(found) == ['photos/a/1.png', 'photos/b/1.png']
    with pytest.raises(UserError, match='the folder of the images and of the results'):
        find_inputs(['photos/'], Path('photos'))


def test_links_are_followed_but_not_round_and_round(photos):
    Path('photos/a/up').symlink_to('..')
    Path('photos/link').symlink_to('b')
    found = find_inputs(['photos'], Path('out'))[0]
    linked = [f'photos/link/{name}' for name in ('1.jpg', '1.png', 'bad.jpg')]
    assert sorted(found) == sorted([*photos, 'photos/b/bad.jpg', *linked])


def test_names_do_not_meet():
    paths = ['x/a/1.png', 'x/b/1.png', 'x/b/1.jpg', 'x/b/1.JPG']
    names = output_names(paths)
    assert names['x/a/1.png'] == os.path.join('a', '1')
    assert len({name.lower() for name in names.values()}) >= 3
    assert names['x/b/1.png'] == os.path.join('b', '1.png')
    assert output_names(['one/1.png']) == {'one/1.png': '1'}
    assert output_names(['../1.png', '1.png'])['../1.png'] == '1'


def test_a_segmentor(models, photos):
    config, checkpoint = models['segmentor']
    summary = infer(
        config,
        checkpoint,
        ['photos'],
        'out',
        save=['pictures', 'png', 'json'],
        batch_size=3,
    )
    assert summary.images == 4
    assert summary.failed == ('photos/b/bad.jpg cannot be read as an image',)
    maps = ['a/1.png', 'b/1.jpg.png', 'b/1.png.png', 'ü/x y.png']
    expected = [f'{kind}/{m}' for kind in ('label_maps', 'pictures') for m in maps]
    expected += ['label_maps/classes.json', 'predictions.json']
    assert files_in('out') == sorted(expected)
    metainfo = Config.fromfile(config).metainfo
    image = Image.open('out/label_maps/a/1.png')
    assert image.mode == 'P' and image.size == (80, 64)
    assert image.getpalette()[:30] == [part for color in metainfo.palette for part in color]
    labels = np.asarray(image)
    names = json.loads(Path('out/label_maps/classes.json').read_text())
    assert names == {str(i): name for i, name in enumerate(metainfo.classes)}
    content = json.loads(Path('out/predictions.json').read_text())
    assert content['classes'] == list(metainfo.classes)
    [entry] = [e for e in content['images'] if e['file'] == 'photos/a/1.png']
    assert entry['name'] == 'a/1' and (entry['width'], entry['height']) == (80, 64)
    for name, share in entry['classes'].items():
        assert share == pytest.approx(
            (labels == metainfo.classes.index(name)).mean(), abs=1e-6
        )
    assert sum(entry['classes'].values()) == pytest.approx(1, abs=1e-4)
    assert Image.open('out/pictures/a/1.png').size[0] == 80 * 6


def test_a_detector(models, photos):
    from pycocotools.coco import COCO

    config, checkpoint = models['detector']
    options = {'model.test_cfg.rcnn.max_per_img': 5}
    summary = infer(
        config,
        checkpoint,
        ['photos/a', 'photos/b/1.png'],
        'out',
        save=['pictures', 'coco', 'json'],
        score_thr=0.0,
        cfg_options=options,
    )
    assert summary.images == 2 and not summary.failed
    assert files_in('out') == [
        'coco.json',
        'pictures/a/1.png',
        'pictures/b/1.png',
        'predictions.json',
    ]
    coco = COCO('out/coco.json')
    assert [i['file_name'] for i in coco.imgs.values()] == [
        'photos/a/1.png',
        'photos/b/1.png',
    ]
    names = list(Config.fromfile(config).metainfo.classes)
    assert [c['name'] for c in coco.cats.values()] == names
    annotations = coco.loadAnns(coco.getAnnIds(imgIds=1))
    assert len(annotations) == 5
    listed = json.loads(Path('out/predictions.json').read_text())['images'][0]['objects']
    for annotation, entry in zip(annotations, listed, strict=True):
        mask = coco.annToMask(annotation)
        assert mask.shape == (64, 80) and mask.sum() == annotation['area']
        assert names[annotation['category_id'] - 1] == entry['class']
        assert annotation['bbox'] == entry['bbox'] and annotation['score'] == entry['score']
    from overlock_mm import Predictor

    found = Predictor(config, checkpoint, cfg_options=options)('photos/a/1.png')
    x0, y0, x1, y1 = found.pred_instances.bboxes[0].tolist()
    np.testing.assert_allclose(
        annotations[0]['bbox'], [x0, y0, x1 - x0, y1 - y0], atol=0.01
    )
    again = infer(
        config, checkpoint, ['photos/a'], 'few', score_thr=1.0, cfg_options=options
    )
    assert again.images == 1 and not COCO('few/coco.json').anns


def test_a_video(models, photos):
    config, checkpoint = models['segmentor']
    writer = cv2.VideoWriter('v.mp4', cv2.VideoWriter_fourcc(*'mp4v'), 10, (80, 64))
    for shift in range(3):
        writer.write(np.roll(PHOTO, 20 * shift, axis=1))
    writer.release()
    Path('bad.mp4').write_text('no video')
    summary = infer(
        config,
        checkpoint,
        ['v.mp4', 'bad.mp4'],
        'out',
        save=['pictures', 'png'],
        batch_size=2,
    )
    assert summary.images == 3
    assert summary.failed == ('bad.mp4 cannot be read as a video',)
    maps = [f'label_maps/v/00000{i}.png' for i in (1, 2, 3)]
    assert files_in('out') == sorted([*maps, 'label_maps/classes.json', 'pictures/v.mp4'])
    reader = cv2.VideoCapture('out/pictures/v.mp4')
    assert reader.get(cv2.CAP_PROP_FRAME_COUNT) == 3
    assert reader.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    assert reader.read()[1].shape[1] == 80 * 6
    frames = [np.asarray(Image.open(f'out/{name}')) for name in maps]
    assert (frames[0] != frames[1]).any()


def test_what_cannot_be_done(models, photos):
    segmentor, detector = models['segmentor'], models['detector']
    with pytest.raises(UserError, match='--save gif is not known; use some of pictures'):
        infer(*segmentor, ['photos'], save=['gif'])
    with pytest.raises(UserError, match='a segmentor predicts no objects'):
        infer(*segmentor, ['photos'], save=['coco'])
    with pytest.raises(UserError, match='a detector predicts no label map'):
        infer(*detector, ['photos'], save=['png'])
    with pytest.raises(UserError, match='photos has files already.*--force'):
        infer(*segmentor, ['photos'], 'photos')
    with pytest.raises(UserError, match='readme.txt is a file'):
        infer(*segmentor, ['photos'], 'photos/readme.txt')
    with pytest.raises(UserError, match='nothing to predict'):
        infer(*segmentor, ['nowhere'])
    with pytest.raises(UserError, match='--batch 0 must be at least 1'):
        infer(*segmentor, ['photos'], batch_size=0)
    for score in (-0.1, 1.1, float('nan')):
        with pytest.raises(UserError, match=f'--score-thr {score} must be within 0..1'):
            infer(*segmentor, ['photos'], score_thr=score)
    assert (
        files_in('photos')
        and not Path('predictions').exists()
        or not files_in('predictions')
    )
    Image.fromarray(PHOTO).save('one.png')
    infer(*segmentor, ['one.png'], 'photos', save=['png'], force=True)
    assert 'label_maps/one.png' in files_in('photos') and 'readme.txt' in files_in('photos')


def test_an_image_that_the_model_refuses(models, photos):
    """It is named, and the others are done."""
    for name, size in (('0.png', (2, 900)), ('9.png', (80, 64))):
        Image.fromarray(PHOTO).resize(size).save(f'photos/a/{name}')
    pipeline = Config.fromfile(models['segmentor'][0]).test_dataloader.dataset.pipeline
    options = {'test_dataloader.dataset.pipeline': [pipeline[0], pipeline[-1]]}
    summary = infer(
        *models['segmentor'], ['photos/a'], 'out', batch_size=2, cfg_options=options
    )
    assert summary.images == 2
    [reason] = summary.failed
    assert 'photos/a/0.png (2x900 pixels) cannot be predicted: ValueError' in reason
    assert 'label_maps/1.png' in files_in('out') and 'label_maps/9.png' in files_in('out')


def test_a_video_that_the_model_refuses(models, photos, monkeypatch, capsys):
    """Its frames are named, and what comes after it is done."""
    writer = cv2.VideoWriter('a.mp4', cv2.VideoWriter_fourcc(*'mp4v'), 10, (24, 320))
    for _ in range(2):
        writer.write(np.zeros((320, 24, 3), np.uint8))
    writer.release()
    pipeline = Config.fromfile(models['segmentor'][0]).test_dataloader.dataset.pipeline
    options = {'test_dataloader.dataset.pipeline': [pipeline[0], pipeline[-1]]}
    monkeypatch.setenv('OVERLOCK_MM_DEBUG', '1')
    inputs = ['a.mp4', 'photos/a']
    summary = infer(*models['segmentor'], inputs, 'out', cfg_options=options)
    assert summary.images == 1 and len(summary.failed) == 2
    assert summary.failed[1].startswith('a.mp4#2 (24x320 pixels) cannot be predicted')
    assert 'Traceback' in capsys.readouterr().err


def test_an_interrupted_run_keeps_what_it_has(models, photos, monkeypatch):
    from overlock_mm.apis.inference import Predictor

    predict, calls = Predictor.predict, []

    def interrupted(self, *args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(self, *args)

    monkeypatch.setattr(Predictor, 'predict', interrupted)
    with pytest.raises(KeyboardInterrupt):
        infer(*models['segmentor'], ['photos'], 'out', save=['json'])
    assert len(json.loads(Path('out/predictions.json').read_text())['images']) == 2


def test_the_command(models, photos):
    config, checkpoint = models['segmentor']
    command = [
        *tool('infer.py'),
        config,
        checkpoint,
        'photos',
        '--out',
        'out',
        '--tile',
        '64',
    ]
    command += ['--overlap', '8', '--device', 'cpu', '--batch', '2']
    result = run(command, '.', status=3)
    assert 'Predicted 4 images' in result.stdout and 'photos/b/bad.jpg' in result.stdout
    assert '4/4' in result.stderr or 'images' in result.stderr
    assert 'label_maps/a/1.png' in files_in('out') and 'pictures/a/1.png' in files_in('out')
    failed = run([*command, '--save', 'gif'], '.', status=2)
    assert failed.stderr.strip().splitlines()[-1].startswith('error: --save gif')
    assert (ROOT / 'tools/infer.py').exists()


def test_kinds_may_be_given_one_by_one():
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    given = ['c.py', 'c.pth', 'a.jpg', '--save', 'png', '--save', 'json', 'pictures']
    assert parser.parse_args(given).save == ['png', 'json', 'pictures']
