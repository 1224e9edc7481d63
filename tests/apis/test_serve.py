"""overlock serve: what is shown and saved, limits, odd files, and the server itself."""

import asyncio
import contextlib
import io
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

import httpx
import numpy as np
import pytest
import torch
from helpers import ROOT
from mmdet.structures import DetDataSample
from mmengine.structures import PixelData
from nicegui import ui
from nicegui.testing.general import nicegui_reset_globals
from nicegui.testing.user import User
from PIL import Image
from pycocotools import mask as coco_mask

from overlock_mm import Predictor
from overlock_mm.apis.serve import Service, web_app
from overlock_mm.cli import main
from overlock_mm.errors import UserError

TASKS = ('segmentor', 'detector')
RANDOM = np.random.default_rng(0).integers(0, 256, (60, 80, 3), np.uint8)
# half of it red, half of it blue: what is where survives JPEG
HALVES = np.zeros((48, 64, 3), np.uint8)
HALVES[:, :32, 0] = HALVES[:, 32:, 2] = 255


def encoded(image=RANDOM, kind='PNG', **options):
    content = io.BytesIO()
    image = Image.fromarray(image) if isinstance(image, np.ndarray) else image
    image.save(content, kind, **options)
    return content.getvalue()


def pixels(content):
    return np.asarray(Image.open(io.BytesIO(content)).convert('RGB')).astype(int)


@pytest.fixture(scope='module')
def predictors(models):
    return {name: Predictor(*paths, 'cpu') for name, paths in models.items()}


@pytest.fixture
def service_of(predictors, tmp_path, monkeypatch):
    """A function that makes a service; tmp_path is the folder for temporary files."""
    monkeypatch.setattr(tempfile, 'tempdir', str(tmp_path))

    def made(task, **options):
        options = dict(dict(max_bytes=2**20), **options)
        return Service(predictors[task], **options)

    return made


def predicted(service, content, name='photo.png'):
    session = service.open()
    asyncio.run(service.predict(session, name, content))
    return session


@contextlib.asynccontextmanager
async def page_of(service, monkeypatch):
    """A user who has the page open, without a browser."""
    monkeypatch.setenv('NICEGUI_USER_SIMULATION', 'true')
    with nicegui_reset_globals():
        app = web_app(service)
        transport = httpx.ASGITransport(app)
        async with (
            app.app.router.lifespan_context(app.app),
            httpx.AsyncClient(transport=transport, base_url='http://test') as client,
        ):
            user = User(client)
            await user.open('/')
            yield user


async def upload(user, content, name='photo.png'):
    """Post a file as the page does, and wait until the page is ready again."""
    (element,) = user.find(ui.upload).elements
    response = await user.http_client.post(
        element._props['url'], files=dict(file=(name, content))
    )
    for _ in range(400):
        await asyncio.sleep(0.05)
        if 'pointer-events-none' not in element._classes:
            break
    return response


def source(user):
    """URL of the picture that the page shows."""
    (picture,) = (e for e in user.find(ui.element).elements if e.tag == 'img')
    return '/' + picture._props['src']


async def shown(user):
    response = await user.http_client.get(source(user))
    assert response.status_code == 200
    return pixels(response.content)


def button(user, text):
    (found,) = (b for b in user.find(ui.button).elements if b.text == text)
    return found


