"""The classifier and its timm interface: what timm's own tests ask of a model, and more."""

import argparse
import copy
import json
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
from helpers import TINY, filled, image, randomised, relative_error
from timm.loss import SoftTargetCrossEntropy
from timm.models import FeatureInfo, create_feature_extractor, group_parameters
from timm.task import ClassificationTask
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

import overlock_mm.timm
from overlock_mm import OverLoCK, fold
from overlock_mm.errors import CheckpointError
from overlock_mm.models.contmix import ContMix
from overlock_mm.timm import AuxiliaryLoss, OverLoCKClassifier

MODELS = ['overlock_xt', 'overlock_t', 'overlock_s', 'overlock_b']
MANIFEST = json.loads((Path(__file__).parent / 'parity/manifest.json').read_text())
# channels of the maps, from the paper's table and the width of the context
CHANNELS = dict(
    overlock_xt=[56, 112, 340, 420],
    overlock_t=[64, 128, 384, 640],
    overlock_s=[64, 128, 448, 640],
    overlock_b=[80, 160, 528, 720],
)


def tiny(num_classes=5, **kwargs):
    torch.manual_seed(0)
    return randomised(OverLoCKClassifier(TINY, num_classes=num_classes, **kwargs))


@pytest.fixture
def tiny_arch(monkeypatch):
    """Make overlock_xt small: what create_model does with it does not depend on size."""
    monkeypatch.setitem(OverLoCK.arch_settings, 'xt', TINY)
    return 'overlock_xt'


@pytest.fixture
def shapes_only(monkeypatch):
    """Skip ContMix, which keeps shapes: its loops are most of the time on meta tensors."""
    monkeypatch.setattr(ContMix, 'forward', lambda self, x, context, value: value)


def test_registered():
    assert timm.list_models('overlock*') == sorted(MODELS)
    assert timm.list_models('overlock*', pretrained=True) == sorted(
        f'{name}.{tag}' for name in MODELS for tag in ('in1k', 'in1k_reparam')
    )
    assert timm.__name__ == 'timm' and overlock_mm.timm is not timm


@pytest.mark.parametrize('name', MODELS)
def test_forward_backward(name):
    model = timm.create_model(name, num_classes=7).train()
    main, auxiliary = model(image(2, 3, 64, 64))
    assert main.shape == auxiliary.shape == (2, 7)
    (main.mean() + auxiliary.mean()).backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    for n, p in model.named_parameters():
        assert p.grad.isfinite().all(), n
    with torch.no_grad():
        logits = model.eval()(image(1, 3, 64, 32))
        # checkpointing is of no effect without gradients
        model.set_grad_checkpointing()
        assert torch.equal(model(image(1, 3, 64, 32)), logits)
    assert logits.shape == (1, 7) and logits.isfinite().all()


