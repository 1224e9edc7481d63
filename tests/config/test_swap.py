"""Putting another backbone into configs, those of the toolboxes for the most part."""

import importlib.util
from pathlib import Path

import pytest
from helpers import CHANNELS, TINY
from mmengine.config import Config

import overlock_mm
from overlock_mm import archs
from overlock_mm.apis.swap import try_model, write_swapped
from overlock_mm.config.load import load_config
from overlock_mm.config.maps import maps_of
from overlock_mm.config.swap import swap
from overlock_mm.errors import UserError

ROOTS = {
    name: Path(importlib.util.find_spec(name).origin).parent / '.mim' / 'configs'
    for name in ('mmdet', 'mmseg')
}
MASK_RCNN = 'mmdet/mask_rcnn/mask-rcnn_r50-caffe_fpn_1x_coco.py'
UPERNET = 'mmseg/upernet/upernet_r50_4xb4-80k_ade20k-512x512.py'
PSPNET = 'mmseg/pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py'
T = [64, 128, 384, 640]


def stock(path):
    toolbox, _, rest = path.partition('/')
    return ROOTS[toolbox] / rest


def test_what_a_detector_becomes():
    cfg, notes = swap(stock(MASK_RCNN))
    backbone = cfg.model.backbone
    file = (
        'https://github.com/LMMMEng/OverLoCK/releases/download/v1/overlock_t_in1k_224.pth'
    )
    assert backbone == dict(
        type='OverLoCK',
        arch='t',
        context_skip=True,
        drop_path_rate=0.2,
        frozen_stages=1,
        norm_eval=True,
        init_cfg=dict(type='Pretrained', checkpoint=file),
    )
    assert cfg.model.neck.in_channels == T
    preprocessor = cfg.model.data_preprocessor
    assert preprocessor.bgr_to_rgb and preprocessor.mean == [123.675, 116.28, 103.53]
    assert preprocessor.std == [58.395, 57.12, 57.375] and preprocessor.pad_mask
    assert cfg.sync_bn == 'torch'
    assert cfg.default_hooks.loading.type == 'StrictLoadingHook'
    assert cfg.custom_imports.imports == [
        'overlock_mm',
        'overlock_mm.hooks',
        'overlock_mm.datasets',
    ]
    said = '\n'.join(notes)
    for words in ('ResNet -> OverLoCK(arch=t', 'RGB, mean', 'sync_bn', 'SGD'):
        assert words in said
    assert f'neck.in_channels: [256, 512, 1024, 2048] -> {T}' in notes


def test_what_a_segmentor_becomes():
    given = Config.fromfile(stock(UPERNET))
    before = given.to_dict()
    cfg = overlock_mm.swap_backbone(given, 's', drop_path_rate=0.25, with_cp=True)
    assert given.to_dict() == before
    assert cfg.model.pretrained is None
    assert cfg.model.decode_head.in_channels == [64, 128, 448, 640]
    assert cfg.model.auxiliary_head.in_channels == 448
    backbone = cfg.model.backbone
    assert backbone.drop_path_rate == 0.25 and backbone.with_cp
    assert 'context_skip' not in backbone and 'norm_cfg' not in backbone


def test_what_is_changed_is_printed(capsys):
    overlock_mm.swap_backbone(stock(UPERNET), pretrained=False)
    out = capsys.readouterr().out
    assert 'model.backbone: ResNetV1c -> OverLoCK(arch=t' in out
    assert 'model.pretrained: open-mmlab://resnet50_v1c -> None' in out


def test_frozen_stages_need_weights():
    cfg, notes = swap(stock(MASK_RCNN), pretrained=False)
    assert 'frozen_stages' not in cfg.model.backbone
    assert 'init_cfg' not in cfg.model.backbone
    assert any(note.startswith('frozen_stages: left out') for note in notes)


