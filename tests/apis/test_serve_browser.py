"""overlock serve in a real browser: drop an image, look at pixels, download.

Not in make test; needs Debian's package chromium, see make test-browser.
"""

import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch
from helpers import ROOT
from PIL import Image

from overlock_mm import Predictor
from overlock_mm.config.load import build_model, load_config

pytestmark = pytest.mark.browser
IMAGE = np.random.default_rng(0).integers(0, 256, (15, 20, 3), np.uint8)
IMAGE = IMAGE.repeat(32, 0).repeat(32, 1)  # not enlarged, and with areas to look at


@pytest.fixture(scope='module')
def browser():
    from playwright.sync_api import sync_playwright

    path = shutil.which('chromium')
    assert path, 'chromium is not installed; run: apt-get install chromium'
    with sync_playwright() as playwright:
        options = ['--no-sandbox']  # which Chromium wants where tests run as root
        browser = playwright.chromium.launch(executable_path=path, args=options)
        yield browser
        browser.close()


@pytest.fixture(scope='module', params=['segmentor', 'detector'])
def served(request, configs, tmp_path_factory):
    """A server: (its address, the same model, the task, a folder)."""
    folder = tmp_path_factory.mktemp(request.param)
    config, checkpoint = configs / f'{request.param}.py', folder / 'model.pth'
    cfg = load_config(config)
    torch.manual_seed(0)
    model = build_model(cfg)
    model.init_weights()
    meta = dict(dataset_meta=dict(cfg.metainfo))
    torch.save(dict(state_dict=model.state_dict(), meta=meta), checkpoint)
    Image.fromarray(IMAGE).save(folder / 'photo.png')
    (folder / 'notes.jpg').write_text('Dear diary')
    (folder / 'notes.txt').write_text('Dear diary')
    (folder / 'large.png').write_bytes(bytes(5 * 2**20))
    process = subprocess.Popen(
        [sys.executable, '-m', 'overlock_mm', 'serve', str(config), str(checkpoint)]
        + ['--port', '0', '--max-mb', '4', '--score-thr', '0', '--device', 'cpu'],
        cwd=folder,
        env=dict(os.environ, PYTHONPATH=str(ROOT)),
        stdout=subprocess.PIPE,
        text=True,
    )
    watchdog = threading.Timer(300, process.kill)
    watchdog.start()
    try:
        line = next(line for line in process.stdout if line.startswith('Serving'))
        address = re.search(r'http://\S+', line)[0]
        yield address, Predictor(config, checkpoint, 'cpu'), request.param, folder
    finally:
        watchdog.cancel()
        process.terminate()
        process.wait(30)


@pytest.fixture(params=[(1280, 800), (390, 844)], ids=['desktop', 'phone'])
def page(request, served, browser):
    """The open page; it must ask no other server, and have no error in its console."""
    address, foreign, errors = served[0], [], []
    page = browser.new_page(
        viewport=dict(zip(('width', 'height'), request.param, strict=True))
    )
    page.set_default_timeout(15_000)
    page.on('console', lambda m: m.type == 'error' and errors.append(m.text))
    page.on('pageerror', lambda error: errors.append(str(error)))
    page.on(
        'request',
        lambda r: r.url.startswith((address, 'data:', 'blob:')) or foreign.append(r.url),
    )
    page.goto(address)
    page.get_by_text('Drop an image here').wait_for()
    yield page
    page.close()
    assert not foreign and not errors


def drop(page, path):
    """Drop a file as from a file manager."""
    data = page.evaluate_handle(
        """([bytes, name]) => {
            const data = new DataTransfer();
            const file = new File([new Uint8Array(bytes)], name, {type: 'image/png'});
            data.items.add(file);
            return data;
        }""",
        [list(path.read_bytes()), path.name],
    )
    page.dispatch_event('.q-uploader', 'dragover', dict(dataTransfer=data))
    page.dispatch_event('.q-uploader__dnd', 'drop', dict(dataTransfer=data))