@pytest.mark.parametrize('name', MODELS)
def test_feature_info(name, shapes_only):
    with torch.device('meta'):
        model = timm.create_model(name, features_only=True).eval()
        assert model.feature_info.channels() == CHANNELS[name]
        assert model.feature_info.reduction() == [4, 8, 16, 32]
        maps = model(torch.empty(1, 3, 64, 96))
    for m, channels, stride in zip(maps, CHANNELS[name], (4, 8, 16, 32), strict=True):
        assert m.shape == (1, channels, 64 // stride, 96 // stride)


def test_feature_info_names_the_modules_that_give_the_maps():
    model, x, seen = tiny().eval(), image(1, 3, 64, 96), {}
    for info in model.feature_info:
        model.get_submodule(info['module']).register_forward_hook(
            lambda module, inputs, out, name=info['module']: seen.update({name: out})
        )
    with torch.no_grad():
        _, maps = model.forward_intermediates(x)
    for info, m in zip(model.feature_info, maps, strict=True):
        assert torch.equal(seen[info['module']], m)
        assert m.shape[1] == info['num_chs']


@pytest.mark.parametrize('out_indices', [(0,), (1,), (2,), (3,), (0, 2), (3, 1), (-1,), 2])
def test_features_only(tiny_arch, out_indices):
    """The raw maps that the classifier computes, and no part beyond the last of them."""
    full = randomised(timm.create_model(tiny_arch)).eval()
    part = timm.create_model(tiny_arch, features_only=True, out_indices=out_indices)
    state = full.state_dict()
    part.model.load_state_dict({k: state[k] for k in part.model.state_dict()})
    part.train()
    maps, x = part(image(2, 3, 64, 64)), image(1, 3, 64, 96)
    sum(m.square().mean() for m in maps).backward()
    assert [n for n, p in part.named_parameters() if p.grad is None] == []
    part.model.load_state_dict({k: state[k] for k in part.model.state_dict()})
    with torch.no_grad():
        maps = part.eval()(x)
        final, expected = full.forward_intermediates(x)
    wanted = (2, 3) if out_indices == 2 else [i % 4 for i in out_indices]
    for m, i, channels in zip(maps, wanted, part.feature_info.channels(), strict=True):
        assert torch.equal(m, expected[i]) and m.shape[1] == channels
    assert torch.equal(final, expected[3])
    assert part.model.num_features == expected[max(wanted)].shape[1]
    with torch.no_grad():
        assert torch.equal(part.model(x), expected[max(wanted)])


def test_features_are_of_the_raw_network():
    """Stage 3 reads the raw second map: the dense form with its norms taken out."""
    model, x = tiny().eval(), image(1, 3, 64, 64)
    dense = OverLoCK(TINY).eval()
    dense.extra_norm = nn.ModuleList(nn.Identity() for _ in range(4))
    state = model.state_dict()
    dense.load_state_dict({k: state[k] for k in dense.state_dict()})
    with torch.no_grad():
        for m, expected in zip(model.forward_intermediates(x)[1], dense(x), strict=True):
            assert torch.equal(m, expected)


def test_forward_intermediates():
    model, x = tiny().eval(), image(1, 3, 64, 64)
    ran = []
    model.sub_blocks4[0].register_forward_hook(lambda *_: ran.append(4))
    with torch.no_grad():
        final, maps = model.forward_intermediates(x)
        early, (first, second) = model.forward_intermediates(x, [1, 0], stop_early=True)
        assert ran == [4]
        only = model.forward_intermediates(x, 2, intermediates_only=True)
    assert torch.equal(final, maps[3]) and torch.equal(early, maps[1])
    assert torch.equal(first, maps[1]) and torch.equal(second, maps[0])
    assert isinstance(only, list) and torch.equal(only[0], maps[2]) and len(only) == 2
    with pytest.raises(ValueError, match='NCHW'):
        model.forward_intermediates(x, output_fmt='NLC')


@pytest.mark.parametrize('name', MODELS)
@pytest.mark.parametrize('tag', ['in1k', 'in1k_reparam'])
def test_pretrained_cfg(name, tag, shapes_only):
    with torch.device('meta'):
        model = timm.create_model(f'{name}.{tag}').eval()
        cfg = model.pretrained_cfg
        maps = model.forward_features(torch.empty(1, *cfg['input_size']))
        logits = model.forward_head(maps)
        features = model.forward_head(maps, pre_logits=True)
    assert maps.shape[2:] == cfg['pool_size'] and maps.shape[1] == model.num_features
    assert features.shape == (1, model.head_hidden_size)
    assert logits.shape == (1, cfg['num_classes'])
    state = model.state_dict()
    for classifier in cfg['classifier']:
        assert state[f'{classifier}.weight'].shape[0] == cfg['num_classes']
        assert state[f'{classifier}.bias'].shape == (cfg['num_classes'],)
    assert model.get_classifier() is model.get_submodule(cfg['classifier'][0])
    assert state[f'{cfg["first_conv"]}.weight'].shape[1] == cfg['input_size'][0]
    assert [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)][0] == (
        cfg['first_conv']
    )
    assert cfg['tag'] == tag and cfg['license'] == 'apache-2.0'
    arch, suffix = name.removeprefix('overlock_'), tag.removeprefix('in1k')
    assert cfg['url'] == (
        'https://github.com/LMMMEng/OverLoCK/releases/download/v1/'
        f'overlock_{arch}_in1k_224{suffix}.pth'
    )
    data = timm.data.resolve_model_data_config(model)
    assert data['crop_pct'] == dict(xt=0.925, t=0.95, s=0.95, b=0.975)[arch]
    assert data['interpolation'] == 'bicubic'
    assert data['mean'] == (0.485, 0.456, 0.406) and data['std'] == (0.229, 0.224, 0.225)
    assert model.deploy == (tag == 'in1k_reparam')
    form = 'deploy' if model.deploy else 'train'
    expected = MANIFEST[f'cls_{arch}_{form}']
    assert len(state) == expected['entries']
    assert sum(p.numel() for p in model.parameters()) == expected['parameters']