def test_options_win():
    cfg, _ = swap(stock(MASK_RCNN), norm_eval=False, frozen_stages=2, context_skip=False)
    assert not cfg.model.backbone.norm_eval and not cfg.model.backbone.context_skip
    assert cfg.model.backbone.frozen_stages == 2


# the shape of what reads the backbone: config, key, its channels after
READERS = [
    ('mmdet/detr/detr_r50_8xb2-150e_coco.py', 'neck.in_channels', [640]),
    ('mmdet/yolof/yolof_r50-c5_8xb8-1x_coco.py', 'neck.in_channels', 640),
    ('mmdet/yolo/yolov3_d53_8xb8-320-273e_coco.py', 'neck.in_channels', [640, 384, 128]),
    ('mmdet/libra_rcnn/libra-faster-rcnn_r50_fpn_1x_coco.py', 'neck.0.in_channels', T),
    ('mmdet/ssd/ssd300_coco.py', 'neck.out_channels', (128, 384, 512, 256, 256, 256)),
    ('mmdet/ssd/ssd300_coco.py', 'bbox_head.in_channels', (128, 384, 512, 256, 256, 256)),
    (
        'mmdet/mask2former/mask2former_r50_8xb2-lsj-50e_coco.py',
        'panoptic_head.in_channels',
        T,
    ),
    (
        'mmdet/soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
        'detector.neck.in_channels',
        T,
    ),
    (
        'mmseg/segnext/segnext_mscan-t_1xb16-adamw-160k_ade20k-512x512.py',
        'decode_head.in_channels',
        [128, 384, 640],
    ),
    ('mmseg/ocrnet/ocrnet_hr48_4xb4-80k_ade20k-512x512.py', 'decode_head.1.in_channels', T),
    (
        'mmseg/fastfcn/fastfcn_r50-d32_jpu_psp_4xb4-80k_ade20k-512x512.py',
        'auxiliary_head.in_channels',
        384,
    ),
    (
        'mmseg/vit/vit_vit-b16_mln_upernet_8xb2-80k_ade20k-512x512.py',
        'decode_head.in_channels',
        T,
    ),
    (
        'mmseg/convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py',
        'auxiliary_head.in_channels',
        384,
    ),
]


@pytest.mark.parametrize('path, key, channels', READERS)
def test_all_that_reads_the_backbone(path, key, channels):
    cfg, _ = swap(stock(path))
    node = cfg.model
    for name in key.split('.'):
        node = node[int(name)] if name.isdigit() else node[name]
    assert node == channels


def test_dilated_heads():
    with pytest.raises(UserError, match=r'strides \[8, 8\].*get \[16, 32\].*keep-strides'):
        swap(stock(PSPNET))
    cfg, _ = swap(stock(PSPNET), keep_strides=True)
    neck = cfg.model.neck
    assert neck.in_channels == [384, 640] and neck.scales == [2, 4]
    assert cfg.model.backbone.out_indices == (2, 3)
    assert cfg.model.decode_head.in_channels == cfg.model.auxiliary_head.in_channels == 256
    assert (cfg.model.auxiliary_head.in_index, cfg.model.decode_head.in_index) == (0, 1)


REFUSED = [
    ('mmdet/tridentnet/tridentnet_r50-caffe_1x_coco.py', 'branches share the weights'),
    ('mmdet/detectors/detectors_htc-r50_1x_coco.py', 'neck has copies of the backbone'),
    (
        'mmdet/faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py',
        r'without a neck \(C4 or DC5\)',
    ),
    (
        'mmdet/cornernet/cornernet_hourglass104_8xb6-210e-mstest_coco.py',
        'maps of one stride',
    ),
    ('mmdet/misc/d2_retinanet_r50-caffe_fpn_ms-90k_coco.py', 'belongs to another library'),
    (
        'mmseg/segmenter/segmenter_vit-s_fcn_8xb1-160k_ade20k-512x512.py',
        'and not a pyramid',
    ),
    ('mmseg/san/san-vit-b16_coco-stuff164k-640x640.py', 'no backbone'),
    ('mmseg/stdc/stdc1_4xb12-80k_cityscapes-512x1024.py', 'has decoded itself'),
    (
        'mmseg/bisenetv1/bisenetv1_r50-d32_4xb4-160k_cityscapes-1024x1024.py',
        'plain backbone',
    ),
    (
        'mmseg/pidnet/pidnet-s_2xb6-120k_1024x1024-cityscapes.py',
        'not return a tuple of maps',
    ),
]