def test_the_page_of_a_segmentor(service_of, predictors, monkeypatch):
    """Shares, opacity and classes; the downloads; and the model runs once."""
    service, predictor = service_of('segmentor'), predictors['segmentor']
    labels = predictor(RANDOM).pred_sem_seg.data[0].numpy()
    runs = []
    monkeypatch.setattr(
        predictor,
        'predict',
        lambda data: runs.append(1) or Predictor.predict(predictor, data),
    )

    async def use():
        async with page_of(service, monkeypatch) as user:
            await upload(user, encoded())
            first = await shown(user)
            for index, share in enumerate(np.bincount(labels.ravel()) / labels.size):
                if share:
                    await user.should_see(predictor.classes[index])
            (slider,) = user.find(ui.slider).elements
            slider.set_value(0.9)
            strong = await shown(user)
            old = source(user).replace('/2/', '/1/')
            assert (await user.http_client.get(old)).status_code == 410
            largest = predictor.classes[np.bincount(labels.ravel()).argmax()]
            (box,) = (b for b in user.find(ui.checkbox).elements if b.text == largest)
            box.set_value(False)
            without = await shown(user)
            label_map = await user.http_client.get(
                '/' + button(user, 'Label map (PNG)')._props['href']
            )
            picture = await user.http_client.get(
                '/' + button(user, 'Picture (PNG)')._props['href']
            )
            user.find('Hide all').click()
            await asyncio.sleep(0.1)
            nothing = await shown(user)
        return first, strong, without, nothing, label_map, picture

    first, strong, without, nothing, label_map, picture = asyncio.run(use())
    assert runs == [1]
    assert label_map.headers['content-disposition'].endswith('photo_label_map.png')
    found = Image.open(io.BytesIO(label_map.content))
    np.testing.assert_array_equal(np.asarray(found), labels)
    # the picture is enlarged by a whole factor: look at what all agree on
    factor = first.shape[0] // 60
    large = labels.repeat(factor, 0).repeat(factor, 1)
    largest = np.bincount(labels.ravel()).argmax()
    inside = (large == largest) & ~np.any(
        [np.roll(large, s, a) != large for s in range(-8, 9) for a in (0, 1)], axis=0
    )
    assert inside.any()
    color = np.array(predictor.palette[largest])
    image = nothing[inside]
    tolerance = dict(atol=6)  # JPEG
    assert np.abs(first[inside] - (image + color) / 2).mean() < tolerance['atol']
    assert np.abs(strong[inside] - (0.1 * image + 0.9 * color)).mean() < tolerance['atol']
    assert np.abs(without[inside] - image).mean() < tolerance['atol']
    assert np.abs(strong[inside] - image).mean() > 3 * tolerance['atol']
    assert np.abs(pixels(picture.content)[: 60 * factor] - without).mean() < 6
    assert picture.content[:4] == b'\x89PNG'


def test_the_page_of_a_detector(service_of, predictors, monkeypatch):
    """Numbers of objects follow the threshold; what is saved is what is shown."""
    predictor = predictors['detector']
    objects = predictor(RANDOM).pred_instances
    scores = objects.scores.sort(descending=True).values
    threshold = round((scores[4] + scores[5]).item() / 2, 4)  # five are above it
    assert scores[4] > threshold > scores[5]
    service = service_of('detector', score_thr=0.0)
    monkeypatch.setattr(ui.slider, 'props', lambda self, *_: self)  # steps are of 0.01
    strong = objects[objects.scores >= threshold]
    names = [predictor.classes[i] for i in strong.labels]
    hidden = names[0]

    async def use():
        async with page_of(service, monkeypatch) as user:
            await upload(user, encoded(), 'a b.png')
            for slider in user.find(ui.slider).elements:
                if slider.value == 0:
                    slider.set_value(threshold)
            picture = await shown(user)
            boxes = {b.text: b for b in user.find(ui.checkbox).elements}
            before = await user.http_client.get(
                '/' + button(user, 'Objects shown (COCO)')._props['href']
            )
            boxes[hidden].set_value(False)
            after = await user.http_client.get(
                '/' + button(user, 'Objects shown (COCO)')._props['href']
            )
            counts = {
                row.default_slot.children[1].text: row.default_slot.children[2].text
                for row in user.find(ui.row).elements
                if [type(e) for e in row.default_slot.children][1:2] == [ui.checkbox]
            }
        return picture, before, after, counts

    picture, before, after, counts = asyncio.run(use())
    assert counts == {name: str(names.count(name)) for name in names}
    drawn = [
        predictor.draw(RANDOM, predictor(RANDOM), score_thr=score, legend=False)
        for score in (threshold, 0, 1)
    ]
    right, *wrong = (np.abs(picture - d.astype(int)).mean() for d in drawn)
    assert 2 * right < min(wrong)
    assert before.headers['content-disposition'].endswith('a%20b_coco.json')
    found = before.json()
    assert found['images'][0]['file_name'] == 'a b.png'
    assert len(found['annotations']) == 5
    for annotation, box, mask in zip(
        found['annotations'], strong.bboxes.tolist(), strong.masks, strict=True
    ):
        x, y, w, h = annotation['bbox']
        np.testing.assert_allclose([x, y, x + w, y + h], box, atol=0.011)
        np.testing.assert_array_equal(coco_mask.decode(annotation['segmentation']), mask)
    categories = {c['id']: c['name'] for c in found['categories']}
    left = [categories[a['category_id']] for a in after.json()['annotations']]
    assert left == [name for name in names if name != hidden]