def test_deploy_goes_with_its_weights(tiny_arch):
    for kwargs in (dict(deploy=True), dict(pretrained_cfg='in1k_reparam')):
        model = timm.create_model(tiny_arch, **kwargs)
        assert model.deploy and model.pretrained_cfg['tag'] == 'in1k_reparam'
    model = timm.create_model(tiny_arch)
    assert not model.deploy and model.pretrained_cfg['tag'] == 'in1k'
    config = timm.create_model(f'{tiny_arch}.in1k_reparam').pretrained_cfg
    assert timm.create_model(tiny_arch, pretrained_cfg=config).deploy


def weights_file(folder, wrapper=None, deploy=False):
    """A file of the released layout, and the model whose weights it holds."""
    model = randomised(OverLoCKClassifier('xt', deploy=deploy)).eval()
    state = model.state_dict()
    torch.save({wrapper: state} if wrapper else state, folder / 'weights.pth')
    return model, dict(file=str(folder / 'weights.pth'))


@pytest.mark.parametrize('wrapper', [None, 'state_dict', 'model', 'state_dict_ema'])
@pytest.mark.parametrize('deploy', [False, True])
def test_pretrained(tiny_arch, tmp_path, wrapper, deploy):
    source, overlay = weights_file(tmp_path, wrapper, deploy)
    loaded = timm.create_model(
        tiny_arch, pretrained=True, deploy=deploy, pretrained_cfg_overlay=overlay
    )
    state = loaded.state_dict()
    for name, tensor in source.state_dict().items():
        assert torch.equal(state[name], tensor), name
    # as a URL gives it: unwrapped by the filter alone
    checkpoint = torch.load(overlay['file'], weights_only=True)
    filtered = overlock_mm.timm.checkpoint_filter_fn(checkpoint, loaded)
    assert filtered.keys() == source.state_dict().keys()


