"""The command that counts parameters and multiply-adds."""

import importlib.util
import json
import re
from pathlib import Path

import pytest
import torch
from helpers import ROOT
from mmcv.ops import ModulatedDeformConv2dPack
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from overlock_mm import cli
from overlock_mm.apis import flops
from overlock_mm.apis.flops import count
from overlock_mm.errors import UserError
from overlock_mm.models.classifier import OverLoCKClassifier

PUBLISHED = dict(xt=(16, 2.6), t=(33, 5.5), s=(56, 9.7), b=(95, 16.7))
SEGMENTOR = """
default_scope = 'mmseg'
crop_size = (64, 96)
model = dict(
    type='EncoderDecoder', pretrained='open-mmlab://resnet18_v1c',
    data_preprocessor=dict(type='SegDataPreProcessor', size=(64, 96)),
    backbone=dict(type='ResNetV1c', depth=18, num_stages=4, out_indices=(0, 1, 2, 3),
                  norm_cfg=dict(type='SyncBN')),
    decode_head=dict(type='FCNHead', in_channels=512, in_index=3, channels=16, num_convs=1,
                     num_classes=5, concat_input=False, kernel_size=1),
    auxiliary_head=dict(type='FCNHead', in_channels=256, in_index=2, channels=8,
                        num_convs=1, num_classes=5, concat_input=False),
    train_cfg=dict(), test_cfg=dict(mode='whole'))
"""


def by_name(counted):
    return {' / '.join(part.name): part for part in counted.parts}


def check_sums(counted):
    """The parts add up to what they are parts of."""
    parts = by_name(counted)
    for whole, depth in ((counted, 1), (parts.get('backbone'), 2)):
        below = [p for p in counted.parts if len(p.name) == depth]
        if whole is not None and below:
            assert sum(p.parameters for p in below) == whole.parameters
            assert sum(p.multiply_adds for p in below) == whole.multiply_adds
    return parts


@pytest.mark.parametrize(
    'arch',
    [pytest.param(a, marks=pytest.mark.slow if a in 'sb' else ()) for a in PUBLISHED],
)
def test_archs_against_the_paper_and_the_page(arch):
    counted = count(arch, deploy=True)
    parts = check_sums(counted)
    millions, billions = PUBLISHED[arch]
    parameters = counted.parameters - parts['aux_head'].parameters
    assert parameters // 10**6 in (millions, millions - 1)
    # the page explains that the paper counts less than this, and more than without ContMix
    assert billions < counted.multiply_adds / 1e9 < 1.04 * billions
    row = re.search(rf'^\| {arch} \|.*$', (ROOT / 'docs/flops.md').read_text(), re.M)[0]
    assert f'| {parameters / 1e6:.2f}M |' in row
    assert f'| {counted.multiply_adds / 1e9:.2f}G |' in row