def test_large_images_are_shown_smaller_and_saved_whole(service_of, predictors):
    """Also masks and boxes have the size of what they are drawn on."""
    large = np.zeros((900, 2000, 3), np.uint8)
    large[:, 1000:] = 255
    service = service_of('segmentor')
    session = predicted(service, encoded(large))
    assert pixels(service.file(session, 'shown.jpg')).shape == (720, 1600, 3)
    label_map = Image.open(io.BytesIO(service.file(session, 'label_map.png')))
    labels = predictors['segmentor'](large).pred_sem_seg.data[0].numpy()
    np.testing.assert_array_equal(np.asarray(label_map), labels)
    reduced = session.prediction.shown[1].pred_sem_seg.data[0].numpy()
    expected = np.asarray(Image.fromarray(labels.astype(np.uint8)).resize((1600, 720), 0))
    assert (reduced == expected).mean() > 0.99

    service = service_of('detector', score_thr=0.0)
    session = predicted(service, encoded(large))
    assert pixels(service.file(session, 'shown.jpg')).shape == (720, 1600, 3)
    full, small = session.prediction.result, session.prediction.shown[1]
    torch.testing.assert_close(
        small.pred_instances.bboxes, full.pred_instances.bboxes * 0.8
    )
    for one, other in zip(
        full.pred_instances.masks, small.pred_instances.masks, strict=True
    ):
        assert list(one['size']) == [900, 2000] and list(other['size']) == [720, 1600]
        assert abs(coco_mask.area(one) * 0.64 - coco_mask.area(other)) < 9000


def rotated():
    """HALVES as a camera that was held upright stores it."""
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise to see it
    return encoded(np.rot90(HALVES), 'JPEG', quality=95, exif=exif)


def halves_with_alpha():
    alpha = np.full((48, 64, 1), 40, np.uint8)
    return encoded(np.concatenate((HALVES, alpha), 2))


def deep_tiff():
    import tifffile

    content = io.BytesIO()
    tifffile.imwrite(content, HALVES.astype(np.uint16) * 257, photometric='rgb')
    return content.getvalue()


def gif():
    frames = [Image.fromarray(HALVES), Image.fromarray(HALVES[:, ::-1])]
    return encoded(frames[0], 'GIF', save_all=True, append_images=frames[1:])


ODD = dict(
    photo=('a.jpg', lambda: encoded(HALVES, 'JPEG', quality=95)),
    wrong_suffix=('a.jpg', lambda: encoded(HALVES)),
    no_suffix=('../../a', lambda: encoded(HALVES)),
    turned=('a.JPG', rotated),
    alpha=('a.png', halves_with_alpha),
    palette=('a.png', lambda: encoded(Image.fromarray(HALVES).quantize(4))),
    tiff_16_bits=('a.tif', deep_tiff),
    cmyk=('a.jpg', lambda: encoded(Image.fromarray(HALVES).convert('CMYK'), 'JPEG')),
    gif=('a.gif', gif),
)


# older OpenCV reads no GIF
@pytest.mark.parametrize(
    'kind', [*list(ODD)[:-1], pytest.param('gif', marks=pytest.mark.dev_stack)]
)
def test_odd_images_are_seen_as_they_are(service_of, kind, tmp_path):
    """Turned as the camera says, without alpha, in 8 bits, in RGB."""
    name, content = ODD[kind]
    service = service_of('segmentor')
    session = predicted(service, content(), name)
    session.hidden = set(service.predictor.classes)
    found = pixels(service.file(session, 'shown.jpg'))
    factor = found.shape[0] // 48
    assert found.shape == (48 * factor, 64 * factor, 3)
    red, blue = found[:, : 24 * factor].mean((0, 1)), found[:, 40 * factor :].mean((0, 1))
    np.testing.assert_allclose(red, (255, 0, 0), atol=12)
    np.testing.assert_allclose(blue, (0, 0, 255), atol=12)
    label_map = Image.open(io.BytesIO(service.file(session, 'label_map.png')))
    assert label_map.size == (64, 48)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize('task', TASKS)
@pytest.mark.parametrize('size', [(1, 1), (1, 300), (300, 2)], ids=str)
def test_tiny_and_thin_images(service_of, task, size):
    """A picture, or a message."""
    service = service_of(task, score_thr=0.0)
    try:
        session = predicted(service, encoded(np.full((*size, 3), 90, np.uint8)))
    except UserError as error:
        assert f'{size[1]} x {size[0]} pixels' in str(error)
    else:
        for name in ('shown.jpg', *service.files()):
            assert service.file(session, name)