@pytest.mark.dev_stack
@pytest.mark.parametrize('kind', ['file', 'url'])
def test_pretrained_file_of_a_training_script(tiny_arch, tmp_path, monkeypatch, kind):
    """It holds arguments and a metric beside last and averaged weights."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    source, overlay = weights_file(tmp_path)
    averaged = {k: v + 1 for k, v in source.state_dict().items()}
    content = dict(state_dict=source.state_dict(), state_dict_ema=averaged)
    content |= dict(args=argparse.Namespace(lr=1e-3), metric=np.float64(84.2), epoch=300)
    torch.save(content, overlay['file'])
    if kind == 'url':
        overlay = dict(url=Path(overlay['file']).as_uri())
    loaded = timm.create_model(tiny_arch, True, pretrained_cfg_overlay=overlay)
    assert torch.equal(loaded.head[4].bias, averaged['head.4.bias'])


def test_pretrained_training_file_in_deploy_form(tiny_arch, tmp_path):
    source, overlay = weights_file(tmp_path)
    loaded = timm.create_model(
        tiny_arch, True, deploy=True, pretrained_cfg_overlay=overlay
    ).eval()
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        assert relative_error(loaded(x), source(x)) < 1e-5


@pytest.mark.parametrize('num_classes', [0, 10])
def test_pretrained_with_other_classes(tiny_arch, tmp_path, num_classes):
    source, overlay = weights_file(tmp_path)
    loaded = timm.create_model(
        tiny_arch, True, num_classes=num_classes, pretrained_cfg_overlay=overlay
    ).eval()
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        features = source.forward_head(source.forward_features(x), pre_logits=True)
        out = loaded.forward_head(loaded.forward_features(x), pre_logits=True)
    torch.testing.assert_close(out, features)
    if num_classes:
        assert not loaded.head[4].bias.any()  # fresh
        assert torch.equal(loaded.aux_head[0].weight, source.aux_head[0].weight)


def test_pretrained_features_and_other_channels(tiny_arch, tmp_path):
    source, overlay = weights_file(tmp_path)
    part = timm.create_model(
        tiny_arch, True, features_only=True, pretrained_cfg_overlay=overlay
    ).eval()
    x = image(1, 3, 64, 64)
    with torch.no_grad():
        for m, expected in zip(part(x), source.forward_intermediates(x)[1], strict=True):
            torch.testing.assert_close(m, expected)
    grey = timm.create_model(tiny_arch, True, in_chans=1, pretrained_cfg_overlay=overlay)
    torch.testing.assert_close(
        grey.patch_embed1[0].weight, source.patch_embed1[0].weight.sum(1, keepdim=True)
    )
    with torch.no_grad():
        assert grey.eval()(x[:, :1]).shape == (1, 1000)


def test_pretrained_of_another_form_fails(tiny_arch, tmp_path):
    """Also with another number of classes, where timm itself is not strict."""
    _, overlay = weights_file(tmp_path, deploy=True)
    for kwargs in (dict(), dict(num_classes=3), dict(num_classes=0)):
        with pytest.raises(RuntimeError, match='missing from the file: .*(lk_origin|_bn)'):
            timm.create_model(tiny_arch, True, pretrained_cfg_overlay=overlay, **kwargs)
    model = tiny()
    for name in ('aux_head.0.weight', 'head.0.weight'):
        state = model.state_dict()
        del state[name]
        with pytest.raises(RuntimeError, match=name):
            overlock_mm.timm.checkpoint_filter_fn(state, model)
    with pytest.raises(RuntimeError, match='not in the model: extra_norm.0.weight'):
        overlock_mm.timm.checkpoint_filter_fn(
            {**model.state_dict(), 'extra_norm.0.weight': torch.ones(8)}, model
        )


@pytest.mark.parametrize('deploy', [False, True])
def test_a_classifier_gives_its_weights_to_the_dense_form(tmp_path, deploy):
    model, x = tiny(deploy=deploy).eval(), image(1, 3, 64, 64)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    dense = OverLoCK(
        TINY,
        deploy=deploy,
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'weights.pth')),
    )
    dense.init_weights()
    with torch.no_grad():
        expected = dense.extra_norm[0](model.forward_intermediates(x)[1][0])
        torch.testing.assert_close(dense.eval()(x)[0], expected)


def test_num_classes_0():
    model, x = tiny(num_classes=0), image(2, 3, 64, 64)
    assert not any(k.startswith(('aux_head', 'head.4')) for k in model.state_dict())
    pooled = model.train()(x)  # one tensor, in training too
    assert pooled.shape == (2, model.head_hidden_size) == (2, 1024)
    pooled.sum().backward()
    assert [n for n, p in model.named_parameters() if p.grad is None] == []
    full = tiny().eval()
    state = full.state_dict()
    model.load_state_dict({k: state[k] for k in model.state_dict()})
    with torch.no_grad():
        maps = full.forward_features(x)
        features = full.forward_head(maps, pre_logits=True)
        assert torch.equal(model.eval()(x), features)
        # the classifier's rows are what tells features and logits apart
        torch.testing.assert_close(
            full(x), features @ full.head[4].weight.flatten(1).T + full.head[4].bias
        )
        assert torch.equal(full.forward_head(maps), full(x))


def test_pretrained_cannot_be_downloaded(tiny_arch, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise URLError('no network')

    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    monkeypatch.setattr(torch.hub, 'download_url_to_file', no_network)
    for name, file in (
        ('', 'overlock_xt_in1k_224.pth'),
        ('.in1k_reparam', '224_reparam.pth'),
    ):
        with pytest.raises(CheckpointError, match=f'place it at .*checkpoints/.*{file}'):
            timm.create_model(f'overlock_xt{name}', pretrained=True)


def test_pretrained_cfg_as_an_object(tiny_arch):
    cfg = timm.get_pretrained_cfg('overlock_xt.in1k_reparam')
    assert timm.create_model(tiny_arch, pretrained_cfg=cfg).deploy


def test_without_auxiliary_head(tiny_arch, tmp_path):
    source, overlay = weights_file(tmp_path)
    model = timm.create_model(
        tiny_arch, True, aux_head=False, pretrained_cfg_overlay=overlay
    ).train()
    assert model(image(2, 3, 64, 64)).shape == (2, 1000)
    assert torch.equal(model.head[4].weight, source.head[4].weight)
    model.reset_classifier(3)
    assert model(image(2, 3, 64, 64)).shape == (2, 3)
    assert not any(k.startswith('aux_head') for k in model.state_dict())


def test_auxiliary_loss():
    """In timm's own training task, with the soft targets of mixup."""
    model = tiny().train()
    x, target = image(2, 3, 64, 64), torch.rand(2, 5).softmax(1)
    criterion = SoftTargetCrossEntropy()
    task = ClassificationTask(copy.deepcopy(model), AuxiliaryLoss(criterion))
    result = task(x, target)
    main, auxiliary = model(x)
    expected = criterion(main, target) + 0.4 * criterion(auxiliary, target)
    torch.testing.assert_close(result['loss'], expected)
    torch.testing.assert_close(
        AuxiliaryLoss(criterion)(main, target), criterion(main, target)
    )
    double = AuxiliaryLoss(criterion, weight=1.0)((main, main), target)
    torch.testing.assert_close(double, 2 * criterion(main, target))