@pytest.mark.parametrize('path, message', REFUSED)
def test_what_cannot_work(path, message, tmp_path):
    out = tmp_path / 'new.py'
    with pytest.raises(UserError, match=message):
        write_swapped(str(stock(path)), str(out), keep_strides=True)
    assert not out.exists()


@pytest.mark.parametrize(
    'options, message',
    [
        (dict(arch='tiny2'), "arch='tiny2' is unknown; choose.*or give 'timm/NAME'"),
        (dict(arch='timm/vit_tiny_patch16_224'), r'out_strides=\(4, 8, 16, 32\).*\[16\]'),
        (dict(arch='timm/none'), 'Unknown model'),
        (dict(no_such_option=1), 'no_such_option'),
        (dict(out_indices=(0, 1)), 'out_indices cannot be given: it follows'),
        (dict(backbone=dict(type='ResNet', depth=18, strides=(1, 2, 2, 1))), 'out_indices'),
    ],
)
def test_backbones_that_do_not_fit(options, message):
    with pytest.raises(UserError, match=message):
        swap(stock(UPERNET), **options)


def test_configs_without_a_model(tmp_path):
    path = tmp_path / 'a.py'
    path.write_text("default_scope = 'mmdet'")
    with pytest.raises(UserError, match='a.py has no model'):
        swap(path)
    path.write_text(
        "default_scope = 'mmdet'\n"
        "model = dict(a=dict(backbone=dict(type='A')), b=dict(backbone=dict(type='B')))"
    )
    with pytest.raises(UserError, match='model.a.backbone, model.b.backbone; one'):
        swap(path)
    path.write_text(
        "default_scope = 'mmdet'\nmodel = dict(type='RetinaNet', "
        "backbone=dict(type='ResNet', depth=18), neck=dict(type='MyNeck'))"
    )
    with pytest.raises(UserError, match='nothing in this RetinaNet was found to read'):
        swap(path)


def test_models_of_timm():
    cfg, _ = swap(stock(UPERNET), 'timm/convnext_pico', drop_path_rate=0.1)
    backbone = cfg.model.backbone
    assert backbone == dict(
        type='TimmBackbone', model_name='convnext_pico', pretrained=True, drop_path_rate=0.1
    )
    assert cfg.model.decode_head.in_channels == [64, 128, 256, 512]
    swin = 'timm/swin_tiny_patch4_window7_224'
    cfg, _ = swap(stock(UPERNET), swin, strict_img_size=False)
    assert cfg.model.decode_head.in_channels == [96, 192, 384, 768]
    cfg, _ = swap(stock('mmdet/detr/detr_r50_8xb2-150e_coco.py'), 'timm/efficientnet_b0')
    assert cfg.model.backbone.out_strides == (32,) and cfg.model.neck.in_channels == [320]


def test_mean_and_std_of_a_model_of_timm():
    cfg, _ = swap(stock(UPERNET), 'timm/mobilevitv2_050')  # trained on images in 0..1
    assert cfg.model.data_preprocessor.mean == [0, 0, 0]
    assert cfg.model.data_preprocessor.std == [255, 255, 255]