BAD = {
    'is not an image': ('notes.jpg', b'Dear diary'),
    'is not an image that': ('empty.png', b''),
    'may be damaged': ('cut.png', encoded(RANDOM)[:3000]),
    'bomb.png has 6000 x 5000 pixels, 30.0 million; at most 25 million': (
        'bomb.png',
        encoded(Image.new('1', (6000, 5000))),
    ),
    'large.bmp has 1.5 MB, and at most 1 MB': ('large.bmp', bytes(3 * 2**19)),
}


@pytest.mark.parametrize('message', BAD)
def test_bad_files_get_a_message(service_of, message, tmp_path):
    service = service_of('segmentor')
    name, content = BAD[message]
    with pytest.raises(UserError, match=re.escape(message)):
        predicted(service, content, name)
    assert list(tmp_path.iterdir()) == [] and service.waiting == 0


def test_after_a_bad_file_the_page_goes_on(service_of, monkeypatch, capsys):
    """Also after an error in the model."""
    service = service_of('segmentor')
    predict = service.predictor.predict

    def fails(data):
        raise RuntimeError('out of memory\nand more')

    async def use():
        async with page_of(service, monkeypatch) as user:
            await upload(user, b'Dear diary', 'notes.jpg')
            await user.should_see('notes.jpg is not an image that can be read.')
            monkeypatch.setattr(service.predictor, 'predict', fails)
            await upload(user, encoded())
            await user.should_see('(RuntimeError: out of memory)')
            await user.should_not_see('notes.jpg')
            monkeypatch.setattr(service.predictor, 'predict', predict)
            await upload(user, encoded())
            await user.should_not_see('out of memory')
            assert (await shown(user)).shape[2] == 3
            response = await user.http_client.get('/results/guessed/1/picture.png')
            assert response.status_code == 404
            response = await user.http_client.get(source(user).replace('shown', 'other'))
            assert response.status_code == 404
            response = await upload(user, bytes(3 * 2**20), 'large.png')
            assert response.status_code == 413
            assert (await user.http_client.get('/elsewhere')).status_code == 404

    asyncio.run(use())
    assert 'an image of 80 x 60 could not be predicted' in capsys.readouterr().out


def test_what_cannot_be_shown(service_of, monkeypatch):
    """A panoptic model's prediction, for one."""
    service = service_of('detector')
    panoptic = DetDataSample(pred_panoptic_seg=PixelData(data=torch.zeros(1, 60, 80)))
    monkeypatch.setattr(service.predictor, 'predict', lambda data: [panoptic])
    with pytest.raises(UserError, match='the model predicts pred_panoptic_seg, and here'):
        predicted(service, encoded())


def test_one_image_at_a_time(service_of, monkeypatch):
    """Two pages at once: the second waits; who has left is not predicted for."""
    service = service_of('segmentor')
    predict, running, most = service.predictor.predict, [], []

    def slow(data):
        running.append(1)
        most.append(len(running))
        time.sleep(0.1)
        running.pop()
        return predict(data)

    monkeypatch.setattr(service.predictor, 'predict', slow)

    async def use():
        sessions = [service.open() for _ in range(4)]
        waits = [service.predict(s, 'a.png', encoded()) for s in sessions]
        tasks = [asyncio.create_task(wait) for wait in waits]
        await asyncio.sleep(0.05)
        assert service.waiting == 4
        service.close(sessions[3])
        await asyncio.gather(*tasks)
        return sessions

    sessions = asyncio.run(use())
    assert most == [1, 1, 1] and service.waiting == 0
    assert [s.prediction is not None for s in sessions] == [True, True, True, False]


def test_too_many_waiting(service_of):
    service = service_of('segmentor')
    service.waiting = 16
    with pytest.raises(UserError, match='16 images are waiting already'):
        predicted(service, encoded())


def test_what_is_kept_is_limited(service_of):
    """The oldest results go first, and only when a page closes or memory is short."""
    service = service_of('segmentor', most_kept=2 * 60 * 80 * 5)
    first, second = (predicted(service, encoded()) for _ in range(2))
    assert first.prediction and second.prediction
    assert first.prediction.nbytes == 60 * 80 * 5
    third = predicted(service, encoded())
    assert first.prediction is None and second.prediction and third.prediction
    service.close(third)
    assert third.token not in service.sessions


