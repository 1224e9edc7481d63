"""Pretrained weights load whole, or nothing loads and the message says what differs."""

import argparse
import hashlib
import http.server
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import TINY, Segmentor, changed, classifier_state, tiny
from mmengine.logging import HistoryBuffer
from mmengine.registry import MODELS
from torch import nn

from overlock_mm import OverLoCK, checkpoint, fold, load_checkpoint
from overlock_mm.checkpoint import download, read_weights
from overlock_mm.checkpoint.download import cached
from overlock_mm.errors import CheckpointError


def load(path, state, prefix=None, **kwargs):
    torch.save(state, path)
    init_cfg = dict(type='Pretrained', checkpoint=str(path))
    if prefix is not None:
        init_cfg['prefix'] = prefix
    model = MODELS.build(dict(type='OverLoCK', arch=TINY, init_cfg=init_cfg, **kwargs))
    model.before = {k: v.clone() for k, v in model.state_dict().items()}
    model.init_weights()
    return model


def assert_loaded(model, source, fresh=()):
    for name, value in model.state_dict().items():
        expected = model.before if name.startswith(fresh or '-') else source
        assert torch.equal(value, expected[name]), name


def test_names_of_a_distributed_model(tmp_path):
    state = classifier_state(tiny())
    model = load(tmp_path / 'w.pth', {f'module.{k}': v for k, v in state.items()})
    assert_loaded(model, state, fresh=('extra_norm.',))


def test_the_log_says_what_was_initialised_how(tmp_path, log):
    model = load(tmp_path / 'w.pth', classifier_state(tiny()))
    said = dict(text.split(' - ', 1) for text in log if 'torch.Size' in text)
    said = {name.strip(): text for name, text in said.items()}
    assert set(said) == dict(model.named_parameters()).keys()
    for name, text in said.items():
        fresh = name.startswith('extra_norm.')
        assert ('Pretrained: load from' in text) != fresh, name
        assert ('The value is the same' in text) == fresh, name


def test_second_call_keeps_trained_weights(tmp_path):
    model = load(tmp_path / 'w.pth', classifier_state(tiny()))
    torch.nn.init.zeros_(model.blocks1[0].dwconv.weight)
    model.init_weights()
    assert not model.blocks1[0].dwconv.weight.any()


def test_a_file_of_something_else(tmp_path):
    with pytest.raises(RuntimeError, match='holds a list'):
        load(tmp_path / 'w.pth', [1, 2])


@pytest.mark.parametrize('wrapper', [None, 'state_dict', 'model', 'state_dict_ema'])
@pytest.mark.parametrize('context_skip', [False, True])
def test_classifier_file(tmp_path, wrapper, context_skip):
    state = classifier_state(tiny())
    model = load(
        tmp_path / 'w.pth',
        {wrapper: state} if wrapper else state,
        context_skip=context_skip,
    )
    assert_loaded(model, state, fresh=('extra_norm.', 'h_proj.'))


@pytest.mark.parametrize('context_skip', [False, True])
def test_dense_file_with_prefix(tmp_path, context_skip):
    state = tiny(context_skip=context_skip).state_dict()
    wrapped = {f'backbone.{k}': v for k, v in state.items()}
    wrapped['decode_head.conv_seg.bias'] = torch.ones(2)
    model = load(
        tmp_path / 'w.pth',
        dict(state_dict=wrapped),
        prefix='backbone',
        context_skip=context_skip,
    )
    assert_loaded(model, state)


@pytest.mark.parametrize('out_indices', [(0,), (1,), (2,), (0, 3)], ids=str)
@pytest.mark.parametrize('dense', [False, True])
def test_part_of_the_backbone(tmp_path, out_indices, dense):
    source = tiny(context_skip=True)
    state = source.state_dict() if dense else classifier_state(source)
    model = load(tmp_path / 'w.pth', state, out_indices=out_indices, context_skip=True)
    assert_loaded(model, state, fresh=() if dense else ('extra_norm.', 'h_proj.'))