def test_parts_of_the_classifier():
    """Counted by hand from the layers, and what ContMix has in its 8 blocks."""
    parts = by_name(count('xt', (64, 96), deploy=True))
    model, layers = OverLoCKClassifier('xt', deploy=True).eval(), {}

    def add(module, args, out):
        layers[module] = out.numel() * module.weight[0].numel()

    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and not name.endswith('weight_proj'):
            module.register_forward_hook(add)
    with torch.no_grad():
        model(torch.zeros(1, 3, 64, 96))
    names = dict(model.named_modules())
    sums = dict.fromkeys(('blocks[123]', 'blocks4|high', 'sub_blocks', 'patch_embed'), 0)
    contmix = 0
    for name, module in names.items():
        for start in sums:
            if re.match(start, name):
                sums[start] += layers.get(module, 0)
        if name.startswith('sub_blocks') and re.search(r'weight_(query|key)', name):
            contmix += layers.get(module, 0)
    # maps smaller than the kernel are enlarged to its size, and their long side with it
    for blocks, dim, heads, kernel, (h, w) in (
        (6, 256, 8, 13, (13, 19)),
        (2, 336, 12, 7, (7, 10)),
    ):
        taps = 25 + kernel**2
        affinity, projection = dim // 2 * 49, heads * 49 * taps
        op = blocks * h * w * (affinity + projection + dim // 2 * taps)
        contmix, sums['sub_blocks'] = contmix + op, sums['sub_blocks'] + op
    assert parts['backbone / Base-Net'].multiply_adds == sums['blocks[123]']
    assert parts['backbone / Overview-Net'].multiply_adds == sums['blocks4|high']
    assert parts['backbone / stem and downsampling'].multiply_adds == sums['patch_embed']
    assert parts['backbone / Focus-Net'].multiply_adds == sums['sub_blocks']
    assert parts['backbone / Focus-Net / of it ContMix'].multiply_adds == contmix
    assert parts['head'].multiply_adds == 420 * 1024 * 2 * 3 + 1024 * 1000
    assert parts['aux_head'].multiply_adds == 0
    mixers = [m for n, m in names.items() if re.fullmatch(r'sub_blocks\d\.\d', n)]
    shared = ('weight_query', 'weight_key', 'weight_proj', 'rpb')
    assert parts['backbone / Focus-Net / of it ContMix'].parameters == sum(
        p.numel() for m in mixers for n, p in m.named_parameters() if n.startswith(shared)
    )


@pytest.mark.dev_stack
def test_attention():
    """torch has operations of its own for it on the CPU."""
    counted = count('timm/vit_tiny_patch16_224')
    tokens, dim = 197, 192
    block = 12 * tokens * dim**2 + 2 * tokens**2 * dim
    assert counted.multiply_adds == 196 * 768 * dim + 12 * block + dim * 1000
    layer = nn.TransformerEncoderLayer(16, 4, 32, batch_first=True).eval()
    counter = FlopCounterMode(display=False, custom_mapping=flops._missing_formulas())
    with torch.no_grad(), flops._without_fused_layers(), counter:
        layer(torch.zeros(2, 10, 16))
    expected = 2 * (10 * 4 * 16**2 + 2 * 10**2 * 16 + 2 * 10 * 16 * 32)
    assert counter.get_total_flops() == 2 * expected


@pytest.mark.dev_stack
def test_deformable_convolutions():
    layer = ModulatedDeformConv2dPack(8, 12, 3, padding=1, groups=2)
    counter = FlopCounterMode(display=False, custom_mapping=flops._missing_formulas())
    with torch.no_grad(), counter:
        layer(torch.zeros(2, 8, 10, 11))
    offsets = 2 * 110 * 27 * 8 * 9
    assert counter.get_total_flops() == 2 * (offsets + 2 * 110 * 12 * 4 * 9)


def test_a_segmentor_with_another_backbone(tmp_path, capsys, monkeypatch):
    """It has the size of the crop; heads that are not run are named; JSON is exact."""
    (tmp_path / 'segmentor.py').write_text(SEGMENTOR)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        'sys.argv', ['overlock', 'flops', 'segmentor.py', '--json', 'a.json']
    )
    cli.main()
    printed = capsys.readouterr().out
    assert 'segmentor.py, 64 x 96 pixels: convolutions and matrix products' in printed
    assert 'auxiliary_head: no multiply-adds at inference' in printed
    result = json.loads((tmp_path / 'a.json').read_text())
    assert result['shape'] == [64, 96]
    parts = {tuple(part['name']): part for part in result['parts']}
    assert list(parts) == [('backbone',), ('decode_head',), ('auxiliary_head',)]
    assert parts['decode_head',]['multiply_adds'] == 2 * 3 * (512 * 16 + 16 * 5)
    assert parts['decode_head',]['parameters'] == 512 * 16 + 16 + 16 * 5 + 5
    assert result['multiply_adds'] == sum(p['multiply_adds'] for p in parts.values())
    assert f'{result["multiply_adds"] / 1e9:.3f} G' in printed
    with pytest.raises(SystemExit):
        cli.main()
    assert 'a.json exists; give another name, or --force' in capsys.readouterr().err