def test_reset_classifier():
    model, x = tiny().double(), image(2, 3, 64, 64).double()
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.reset_classifier(3)
    assert model.num_classes == 3
    assert model.get_classifier() is model.head[4]
    assert [t.shape for t in model.train()(x)] == [(2, 3), (2, 3)]
    for conv in (model.head[4], model.aux_head[2]):
        assert conv.weight.dtype == torch.float64 and not conv.bias.any()
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.3)
    for k, v in model.state_dict().items():
        if not k.startswith(('head.4', 'aux_head.2')) and v.ndim and 'running' not in k:
            assert torch.equal(v, before[k]), k
    model.reset_classifier(0)
    assert isinstance(model.get_classifier(), nn.Identity)
    assert model(x).shape == (2, 1024)
    model.reset_classifier(4, 'avg')
    assert [t.shape for t in model(x)] == [(2, 4), (2, 4)]
    with pytest.raises(ValueError, match="global_pool='median' must be one of"):
        model.reset_classifier(4, 'median')
    assert [t.shape for t in model(x)] == [(2, 4), (2, 4)]  # as it was
    model.prune_intermediate_layers([1])
    with pytest.raises(RuntimeError, match='has no head'):
        model.reset_classifier(4)


@pytest.mark.parametrize('how', ['constructor', 'reset'])
@pytest.mark.parametrize('num_classes', [0, 5])
@pytest.mark.parametrize('pool', ['', 'avg', 'max', 'avgmax'])
def test_global_pool(tiny_arch, pool, num_classes, how):
    """The features in front of the classifier, pooled or not; also after folding."""
    x = image(2, 3, 64, 96)
    if how == 'constructor':
        model = timm.create_model(tiny_arch, num_classes=num_classes, global_pool=pool)
    else:
        model = timm.create_model(tiny_arch, num_classes=3)
        model.reset_classifier(num_classes, pool)
    randomised(model).eval()
    with torch.no_grad():
        maps = model.head[:3](model.forward_features(x))
        assert maps.shape == (2, 1024, 2, 3)
        average, largest = maps.mean((2, 3), True), maps.amax((2, 3), True)
        pooled = {'': maps, 'avg': average, 'max': largest}
        pooled['avgmax'] = (average + largest) / 2
        features = pooled[pool] if not pool else pooled[pool].flatten(1)
        expected = model.get_classifier()(pooled[pool])
        expected = expected.flatten(1) if pool else expected
        out = model.forward_head(model.forward_features(x), pre_logits=True)
        torch.testing.assert_close(out, features)
        torch.testing.assert_close(model(x), expected)
        assert relative_error(fold(copy.deepcopy(model))(x), expected) < 1e-4
    if num_classes:  # both heads have the same pooling in training
        main, auxiliary = model.train()(x)
        assert main.shape == auxiliary.shape == expected.shape


