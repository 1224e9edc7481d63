"""The toolboxes' own inference and drawing have the class names of the loaded file."""

import numpy as np
import pytest
import torch
from mmengine.config import Config

from overlock_mm import load_checkpoint

IMAGE = np.random.default_rng(0).integers(0, 256, (96, 80, 3), np.uint8)


def save(path, model, meta):
    torch.save(dict(meta=meta, state_dict=model.state_dict()), path)


@pytest.mark.parametrize('former', [False, True])
def test_a_detector(stock, tmp_path, demo_data, monkeypatch, former):
    from mmdet.apis import inference_detector, init_detector
    from mmdet.registry import VISUALIZERS

    monkeypatch.chdir(demo_data)
    config = stock('mmdet')
    model = init_detector(str(config), device='cpu')
    assert (
        len(model.dataset_meta['classes']) == 80
    )  # MMDetection's guess, of a detector with nine classes
    metainfo = dict(Config.fromfile(config).metainfo)
    meta = dict(dataset_meta=metainfo)
    if former:
        meta = {k.upper(): v for k, v in metainfo.items()}
    save(tmp_path / 'w.pth', model, meta)
    load_checkpoint(model, tmp_path / 'w.pth')
    classes = model.dataset_meta['classes']
    assert len(classes) == 9 and classes == metainfo['classes']
    result = inference_detector(model, IMAGE)
    visualizer = VISUALIZERS.build(dict(type='DetLocalVisualizer', name=f'names {former}'))
    visualizer.dataset_meta = model.dataset_meta
    written = []
    draw = type(visualizer).draw_texts

    def record(self, texts, *args, **kwargs):
        written.extend([texts] if isinstance(texts, str) else texts)
        return draw(self, texts, *args, **kwargs)

    monkeypatch.setattr(type(visualizer), 'draw_texts', record)
    visualizer.add_datasample('', IMAGE, result, draw_gt=False, pred_score_thr=0.0)
    assert written and {text.split(':')[0] for text in written} <= set(classes)


@pytest.mark.parametrize('former', [False, True])
def test_a_segmentor(stock, tmp_path, demo_data, monkeypatch, former):
    from mmseg.apis import inference_model, init_model, show_result_pyplot

    monkeypatch.chdir(demo_data)
    config = stock('mmseg')
    model = init_model(str(config), device='cpu')
    assert not hasattr(model, 'dataset_meta')
    metainfo = dict(Config.fromfile(config).metainfo)
    meta = dict(dataset_meta=metainfo)
    if former:
        meta = {k.upper(): v for k, v in metainfo.items()}
    save(tmp_path / 'w.pth', model, meta)
    load_checkpoint(model, tmp_path / 'w.pth')
    result = inference_model(model, IMAGE)
    drawn = show_result_pyplot(
        model, IMAGE, result, show=False, opacity=1.0, with_labels=False, draw_gt=False
    )
    colours = {tuple(colour) for colour in drawn.reshape(-1, 3).tolist()}
    assert colours <= {tuple(colour) for colour in metainfo['palette']}