def test_inside_a_model(tmp_path):
    """A detector or segmentor initialises its backbone through the same call."""
    from mmseg.registry import MODELS as SEG
    from mmseg.utils import register_all_modules

    register_all_modules(init_default_scope=True)
    state = classifier_state(tiny())
    torch.save(state, tmp_path / 'w.pth')
    model = SEG.build(
        dict(
            type='EncoderDecoder',
            backbone=dict(
                type='OverLoCK',
                arch=TINY,
                init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth')),
            ),
            decode_head=dict(
                type='FCNHead',
                in_channels=40,
                in_index=3,
                channels=4,
                num_classes=2,
                norm_cfg=dict(type='BN'),
            ),
        )
    )
    model.init_weights()
    assert torch.equal(
        model.backbone.state_dict()['blocks1.0.proj.4.weight'],
        state['blocks1.0.proj.4.weight'],
    )


def without(state, name):
    return {k: v for k, v in state.items() if k != name}


@pytest.mark.parametrize(
    'make, message',
    [
        (
            lambda: (without(classifier_state(tiny()), 'blocks3.0.dwconv.bias'), {}),
            '1 entries are missing from the file: blocks3.0.dwconv.bias',
        ),
        (
            lambda: ({**classifier_state(tiny()), 'neck.weight': torch.ones(1)}, {}),
            '1 entries are not in the model: neck.weight',
        ),
        (
            lambda: (
                {**classifier_state(tiny()), 'rpb': torch.ones(1)},
                dict(out_indices=(0,)),
            ),
            'not in the model: rpb',
        ),
        (
            lambda: (
                classifier_state(OverLoCK(dict(TINY, embed_dims=(16, 16, 32, 32)))),
                {},
            ),
            r'another shape: patch_embed1.0.weight \(file \(8, 3, 3, 3\), model',
        ),
        (
            lambda: (tiny().state_dict(), dict(context_skip=True)),
            'missing from the file: .*h_proj.* The file is .*segmentation form.*; '
            'the model is .*detection form.*reconciles them: context_skip=False',
        ),
        (
            lambda: (tiny(context_skip=True).state_dict(), {}),
            'not in the model: .*h_proj.*context_skip=True, for a detection file',
        ),
        (
            lambda: (tiny(deploy=True).state_dict(), {}),
            'missing from the file: .*origin_bn.*deploy=True, for merged branches cannot',
        ),
        (
            lambda: (without(tiny().state_dict(), 'extra_norm.2.weight'), {}),
            'missing from the file: extra_norm.2.weight',
        ),
        (
            lambda: (classifier_state(tiny()), dict(prefix='backbone.')),
            "no entry that begins with prefix='backbone.'; its entries begin with aux_head",
        ),
    ],
)
def test_other_differences_are_errors(tmp_path, make, message):
    state, kwargs = make()
    prefix = kwargs.pop('prefix', None)
    torch.save(state, tmp_path / 'w.pth')
    model = OverLoCK(
        TINY,
        **kwargs,
        init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'w.pth'), prefix=prefix),
    )
    before = {k: v.clone() for k, v in model.state_dict().items()}
    with pytest.raises(RuntimeError, match=message):
        model.init_weights()
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_missing_file(tmp_path):
    model = OverLoCK(
        TINY, init_cfg=dict(type='Pretrained', checkpoint=str(tmp_path / 'none.pth'))
    )
    with pytest.raises(FileNotFoundError, match='none.pth'):
        model.init_weights()


def test_other_initialisers_still_work():
    model = OverLoCK(TINY, init_cfg=[dict(type='Constant', layer='Conv2d', val=0.5)])
    model.init_weights()
    assert (model.blocks1[0].proj[4].weight == 0.5).all()