def test_unknown_global_pool():
    with pytest.raises(ValueError, match="global_pool='catavgmax' must be one of"):
        OverLoCKClassifier(TINY, global_pool='catavgmax')


def test_pruning_keeps_the_head_if_asked():
    model, x = tiny().eval(), image(1, 3, 64, 64)
    with torch.no_grad():
        expected = model(x)
        assert model.prune_intermediate_layers([-1], prune_head=False) == [3]
        assert torch.equal(model(x), expected)


def test_options(tiny_arch):
    model = timm.create_model(
        tiny_arch, in_chans=5, num_classes=3, drop_rate=0.5, drop_path_rate=0.7
    ).eval()
    x = image(1, 5, 64, 64)
    with torch.no_grad():
        assert model(x).shape == (1, 3) and torch.equal(model(x), model(x))
    assert model.sub_blocks4[-1].drop_path.drop_prob == pytest.approx(0.7)
    assert model.blocks2[0].proj[9].drop_prob == pytest.approx(0.1)
    with pytest.raises(TypeError, match='drop_paths'):
        timm.create_model(tiny_arch, drop_paths=0.1)


def test_dropout_in_front_of_the_classifier():
    """Scaled features or zeros, in training only; pre-logits are left alone."""
    model, maps = tiny(num_classes=2048, drop_rate=0.75), torch.rand(1, 40, 2, 2)
    model.head[4] = nn.Identity()
    features = model.eval().forward_head(maps)
    assert torch.equal(model.forward_head(maps, pre_logits=True), features)
    model.head.train(False)
    model.training = True
    assert torch.equal(model.forward_head(maps, pre_logits=True), features)
    dropped = model.forward_head(maps)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], features[kept] * 4)
    assert 0.65 < 1 - kept.float().mean().item() < 0.85


def test_initial_values():
    model = OverLoCKClassifier(TINY)
    for conv in (model.head[0], model.head[4], model.aux_head[2]):
        assert conv.weight.std().item() == pytest.approx(0.02, rel=0.1)
        assert conv.weight.abs().max() < 0.2
        assert conv.bias is None or not conv.bias.any()


def test_grad_checkpointing():
    """Saves memory; outputs, gradients and statistics stay the same."""
    x, results, kept = image(2, 3, 64, 64), [], []
    for enable in (False, True):
        model = tiny(drop_path_rate=0.5, drop_rate=0.2).train()
        model.set_grad_checkpointing(not enable)
        model.set_grad_checkpointing(enable)
        torch.manual_seed(3)
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t: sizes.append(t.numel()) or t,  # noqa: B023
            lambda t: t,
        ):
            outputs = model(x)
        sum(o.square().sum() for o in outputs).backward()
        grads = {n: p.grad for n, p in model.named_parameters()}
        results.append((outputs, grads, dict(model.named_buffers())))
        kept.append(sum(sizes))
    for plain, checkpointed in zip(*results, strict=True):
        torch.testing.assert_close(checkpointed, plain)
    assert kept[1] < 0.5 * kept[0]