def picture(page, after=None):
    """Pixels of the picture that is shown, once it is another one than ``after``."""
    page.wait_for_function(
        """(before) => {
            const image = document.querySelector('img.picture');
            return image && image.src && image.src != before && image.complete
                && image.naturalWidth;
        }""",
        arg=after,
    )
    url = page.evaluate(
        """() => {
            const image = document.querySelector('img.picture');
            const canvas = document.createElement('canvas');
            canvas.width = image.naturalWidth; canvas.height = image.naturalHeight;
            canvas.getContext('2d').drawImage(image, 0, 0);
            return canvas.toDataURL();
        }"""
    )
    content = io.BytesIO(base64.b64decode(url.partition(',')[2]))
    return np.asarray(Image.open(content).convert('RGB')).astype(int)


def source(page):
    return page.evaluate("document.querySelector('img.picture').src")


def close(found, expected, before=None):
    """Equal but for what JPEG does, and another picture than before."""
    assert found.shape == expected.shape
    error = np.abs(found - expected.astype(int)).mean()
    assert error < 6
    assert before is None or np.abs(found - before).mean() > 2 * error


def to_the_end(page, name):
    """Click at the right end of a slider."""
    slider = page.get_by_role('slider', name=name)
    box = slider.bounding_box()
    slider.click(position=dict(x=box['width'] - 1, y=box['height'] / 2))


def saved(page, button):
    with page.expect_download() as download:
        page.get_by_text(button).click()
    return download.value.suggested_filename, download.value.path().read_bytes()


def test_an_image_from_drop_to_download(served, page, request):
    address, predictor, task, folder = served
    result = predictor(IMAGE)
    drop(page, folder / 'photo.png')
    first = picture(page)
    draw = dict(score_thr=0, legend=False)
    close(first, predictor.draw(IMAGE, result, **draw))
    box = page.locator('img.picture').bounding_box()
    assert box['width'] > 300 and box['x'] >= 0
    assert page.evaluate('document.documentElement.scrollWidth <= window.innerWidth')

    src = source(page)
    name = page.locator('.q-checkbox').first.inner_text()
    page.locator('.q-checkbox').first.click()
    hidden = picture(page, src)
    close(hidden, predictor.draw(IMAGE, result, hidden=[name], **draw), first)

    src = source(page)
    to_the_end(page, 'Opacity')
    opaque = picture(page, src)
    page.get_by_text('1.00', exact=True).wait_for()
    expected = predictor.draw(IMAGE, result, hidden=[name], opacity=1, **draw)
    close(opaque, expected, hidden)

    file, content = saved(page, 'Picture (PNG)')
    assert file == 'photo_picture.png'
    found = np.asarray(Image.open(io.BytesIO(content)))
    expected = predictor.draw(IMAGE, result, hidden=[name], opacity=1, score_thr=0)
    np.testing.assert_array_equal(found, expected)

    if task == 'segmentor':
        file, content = saved(page, 'Label map (PNG)')
        assert file == 'photo_label_map.png'
        labels = result.pred_sem_seg.data[0].numpy()
        np.testing.assert_array_equal(np.asarray(Image.open(io.BytesIO(content))), labels)
    else:
        shown = [i for i in result.pred_instances.labels if predictor.classes[i] != name]
        file, content = saved(page, 'Objects shown (COCO)')
        assert file == 'photo_coco.json'
        assert len(json.loads(content)['annotations']) == len(shown) > 0
        src = source(page)
        to_the_end(page, 'Lowest score')
        page.get_by_text('none with a score of 1.00 or more').wait_for()
        close(picture(page, src), IMAGE, opaque)


def test_messages(served, page):
    folder = served[3]
    chooser = page.locator('input[type=file]')
    for name, message in (
        ('notes.jpg', 'notes.jpg is not an image that can be read.'),
        ('notes.txt', 'notes.txt is not of a kind that is read here'),
        ('large.png', 'large.png has 5.0 MB, and at most 4 MB can be uploaded.'),
    ):
        chooser.set_input_files(folder / name)
        page.get_by_text(message).wait_for()
    chooser.set_input_files(folder / 'photo.png')
    first = picture(page)
    page.get_by_role('alert').wait_for(state='hidden')
    src = source(page)
    chooser.set_input_files(folder / 'photo.png')  # the same file again
    np.testing.assert_array_equal(picture(page, src), first)