def test_any_registered_backbone():
    swin = dict(type='SwinTransformer', depths=(1, 1, 1, 1), out_indices=(1, 2, 3))
    cfg, _ = swap(stock('mmdet/dino/dino-4scale_r50_8xb2-12e_coco.py'), backbone=swin)
    assert cfg.model.neck.in_channels == [192, 384, 768]
    swin['init_cfg'] = dict(type='Pretrained', checkpoint='swin.pth')
    dino = stock('mmdet/dino/dino-4scale_r50_8xb2-12e_coco.py')
    assert swap(dino, backbone=swin)[0].model.backbone.init_cfg.checkpoint == 'swin.pth'
    cfg, _ = swap(dino, backbone=swin, pretrained=False)
    assert cfg.model.backbone.init_cfg is None and swin['init_cfg']
    assert cfg.model.data_preprocessor.mean == [123.675, 116.28, 103.53]


def test_weights_of_the_old_model():
    path = 'mmdet/qdtrack/qdtrack_faster-rcnn_r50_fpn_4e_base.py'
    cfg, notes = swap(stock(path))
    assert cfg.model.detector.init_cfg is None
    assert 'model.detector.init_cfg: left out, weights of the old model' in notes
    given = Config.fromfile(stock(MASK_RCNN))
    given.load_from = 'https://host/mask_rcnn_r50.pth'
    cfg, _ = swap(given)
    assert cfg.load_from is None


def test_optimizers():
    cfg, notes = swap(stock('mmdet/detr/detr_r50_8xb2-150e_coco.py'))
    keys = cfg.optim_wrapper.paramwise_cfg.custom_keys
    assert 'norm' not in keys and keys.backbone.lr_mult == 0.1
    assert any("'backbone' also decides" in note for note in notes)
    cfg, _ = swap(stock('mmdet/pvt/retinanet_pvt-t_fpn_1x_coco.py'))
    assert cfg.optim_wrapper.paramwise_cfg.custom_keys.norm.decay_mult == 0
    decay = 'mmseg/convnext/convnext-tiny_upernet_8xb2-amp-160k_ade20k-512x512.py'
    cfg, _ = swap(stock(decay))
    assert cfg.optim_wrapper.constructor == 'OverLoCKLayerDecayConstructor'
    assert cfg.optim_wrapper.paramwise_cfg.decay_rate == 0.9
    cfg, _ = swap(stock(decay), 'timm/resnet18')
    assert 'constructor' not in cfg.optim_wrapper


def test_other_numbers_of_channels(tmp_path):
    path = 'mmseg/swin/swin-tiny-patch4-window7_upernet_1xb8-20k_levir-256x256.py'
    cfg, notes = swap(stock(path))
    assert cfg.model.backbone.in_channels == 6 and 'init_cfg' not in cfg.model.backbone
    assert 'pretrained weights: there are none for 6 channels' in notes
    assert len(cfg.model.data_preprocessor.mean) == 6


# a small model of each shape: necks and heads, and one step of each
@pytest.mark.parametrize(
    'path',
    [
        pytest.param(
            'mmdet/retinanet/retinanet_r50_fpn_1x_coco.py', marks=pytest.mark.slow
        ),
        pytest.param('mmdet/solo/solo_r50_fpn_1x_coco.py', marks=pytest.mark.slow),
        'mmdet/soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',
        'mmseg/segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',
        pytest.param(
            'mmseg/fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py', marks=pytest.mark.slow
        ),
    ],
)
def test_families(path, tmp_path, capsys):
    options = dict(pretrained=False, keep_strides='mmseg' in path)
    _, notes, out = write_swapped(
        str(stock(path)), str(tmp_path / 'new.py'), TINY, build=True, **options
    )
    assert out.exists() and notes[-1].startswith('built: one loss and one prediction')
    assert 'NormalInit' not in capsys.readouterr().out


def test_a_model_without_a_preprocessor(tmp_path):
    path = tmp_path / 'a.py'
    segformer = 'mmseg/segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
    cfg = Config.fromfile(stock(segformer))
    cfg.model.pop('data_preprocessor')
    for key in ('data_preprocessor', 'optim_wrapper', 'default_hooks'):
        cfg.pop(key)
    cfg.dump(path)
    try_model(swap(path, TINY)[0])