@pytest.mark.parametrize('coarse', [False, True])
@pytest.mark.parametrize('form', ['train', 'deploy'])
def test_group_matcher(coarse, form):
    with torch.device('meta'):
        model = timm.create_model('overlock_xt', deploy=form == 'deploy')
    groups = group_parameters(model, model.group_matcher(coarse=coarse))
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(n for n, _ in model.named_parameters())
    layer = {name: i for i, group in groups.items() for name in group}
    # stem, stages (or blocks) of the three nets, heads
    assert len(groups) == (1 + 4 + 2 + 1 if coarse else 1 + 9 + 8 + 1)

    def layers(prefix):
        found = {i for name, i in layer.items() if name.startswith(f'{prefix}.')}
        assert found, prefix
        return found

    order = [layers('patch_embed1')] if not coarse else []
    depths = dict(blocks1=2, blocks2=2, blocks3=3, blocks4=2, sub_blocks3=6, sub_blocks4=2)
    for stage, depth in depths.items():
        if coarse:
            order.append(layers(stage))
        else:
            order += [layers(f'{stage}.{i}') for i in range(depth)]
    order.append(layers('head'))
    assert all(len(found) == 1 for found in order)
    flat = [i for found in order for i in found]
    assert flat == sorted(set(flat)) and layers('aux_head') == layers('head')
    for lead, stage in dict(
        patch_embed2='blocks2',
        patch_embed4='blocks4',
        high_level_proj='sub_blocks3',
        patch_embedx='sub_blocks4',
    ).items():
        assert layers(lead) <= layers(stage if coarse else f'{stage}.0')


def test_layer_decay_takes_the_model():
    from timm.optim import create_optimizer_v2

    model = tiny()
    optimizer = create_optimizer_v2(model, 'adamw', weight_decay=0.1, layer_decay=0.5)
    rates = {
        id(p): group['lr_scale']
        for group in optimizer.param_groups
        for p in group['params']
    }
    assert rates[id(model.head[4].weight)] == rates[id(model.aux_head[2].weight)] == 1
    assert rates[id(model.sub_blocks4[-1].rpb1)] == 0.5
    assert len(rates) == len(list(model.parameters()))


def test_switch_to_deploy():
    model, x = (
        filled(OverLoCKClassifier(TINY, 5), torch.float32).eval(),
        image(2, 3, 96, 64),
    )
    with torch.no_grad():
        before = model(x)
        model.switch_to_deploy()
        after = model(x)
        assert relative_error(after, before) < 1e-5
        fresh = OverLoCKClassifier(TINY, 5, deploy=True)
        fresh.load_state_dict(model.state_dict())
        assert torch.equal(fresh.eval()(x), after)
    main, auxiliary = fresh.train()(x)  # the deploy form can be fine-tuned
    (main.sum() + auxiliary.sum()).backward()
    assert [n for n, p in fresh.named_parameters() if p.grad is None] == []


@pytest.mark.parametrize('dtype, tolerance', [(torch.float64, 1e-9), (torch.float32, 1e-4)])
@pytest.mark.parametrize('num_classes', [0, 5])
def test_fold(dtype, tolerance, num_classes):
    model, x = tiny(num_classes=num_classes).to(dtype).eval(), image(2, 3, 96, 64).to(dtype)
    with torch.no_grad():
        expected = model(x)
        maps = model.forward_intermediates(x)[1]
        features = model.forward_head(maps[3], pre_logits=True)
        folded = fold(copy.deepcopy(model))
        assert relative_error(folded(x), expected) < tolerance
        for m, needed in zip(folded.forward_intermediates(x)[1], maps, strict=True):
            assert relative_error(m, needed) < tolerance
        out = folded.forward_head(maps[3], pre_logits=True)
        assert relative_error(out, features) < tolerance
    assert not any(isinstance(m, _BatchNorm) for m in folded.modules())
    assert folded.aux_head is None  # only training uses it
    with pytest.raises(RuntimeError, match='inference only'):
        folded.train()
    folded.reset_classifier(3)
    with torch.no_grad():
        assert folded(x).shape == (2, 3) and folded.aux_head is None