def test_a_whole_model(tmp_path):
    source, path = changed(Segmentor()), tmp_path / 'w.pth'
    torch.save(dict(meta=dict(epoch=1), state_dict=source.state_dict()), path)
    model = Segmentor()
    report = load_checkpoint(model, path)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    assert report.complete and len(report.loaded) == len(source.state_dict())
    assert not report.absent and f'{len(report.loaded)} loaded' in str(report)


def test_a_bare_backbone_finds_itself_in_a_whole_model(tmp_path):
    source, path = changed(Segmentor()), tmp_path / 'w.pth'
    torch.save(source.state_dict(), path)
    model = tiny()
    report = load_checkpoint(model, path)
    assert torch.equal(model.patch_embed1[0].weight, source.backbone.patch_embed1[0].weight)
    (others,) = report.absent.values()
    assert others == ['decode_head.weight', 'decode_head.bias']
    assert 'parts of another model' in str(report) and 'decode_head.weight' in str(report)


def test_an_imagenet_file_is_no_whole_model(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save(classifier_state(tiny()), path)
    with pytest.raises(RuntimeError, match='missing from the file: decode_head.weight'):
        load_checkpoint(Segmentor(), path)


def test_another_number_of_classes(tmp_path):
    source, path = changed(Segmentor(classes=5)), tmp_path / 'w.pth'
    torch.save(source.state_dict(), path)
    model = Segmentor()
    before = model.decode_head.weight.clone()
    with pytest.raises(RuntimeError, match=r"ignore_mismatched=\['decode_head'\]"):
        load_checkpoint(model, path)
    report = load_checkpoint(model, path, ignore_mismatched=['decode_head'])
    assert (
        list(report.ignored) == ['decode_head.weight', 'decode_head.bias']
        and report.complete
    )
    assert torch.equal(model.decode_head.weight, before)
    assert torch.equal(
        model.backbone.patch_embed1[0].weight, source.backbone.patch_embed1[0].weight
    )


@pytest.mark.parametrize('whole', [False, True])
def test_a_training_file_is_merged_for_a_deploy_model(tmp_path, whole):
    make = Segmentor if whole else tiny
    source, path = make(), tmp_path / 'w.pth'
    torch.save(source.state_dict(), path)
    model = changed(make(deploy=True))
    assert load_checkpoint(model, path).complete
    getattr(source, 'backbone', source).switch_to_deploy()
    torch.testing.assert_close(model.state_dict(), source.state_dict())


def test_unexpected_entries_to_ignore(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save({**tiny().state_dict(), 'neck.weight': torch.ones(1)}, path)
    with pytest.raises(CheckpointError, match='not in the model: neck.weight'):
        load_checkpoint(tiny(), path)
    report = load_checkpoint(tiny(), path, ignore_unexpected=['neck.'])
    assert report.complete and ['neck.weight'] in report.absent.values()


def test_not_strict_must_be_asked_for(tmp_path, log):
    path = tmp_path / 'w.pth'
    torch.save(without(changed(tiny()).state_dict(), 'blocks3.0.dwconv.bias'), path)
    model = tiny()
    with pytest.raises(RuntimeError, match='nothing was loaded'):
        load_checkpoint(model, path)
    assert torch.equal(model.patch_embed1[0].weight, tiny().patch_embed1[0].weight)
    report = load_checkpoint(model, path, strict=False)
    assert report.missing == ['blocks3.0.dwconv.bias'] and not report.complete
    assert '1 missing from the file  blocks3.0.dwconv.bias' in log[-1]
    assert not torch.equal(model.patch_embed1[0].weight, tiny().patch_embed1[0].weight)


@pytest.mark.parametrize('arch', ['xt', 't', 's', 'b'])
def test_the_arch_is_recognised(tmp_path, arch):
    path = tmp_path / 'w.pth'
    with torch.device('meta'):
        state = OverLoCK(arch, out_indices=(0,)).state_dict()
        full = OverLoCK(arch).state_dict()
    torch.save({k: torch.zeros(v.shape) for k, v in state.items()}, path)
    with pytest.raises(RuntimeError, match="The file is OverLoCK .*arch='(xt|t|s|b)'"):
        load_checkpoint(tiny(), path)
    assert checkpoint.form_of(full).arch == arch


def test_models_that_take_no_checkpoint(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save(tiny().state_dict(), path)
    with pytest.raises(CheckpointError, match='load first, then fold'):
        load_checkpoint(fold(tiny()), path)
    with pytest.raises(CheckpointError, match='Conv2d is no OverLoCK'):
        load_checkpoint(nn.Conv2d(1, 1, 1), path)


def test_what_checkpoints_hold_beside_weights(tmp_path, monkeypatch):
    """Read without trust, and whole."""
    history = HistoryBuffer([1.0, 2.0], [1, 1])
    content = dict(
        state_dict=tiny().state_dict(),
        args=argparse.Namespace(lr=1e-3, path='somewhere'),
        best=np.float64(0.5),
        message_hub=dict(log_scalars=dict(loss=history), array=np.arange(3)),
    )
    torch.save(content, tmp_path / 'w.pth')
    # as in a process that has made no buffer yet
    monkeypatch.setattr(HistoryBuffer, '_statistics_methods', {})
    read = read_weights(tmp_path / 'w.pth')
    assert read['args'] == content['args'] and read['best'] == 0.5
    buffer = read['message_hub']['log_scalars']['loss']
    assert buffer.mean() == history.mean() and buffer.statistics('mean') == 1.5
    assert (read['message_hub']['array'] == np.arange(3)).all()
    assert load_checkpoint(tiny(), tmp_path / 'w.pth').complete


class Writes:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


class Digs:
    """Goes for the globals of a method by the getattr that history buffers need."""

    def __reduce__(self):
        return getattr, (HistoryBuffer, '__init__')


@pytest.mark.parametrize('protocol', ['zip', 'legacy'])
def test_code_in_a_file_does_not_run(tmp_path, protocol):
    path, mark = tmp_path / 'w.pth', tmp_path / 'written'
    state = dict(state_dict=tiny().state_dict(), extra=Writes(mark))
    torch.save(state, path, _use_new_zipfile_serialization=protocol == 'zip')
    with pytest.raises(CheckpointError, match=r'holds pathlib\S*, .* trust=True'):
        load_checkpoint(tiny(), path)
    assert not mark.exists()
    load_checkpoint(tiny(), path, trust=True)
    assert mark.exists()
    torch.save(dict(extra=Digs()), path)
    with pytest.raises(CheckpointError, match='holds builtins.getattr'):
        read_weights(path)


@pytest.mark.parametrize(
    'content, message',
    [
        (b'', 'is empty'),
        (b'\n<!DOCTYPE html><html>Not Found</html>', 'is a web page'),
        (b'PK\x03\x04 truncated', 'no checkpoint, or a truncated one'),
        (b'\x89PNG something else entirely', 'no checkpoint, or a truncated one'),
    ],
)
def test_files_of_something_else(tmp_path, content, message):
    (tmp_path / 'w.pth').write_bytes(content)
    with pytest.raises(CheckpointError, match=message) as error:
        read_weights(tmp_path / 'w.pth')
    assert '\n' not in str(error.value)


def test_a_truncated_checkpoint(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save(tiny().state_dict(), path)
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(CheckpointError, match='truncated'):
        read_weights(path)
    with pytest.raises(CheckpointError, match='is a folder'):
        read_weights(tmp_path)


def test_damage_anywhere(tmp_path):
    """One kind of error and one line, wherever a file ends or is wrong."""
    path, rng = tmp_path / 'w.pth', np.random.default_rng(0)
    for legacy in (False, True):
        torch.save(tiny().state_dict(), path, _use_new_zipfile_serialization=not legacy)
        whole = path.read_bytes()
        cuts = [*range(1, 60), *rng.integers(60, len(whole), 40)]
        for cut in cuts:
            path.write_bytes(whole[:cut])
            with pytest.raises(CheckpointError) as error:
                read_weights(path)
            assert '\n' not in str(error.value) and 'w.pth' in str(error.value)
    for text in (b'bad request', b'error code: 1015', b'Rate limit exceeded', b'\x80'):
        path.write_bytes(text)
        with pytest.raises(CheckpointError, match='no checkpoint, or a truncated one'):
            read_weights(path)


def test_files_that_are_good_for_something_else(tmp_path):
    path = tmp_path / 'w.pth'
    torch.jit.script(nn.Linear(1, 1)).save(path)
    for trust in (False, True):
        with pytest.raises(CheckpointError, match='is a TorchScript archive'):
            read_weights(path, trust=trust)
    torch.save(tiny().state_dict(), tmp_path / 'w.safetensors')
    with pytest.raises(CheckpointError, match='damaged, or no safetensors file'):
        read_weights(tmp_path / 'w.safetensors')


@pytest.mark.parametrize('option', ['ignore_mismatched', 'ignore_unexpected'])
def test_begins_of_names(tmp_path, option):
    """One name may be given by itself; an empty one would be in all."""
    path = tmp_path / 'w.pth'
    state = changed(tiny()).state_dict()
    if option == 'ignore_unexpected':
        state['neck.weight'] = torch.ones(1)
    else:
        state['blocks1.0.dwconv.bias'] = torch.ones(3)
    torch.save(state, path)
    for right in ('neck', 'blocks1.0.dwconv'):
        ok = (right == 'neck') == (option == 'ignore_unexpected')
        if ok:
            assert load_checkpoint(tiny(), path, **{option: right}).complete
        else:
            with pytest.raises(CheckpointError, match='does not fit'):
                load_checkpoint(tiny(), path, **{option: right})
    with pytest.raises(CheckpointError, match=f'{option}=.* has an empty name'):
        load_checkpoint(tiny(), path, **{option: ['']})


def test_a_whole_model_has_its_output_norms(tmp_path):
    path = tmp_path / 'w.pth'
    state = changed(Segmentor()).state_dict()
    torch.save({k: v for k, v in state.items() if 'extra_norm' not in k}, path)
    with pytest.raises(CheckpointError, match='missing from the file: backbone.extra_norm'):
        load_checkpoint(Segmentor(), path)


def test_what_is_no_checkpoint_of_the_model_says_where_it_goes(tmp_path):
    path = tmp_path / 'w.pth'
    torch.save(classifier_state(tiny()), path)
    with pytest.raises(CheckpointError, match='a backbone alone, which goes into init_cfg'):
        load_checkpoint(Segmentor(), path)
    state = changed(Segmentor(context_skip=True)).state_dict()
    torch.save({k.replace('decode_head', 'neck'): v for k, v in state.items()}, path)
    with pytest.raises(
        CheckpointError, match=r'other heads.*prefix="backbone."\).*context_sk'
    ):
        load_checkpoint(Segmentor(), path)
    torch.save(dict(a=torch.ones(1)), path)
    with pytest.raises(CheckpointError, match='nothing was loaded'):
        load_checkpoint(tiny(), path, strict=False)
    half = {k: v for k, v in tiny().state_dict().items() if 'blocks4' not in k}
    torch.save(half, path)
    with pytest.raises(CheckpointError, match='missing from the file') as error:
        load_checkpoint(tiny(), path)
    assert 'arch=' not in str(error.value)


@pytest.mark.parametrize('wrap', ['module.', '_orig_mod.', 'module._orig_mod.'])
def test_names_of_wrapped_models(tmp_path, wrap):
    path, source = tmp_path / 'w.pth', changed(Segmentor())
    inner = {
        k.replace('backbone.', f'backbone.{wrap}'): v
        for k, v in source.state_dict().items()
    }
    for state in ({f'{wrap}{k}': v for k, v in source.state_dict().items()}, inner):
        torch.save(state, path)
        model = Segmentor()
        assert load_checkpoint(nn.DataParallel(model), path).complete
        torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    model = Segmentor()
    load_checkpoint(torch.compile(model, backend='eager'), path)
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    model.backbone = torch.compile(model.backbone, backend='eager')
    with pytest.raises(CheckpointError, match='load, then compile'):
        load_checkpoint(model, path)


@pytest.mark.parametrize('key', ['state_dict_ema', 'model_ema', 'ema'])
def test_averaged_weights_come_first(tmp_path, key):
    path, last = tmp_path / 'w.pth', tiny()
    content = {'state_dict': last.state_dict(), key: changed(tiny()).state_dict()}
    torch.save(content, path)
    model = tiny()
    assert load_checkpoint(model, path).key == key
    assert torch.equal(model.patch_embed1[0].weight, last.patch_embed1[0].weight + 1)
    content[key] = dict(decay=torch.tensor(0.9))  # something else of that name
    torch.save(content, path)
    assert load_checkpoint(tiny(), path).key == 'state_dict'


def test_old_files_have_no_counters_of_batches(tmp_path):
    path, source = tmp_path / 'w.pth', changed(tiny())
    state = {k: v for k, v in source.state_dict().items() if 'num_batches' not in k}
    torch.save(state, path)
    report = load_checkpoint(tiny(), path)
    assert report.complete and 'counters of batches' in str(report)


def test_odd_entries(tmp_path):
    path = tmp_path / 'w.pth'
    state = {**tiny().state_dict(), 7: torch.ones(1)}
    torch.save(state, path)
    assert load_checkpoint(tiny(), path).complete
    for name, value in (
        ('patch_embed1.6.weight', torch.tensor(1.0)),
        ('sub_blocks3.0.rpb1', torch.tensor(1.0)),
        ('blocks1.0.proj.1.lk_origin.weight', torch.ones(8, 1, 6, 6)),
        ('blocks1.0.proj.1.lk_origin.weight', torch.ones(0)),
    ):
        torch.save({**tiny().state_dict(), name: value}, path)
        for deploy in (False, True):
            with pytest.raises(CheckpointError, match='does not fit'):
                load_checkpoint(tiny(deploy=deploy), path)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_half_precision_files_are_merged_in_full_precision(tmp_path, dtype):
    path, source = tmp_path / 'w.pth', tiny()
    state = {
        k: v.to(dtype) if v.is_floating_point() else v
        for k, v in source.state_dict().items()
    }
    torch.save(state, path)
    source.load_state_dict(state)
    source.switch_to_deploy()
    model = tiny(deploy=True)
    load_checkpoint(model, path)
    torch.testing.assert_close(model.state_dict(), source.state_dict())


def test_safetensors(tmp_path):
    from safetensors.torch import save_file

    source, path = changed(tiny()), tmp_path / 'w.safetensors'
    save_file({k: v.contiguous() for k, v in source.state_dict().items()}, path)
    model = tiny()
    assert load_checkpoint(model, path).complete
    torch.testing.assert_close(model.state_dict(), source.state_dict(), rtol=0, atol=0)
    path.write_bytes(b'damaged')
    with pytest.raises(CheckpointError, match='is damaged'):
        load_checkpoint(model, path)


class Server(http.server.BaseHTTPRequestHandler):
    content = b''
    requests = []

    def do_GET(self):
        self.requests.append(self.path)
        if self.path == '/moved.pth':
            self.send_response(302)
            self.send_header('Location', '/weights.pth')
            self.end_headers()
            return
        if self.path == '/none.pth':
            self.send_error(404)
            return
        if self.path == '/chunks.pth':
            self.send_response(200)
            self.send_header('Transfer-Encoding', 'chunked')
            self.end_headers()
            self.wfile.write(b'ffff\r\nless')
            return
        if self.path == '/page.pth':
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'<html>log in</html>')
            return
        self.send_response(200)
        self.send_header('Content-Length', str(len(self.content)))
        self.end_headers()
        half = len(self.content) // 2
        self.wfile.write(self.content[:half])
        if self.path == '/stalls.pth':
            self.server.stop.wait(10)
        elif self.path != '/truncated.pth':
            self.wfile.write(self.content[half:])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    torch.save(classifier_state(tiny()), tmp_path / 'source.pth')
    monkeypatch.setattr(Server, 'content', (tmp_path / 'source.pth').read_bytes())
    monkeypatch.setattr(Server, 'requests', [])
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path / 'hub'))
    monkeypatch.setattr(checkpoint.download, '_TIMEOUT', 0.5)
    monkeypatch.setenv('no_proxy', '127.0.0.1')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Server) as running:
        running.stop = threading.Event()
        threading.Thread(target=running.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{running.server_port}'
        running.stop.set()
        running.shutdown()


def files(folder):
    return [path for path in folder.iterdir() if path.suffix != '.lock']


@pytest.mark.parametrize('name', ['weights.pth', 'moved.pth'])
def test_download(tmp_path, server, name, monkeypatch):
    model = OverLoCK(TINY, init_cfg=dict(type='Pretrained', checkpoint=f'{server}/{name}'))
    model.init_weights()
    assert torch.equal(model.patch_embed1[0].weight, tiny().patch_embed1[0].weight)
    path = cached(f'{server}/{name}')
    assert path.read_bytes() == Server.content and files(path.parent) == [path]
    monkeypatch.setattr(Server, 'content', b'changed')
    assert download(f'{server}/{name}').read_bytes() != b'changed'  # from the cache


@pytest.mark.parametrize(
    'name, reason',
    [
        ('truncated.pth', 'it ended after .* bytes|incomplete|IncompleteRead'),
        ('stalls.pth', 'timed out'),
        ('none.pth', 'Not Found'),
        ('chunks.pth', 'IncompleteRead'),
        ('page.pth', 'it is a web page'),
        ('no status.pth', "can't contain control characters"),
    ],
)
def test_a_download_that_fails_leaves_nothing(tmp_path, server, name, reason):
    with pytest.raises(CheckpointError, match=reason) as error:
        load_checkpoint(tiny(), f'{server}/{name}')
    path = cached(f'{server}/{name}')
    assert f'place it at {path}' in str(error.value)
    assert files(tmp_path / 'hub/checkpoints') == []


def test_where_downloads_are_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.hub, '_hub_dir', str(tmp_path))
    released = cached(f'{checkpoint.RELEASE}overlock_t_in1k_224.pth')
    assert released == tmp_path / 'checkpoints/overlock_t_in1k_224.pth'  # as by torch.hub
    others = {cached(f'https://example.com/{i}/model.safetensors') for i in 'ab'}
    assert len(others) == 2 and {path.suffix for path in others} == {'.safetensors'}
    monkeypatch.setattr(torch.hub, '_hub_dir', '/dev/null')
    with pytest.raises(CheckpointError, match='cannot be downloaded'):
        download('https://example.com/model.pth')


def test_checksum(server):
    right = hashlib.sha256(Server.content).hexdigest()
    with pytest.raises(CheckpointError, match=f'SHA-256 is {right[:16]}.* not 00112233'):
        download(f'{server}/weights-00112233.pth')
    assert download(f'{server}/weights-{right[:8]}.pth').exists()


def test_several_processes_download_once(server):
    with ThreadPoolExecutor(4) as pool:
        paths = set(pool.map(download, [f'{server}/weights.pth'] * 4))
    assert len(paths) == 1 and Server.requests.count('/weights.pth') == 1