def test_a_model_that_fails_is_not_written(tmp_path):
    base, out = tmp_path / 'base.py', tmp_path / 'new.py'
    # the head expects other channels than the neck gives
    base.write_text(
        f"_base_ = '{stock('mmdet/retinanet/retinanet_r50_fpn_1x_coco.py')}'\n"
        'model = dict(bbox_head=dict(in_channels=128))'
    )
    with pytest.raises(UserError, match='fails on random images: RuntimeError'):
        write_swapped(str(base), str(out), TINY, build=True)
    assert not out.exists()


def without_scopes(node):
    """Without what mmengine notes on keys that a config inherits from a toolbox."""
    if isinstance(node, dict):
        return {k: without_scopes(v) for k, v in node.items() if k != '_scope_'}
    if isinstance(node, list | tuple):
        return type(node)(without_scopes(v) for v in node)
    return node


@pytest.mark.parametrize('path', [MASK_RCNN, UPERNET, READERS[3][0], PSPNET])
@pytest.mark.parametrize('arch', ['xt', 'timm/resnet18'])
def test_the_written_config(path, arch, tmp_path):
    out = tmp_path / 'new.py'
    options = dict(keep_strides=True, arch=arch)
    text, notes, written = write_swapped(str(stock(path)), str(out), **options)
    assert written == out and out.read_text() == text and len(text.splitlines()) < 60
    assert '_base_ = ' in text.splitlines()[0]
    expected, _ = swap(stock(path), **options)
    assert without_scopes(Config.fromfile(out).to_dict()) == expected.to_dict()
    with pytest.raises(UserError, match='new.py exists; give another name, or --force'):
        write_swapped(str(stock(path)), str(out), **options)


BASE = """
from mmseg.models import EncoderDecoder, FCNHead, ResNet, SegDataPreProcessor

model = dict(
    type=EncoderDecoder,
    data_preprocessor=dict(type=SegDataPreProcessor, size=(64, 64)),
    backbone=dict(type=ResNet, depth=18, norm_eval=True),
    decode_head=dict(type=FCNHead, in_channels=512, in_index=3, channels=8, num_classes=2),
    auxiliary_head=[
        dict(type=FCNHead, in_channels=256, in_index=2, channels=8, num_classes=2)
    ],
    test_cfg=dict(mode='whole'),
)
"""


@pytest.mark.parametrize('folder', ['.', 'sub'])
def test_pure_python_configs(folder, tmp_path):
    (tmp_path / 'base.py').write_text(BASE)
    (tmp_path / 'sub').mkdir()
    out = tmp_path / folder / 'new.py'
    text, *_ = write_swapped(str(tmp_path / 'base.py'), str(out), TINY)
    dots = '.' if folder == '.' else '..'
    assert f'with read_base():\n    from {dots}base import *' in text
    cfg = load_config(out)
    assert cfg.model.decode_head.in_channels == CHANNELS[3]
    assert cfg.model.auxiliary_head[0].in_channels == CHANNELS[2]
    assert cfg.model.backbone.norm_eval
    try_model(cfg)


def test_drop_path_rates_are_those_of_our_configs():
    root = Path(__file__).resolve().parents[2] / 'configs'
    names = dict(mmseg='segmentation/upernet', mmdet='detection/mask_rcnn')
    for toolbox, rates in archs.DENSE_DROP_PATH.items():
        end = '' if toolbox == 'mmseg' else '_1x'
        for arch, rate in rates.items():
            cfg = Config.fromfile(root / f'{names[toolbox]}_overlock_{arch}{end}.py')
            assert cfg.model.backbone.drop_path_rate == rate


def test_maps_of_backbones_that_cannot_run():
    with pytest.raises(UserError, match='NoSuchNet cannot be built and run alone'):
        maps_of(dict(type='NoSuchNet'))