def test_a_detector(configs):
    """The second stage gets as many regions as the config allows, whatever is found."""
    # one region of each level is found
    options = {'model.test_cfg.rpn.nms_pre': 1, 'model.test_cfg.rcnn.max_per_img': 10}
    counted = count(str(configs / 'detector.py'), (64, 96), cfg_options=options)
    parts = check_sums(counted)
    assert counted.notes[-1] == (  # torch 2.1 has another note before it
        'roi_head: 20 regions, as test_cfg.rpn.max_per_img says; masks of 10, as '
        'test_cfg.rcnn.max_per_img says'
    )
    # two layers of 256 channels, for 9 classes and the background; boxes are shared
    boxes = 256 * 49 * 256 + 256**2 + 256 * (9 + 1) + 256 * 4
    # on 14 x 14 positions, and behind a transposed convolution on 28 x 28
    masks = 14**2 * 9 * (256 + 64) * 64 + 28**2 * (64**2 + 64 * 9)
    assert parts['roi_head'].multiply_adds == 3 * (20 * boxes + 10 * masks)
    assert list(parts)[-3:] == ['neck', 'rpn_head', 'roi_head']


class Tied(nn.Module):
    """The decoder calls the head, whose weight it has, too, on a part of a parameter."""

    def __init__(self):
        super().__init__()
        self.decoder, self.head = nn.Module(), nn.Linear(4, 5)
        self.decoder.forward = lambda x: self.head(x)
        self.decoder.weight = self.head.weight
        self.query = nn.Parameter(torch.zeros(4, 4))

    def forward(self, x, mode):
        out = self.decoder(self.query[:3])
        if mode == 'tensor':
            raise NotImplementedError
        return out @ out.mT


def test_shared_layers_and_models_that_only_predict(monkeypatch):
    """Nothing counts twice: what the decoder runs, and what ran before an error."""
    subject = flops._Subject(
        name='tied',
        network=Tied(),
        shape=lambda: (2, 2),
        inputs=lambda *shape: (torch.zeros(1, 3, *shape),),
        modes=(dict(mode='tensor'), dict(mode='predict')),
        notes=[],
    )
    monkeypatch.setattr(flops, '_built', lambda model, cfg_options: subject)
    counted = count('tied')
    assert {name: tuple(part)[1:] for name, part in by_name(counted).items()} == dict(
        decoder=(4 * 5, 3 * 4 * 5), head=(5, 0), other=(4 * 4, 3 * 3 * 5)
    )
    assert (counted.parameters, counted.multiply_adds) == (41, 105)
    assert 'counted is a prediction, with what follows the layers' in counted.notes
    assert vars(subject.network.head).get('forward') is None  # nothing stays replaced


@pytest.mark.slow
def test_a_stock_detector_against_published_numbers():
    """Mask R-CNN with ResNet-50 at 800 x 1280: 44.2M and 260G.

    Papers about backbones give these numbers, https://arxiv.org/abs/2107.00641 for one.
    """
    root = Path(importlib.util.find_spec('mmdet').origin).parent / '.mim/configs'
    counted = count(str(root / 'mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'), (800, 1280))
    assert round(counted.parameters / 1e6) == 44
    assert counted.multiply_adds / 1e9 == pytest.approx(260, rel=0.01)


@pytest.mark.parametrize(
    'model, options, words',
    [
        (
            'nix',
            {},
            "nix is neither a config file nor an arch; .* xt, t, s or b, or 'timm/",
        ),
        ('nix.py', {}, 'config nix.py does not exist'),
        ('timm/resnet1', {}, r'cannot build resnet1: .*; did you mean .*resnet18'),
        ('timm/resnet18', dict(deploy=True), 'there is no OverLoCK .*; leave out --deploy'),
        ('xt', dict(shape=(16, 64)), 'xt fails on an image of 16 x 64 pixels: .*--shape'),
        ('xt', dict(shape=(0, 64)), '--shape 0 64 must be two positive numbers, H W'),
        ('xt', dict(cfg_options={'a': 1}), 'xt is not a config'),
    ],
)
def test_what_cannot_be_counted(model, options, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=words):
        count(model, **options)