@pytest.mark.parametrize('kwargs', [dict(), dict(features_only=True, out_indices=(1, 3))])
def test_fold_a_real_model(kwargs):
    model = timm.create_model('overlock_xt', **kwargs)
    filled(getattr(model, 'model', model), torch.float32)
    model.eval()
    x = image(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        assert fold(model) is model
        for out, needed in zip(model(x), expected, strict=True):
            assert relative_error(out, needed) < 1e-4


@pytest.mark.dev_stack
@pytest.mark.parametrize('folded', [pytest.param(False, marks=pytest.mark.slow), True])
def test_exports(folded):
    model, x = tiny().eval(), image(1, 3, 64, 96)
    with torch.no_grad():
        expected = model(x)
        if folded:
            fold(model)
        program = torch.export.export(model, (x,))
        assert relative_error(program.module()(x), expected) < 1e-4


def test_intermediates_are_the_features(tiny_arch):
    """As timm compares them: final map, checkpointing, and the maps' declared sizes."""
    model, x = randomised(timm.create_model(tiny_arch)).eval(), image(1, 3, 75, 96)
    info = FeatureInfo(model.feature_info, out_indices=4)
    final, maps = model.forward_intermediates(x, norm=True)
    for m, channels, stride in zip(maps, info.channels(), info.reduction(), strict=True):
        assert m.shape == (1, channels, -(-75 // stride), -(-96 // stride))
    torch.testing.assert_close(final, model.forward_features(x))
    model.set_grad_checkpointing()
    torch.testing.assert_close(model.forward_intermediates(x)[0], final)
    final.mean().backward()
    assert model.blocks1[0].dwconv.weight.grad is not None


@pytest.mark.parametrize('feature_cls', ['getter', 'fx'])
def test_feature_extractors(tiny_arch, feature_cls):
    full, x = randomised(timm.create_model(tiny_arch)).eval(), image(1, 3, 64, 96)
    part = timm.create_model(tiny_arch, features_only=True, feature_cls=feature_cls).eval()
    inner = part.model if feature_cls == 'getter' else part.graph_module
    state = full.state_dict()
    inner.load_state_dict({k: state[k] for k in inner.state_dict()})
    with torch.no_grad():
        expected = full.forward_intermediates(x, intermediates_only=True)
        for m, needed in zip(part(x), expected, strict=True):
            torch.testing.assert_close(m, needed)


def test_graph_of_torch_fx(tiny_arch):
    """In evaluation and in training, with blocks as nodes; wrong images are refused."""
    model, x = randomised(timm.create_model(tiny_arch, num_classes=5)), image(2, 3, 64, 96)
    nodes = ['blocks2.0', 'extra_norm.3', 'head.4']
    graph = create_feature_extractor(model, nodes)
    with torch.no_grad():
        expected = model.eval()(x)
        out = graph.eval()(x)
    torch.testing.assert_close(out['head.4'].flatten(1), expected)
    assert out['blocks2.0'].shape == (2, 16, 8, 12)
    graph.train()(x)['head.4'].mean().backward()
    assert graph.get_parameter('patch_embed1.0.weight').grad.isfinite().all()
    with pytest.raises(ValueError, match='at least 32'):
        graph(image(1, 3, 16, 64))


def test_torchscript_scripting_says_what_to_use(tiny_arch):
    model = nn.Sequential(timm.create_model(tiny_arch))
    with pytest.raises(RuntimeError, match=r'torch\.export'):
        torch.jit.script(model)