def test_pixels_of_a_segmentor_follow_its_memory(service_of):
    """4 GiB for the scores: 10 classes of 4 bytes leave more than the usual limit."""
    service = service_of('segmentor')
    assert service.max_pixels == 25_000_000
    many = dict(classes=tuple(map(str, range(150))))
    predictor = type('Many', (), dict(vars(service.predictor), **many))
    assert Service(predictor, max_bytes=1).max_pixels == 2**32 // 600
    predictor.toolbox = 'mmdet'
    assert Service(predictor, max_bytes=1).max_pixels == 25_000_000


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--port', '70000'], '--port 70000 must be within 0..65535'),
        (['--max-mb', '0'], '--max-mb 0.0 must be larger than 0'),
        (['--max-pixels', '0'], '--max-pixels 0 must be at least 1'),
        (['--score-thr', '2'], '--score-thr 2.0 must be within 0..1'),
        (['--host', 'no.such.host.invalid'], 'cannot serve on no.such.host.invalid'),
        (['--port', 'TAKEN'], 'give another --port (0 takes a free one)'),
        (['--tile', '3', '--port', '0'], 'tile=3 must be at least 64'),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else '',
)
def test_wrong_arguments(options, message, models, monkeypatch, capsys):
    with socket.create_server(('127.0.0.1', 0)) as taken:
        port = str(taken.getsockname()[1])
        options = [port if option == 'TAKEN' else option for option in options]
        paths = map(str, models['segmentor'])
        monkeypatch.setattr(sys, 'argv', ['overlock', 'serve', *paths, *options])
        with pytest.raises(SystemExit) as ended:
            main()
    error = capsys.readouterr().err.splitlines()[-1]
    assert ended.value.code == 2 and error.startswith('error: ') and message in error


FORM = {'Content-Type': 'multipart/form-data; boundary=x'}


def form(count):
    """A form with a file of so many times 64 KB, whose length is not announced."""
    yield b'--x\r\nContent-Disposition: form-data; name="file"; filename="a.png"\r\n\r\n'
    for _ in range(count):
        yield bytes(2**16)
    yield b'\r\n--x--\r\n'


def test_the_server(models, tmp_path):
    """One line with the address; a page from here alone; nothing left; Ctrl-C ends it.

    Also while a model is at work that takes long.
    """
    for folder in ('tmp', 'here', 'modules'):
        (tmp_path / folder).mkdir()
    config, checkpoint = models['segmentor']
    (tmp_path / 'slow_segmentor.py').write_text(
        f'_base_ = {str(config)!r}\n'
        "custom_imports = dict(imports=['overlock_mm', 'slow_model'])\n"
    )
    (tmp_path / 'modules/slow_model.py').write_text(
        'import time\nfrom overlock_mm import Predictor\n'
        'Predictor.predict = lambda *_: print("at work", flush=True) or time.sleep(100)\n'
    )
    process = subprocess.Popen(
        [sys.executable, '-m', 'overlock_mm', 'serve']
        + [str(tmp_path / 'slow_segmentor.py'), str(checkpoint)]
        + ['--port', '0', '--max-mb', '1', '--device', 'cpu'],
        cwd=tmp_path / 'here',
        env=dict(
            os.environ,
            TMPDIR=str(tmp_path / 'tmp'),
            PYTHONPATH=f'{ROOT}{os.pathsep}{tmp_path}/modules',
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(120, process.kill)
    watchdog.start()
    try:
        printed = []
        for line in process.stdout:
            printed.append(line)
            if line.startswith('Serving'):
                break
        address = re.fullmatch(
            r'Serving slow_segmentor on (http://127\.0\.0\.1:\d+) \(Ctrl-C stops it\)\n',
            printed[-1],
        )[1]
        with httpx.Client(base_url=address, timeout=60) as client:
            page = client.get('/').text
            assert 'Drop an image here' in page
            for url in re.findall(r'(?:src|href)="([^"]+)"', page):
                assert not url.startswith(('http', '//')), url
            (path,) = re.findall(r'/_nicegui/client/[\w-]+/upload/\d+', page)
            # the server may hang up before all is sent
            with contextlib.suppress(httpx.WriteError):
                response = client.post(path, files=dict(file=('a.png', bytes(3 * 2**20))))
                assert response.status_code == 413
            with contextlib.suppress(httpx.WriteError):
                response = client.post(path, content=form(64), headers=FORM)
                assert response.status_code == 413
            response = client.post(path, files=dict(file=('a.png', encoded())))
            assert response.json() == dict(upload='success')
            assert process.stdout.readline() == 'at work\n'
        process.send_signal(signal.SIGINT)
        out, error = process.communicate(timeout=20)
    finally:
        watchdog.cancel()
        process.kill()
    assert process.returncode == 130
    assert 'Traceback' not in error and 'ERROR' not in error, error
    assert out == ''
    assert list(Path(tmp_path / 'here').iterdir()) == []
    assert [p for p in Path(tmp_path / 'tmp').rglob('*') if 'overlock' in p.name] == []
