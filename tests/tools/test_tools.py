"""The command lines: most in this process, which saves the start of torch each time."""

import contextlib
import os
import pathlib
import runpy
import subprocess
import sys
from pathlib import Path

import mmseg
import numpy as np
import pytest
import torch
from helpers import ROOT, SEGMENTATION, TINY, run, tool
from mmengine.config import Config
from PIL import Image

from overlock_mm import OverLoCK
from overlock_mm.apis.test import test as evaluate
from overlock_mm.apis.train import train

TOOLS = ['train', 'test', 'convert_checkpoint', 'deploy_checkpoint', 'validate_imagenet']
TOOLS += ['benchmark', 'make_demo_data', 'swap_backbone']


@pytest.fixture
def call(demo_data, monkeypatch, capsys):
    """Run a tool in the folder of the demo data; what it printed."""
    monkeypatch.chdir(demo_data)
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))

    def call(name, *args, status=0):
        monkeypatch.setattr(sys, 'argv', [name, *map(str, args)])
        code = 0
        try:
            runpy.run_path(str(ROOT / 'tools' / name), run_name='__main__')
        except SystemExit as ended:
            code = ended.code
        printed = capsys.readouterr()
        assert code == status, printed.out[-3000:] + printed.err[-3000:]
        return printed

    return call


@pytest.fixture
def fails(call):
    """Run a tool that ends with status 2 and a message, which holds the words."""

    def fails(name, *args, words):
        printed = call(name, *args, status=2).err
        # the toolbox warns of this and that while it builds a model
        _, mark, message = f'\n{printed}'.rpartition('\nerror: ')
        assert mark and 'Traceback' not in printed, printed
        assert all(word in message for word in words), message

    return fails


@pytest.fixture(scope='module')
def segmentor(configs, demo_data):
    """The last checkpoint of a segmentor trained for 6 iterations."""
    with contextlib.chdir(demo_data):
        train(configs / 'segmentor.py', work_dir='seg')
    return demo_data / 'seg' / 'iter_6.pth'


@pytest.fixture(scope='module')
def detector(configs, demo_data):
    with contextlib.chdir(demo_data):
        train(configs / 'detector.py', work_dir='det', pretrained=False)
    return demo_data / 'det' / 'epoch_1.pth'


def maps(folder):
    return {p.name: np.array(Image.open(p)) for p in sorted(Path(folder).glob('*.png'))}


@pytest.fixture(scope='module')
def label_maps(segmentor, configs, demo_data):
    """What the trained segmentor predicts."""
    with contextlib.chdir(demo_data):
        evaluate(configs / 'segmentor.py', segmentor, work_dir='seg_test', out='seg_out')
    return maps(demo_data / 'seg_out')


def same_labels(found, expected, share):
    assert set(found) == set(expected) and len(expected) == 2
    assert len(np.unique(np.stack(list(expected.values())))) > 1, 'they say nothing'
    for name, labels in expected.items():
        assert np.mean(found[name] == labels) >= share


def weights(path):
    return torch.load(path, weights_only=False)['state_dict']


def test_train_and_test(configs, demo_data, segmentor, label_maps):
    """As a user runs them, each in its own process."""
    short = ['--cfg-options', 'train_cfg.max_iters=1', 'train_cfg.val_interval=1']
    command = [*tool('train.py'), configs / 'segmentor.py', '--work-dir', 'own', *short]
    run([*command, '--skip-checks', '--no-pretrained'], demo_data)
    assert (demo_data / 'own/iter_1.pth').exists()
    # what the run dumped says what it needs
    dumped = demo_data / 'own/segmentor.py'
    command = [*tool('test.py'), dumped, segmentor, '--out', 'own_out', '--fold']
    run(command, demo_data)
    same_labels(maps(demo_data / 'own_out'), label_maps, 0.999)


def options_of(name, monkeypatch, *args):
    """The arguments with which a tool calls its function."""
    calls = []
    monkeypatch.setattr(f'overlock_mm.apis.{name}.{name}', lambda **kw: calls.append(kw))
    monkeypatch.setattr(sys, 'argv', [name, *args])
    monkeypatch.syspath_prepend(str(ROOT / 'tools'))
    runpy.run_path(str(ROOT / 'tools' / f'{name}.py'), run_name='__main__')
    return calls[0]


def test_options_of_train(monkeypatch):
    defaults = dict(
        config='c.py',
        work_dir=None,
        cfg_options=None,
        resume=False,
        amp=False,
        auto_scale_lr=False,
        pretrained=True,
        skip_checks=False,
        launcher='none',
    )
    assert options_of('train', monkeypatch, 'c.py') == defaults
    args = '--work-dir w --amp --auto-scale-lr --no-pretrained --skip-checks --resume'
    args += ' --launcher slurm --cfg-options a.b=1 c=x'
    assert options_of('train', monkeypatch, 'c.py', *args.split()) == dict(
        config='c.py',
        work_dir='w',
        cfg_options={'a.b': 1, 'c': 'x'},
        resume=True,
        amp=True,
        auto_scale_lr=True,
        pretrained=False,
        skip_checks=True,
        launcher='slurm',
    )
    resumed = options_of('train', monkeypatch, 'c.py', '--resume', 'w.pth')
    assert resumed == dict(defaults, resume='w.pth')


def test_options_of_test(monkeypatch):
    defaults = dict(
        config='c.py',
        checkpoint='w.pth',
        work_dir=None,
        cfg_options=None,
        out=None,
        show_dir=None,
        show=False,
        wait_time=2.0,
        tta=False,
        fold=False,
        dtype='float32',
        skip_checks=False,
        launcher='none',
    )
    assert options_of('test', monkeypatch, 'c.py', 'w.pth') == defaults
    args = '--work-dir w --out o --show-dir s --show --wait-time 0.5 --tta --fold'
    args += ' --dtype bfloat16 --skip-checks --launcher mpi --cfg-options a=1'
    assert options_of('test', monkeypatch, 'c.py', 'w.pth', *args.split()) == dict(
        config='c.py',
        checkpoint='w.pth',
        work_dir='w',
        cfg_options={'a': 1},
        out='o',
        show_dir='s',
        show=True,
        wait_time=0.5,
        tta=True,
        fold=True,
        dtype='bfloat16',
        skip_checks=True,
        launcher='mpi',
    )


def test_a_checkpoint_that_does_not_fit(segmentor, configs, fails, demo_data):
    """Neither with these tools nor with MMSegmentation's own."""
    change = ['--cfg-options', 'model.backbone.context_skip=True']
    words = ['missing from the file: backbone.', 'context_skip=False, for a segmentation']
    fails('test.py', configs / 'segmentor.py', segmentor, *change, words=words)
    stock = Path(mmseg.__file__).parent / '.mim/tools/test.py'
    command = [sys.executable, stock, configs / 'segmentor.py', segmentor, *change]
    line = run(command, demo_data, status=1).stderr.splitlines()[-1]
    assert 'CheckpointError: ' in line and all(word in line for word in words)


def test_deploy_checkpoint(segmentor, label_maps, configs, call, fails, demo_data):
    args = ['deploy_checkpoint.py', configs / 'segmentor.py', segmentor, 'merged.pth']
    assert 'agree to' in call(*args).out
    merged, trained = weights(demo_data / 'merged.pth'), weights(segmentor)
    assert not any('origin_bn' in k for k in merged) and len(merged) < len(trained)
    fails(*args, words=['merged.pth exists', '--force'])
    again = ['deploy_checkpoint.py', 'merged.py', 'merged.pth', 'merged.pth', '--force']
    fails(*again, words=['merged.pth is one of the given files'])
    call('test.py', 'merged.py', 'merged.pth', '--out', 'merged_out')
    same_labels(maps('merged_out'), label_maps, 0.999)


def test_convert_checkpoint(segmentor, label_maps, configs, call, fails, demo_data):
    args = ['convert_checkpoint.py', segmentor]
    verify = ['--verify', configs / 'segmentor.py']
    printed = call(*args, 'former.pth', '--to', 'released', *verify).out
    assert 'Verified: all' in printed and 'classes' in printed and 'Wrote' in printed
    former = torch.load(demo_data / 'former.pth')
    assert set(former) == {'meta', 'state_dict'} and former['meta']['CLASSES']
    fails(*args, 'former.pth', words=['former.pth exists', '--force'])
    keep = ['w.safetensors', '--keep-optimizer']
    fails(*args, *keep, words=['has no place for --keep-optimizer'])
    back = ['convert_checkpoint.py', 'former.pth', 'back.safetensors', '--half']
    call(*back, '--safetensors')
    call('test.py', configs / 'segmentor.py', 'back.safetensors', '--out', 'back_out')
    same_labels(maps('back_out'), label_maps, 0.98)  # the weights were rounded
    broken = former['state_dict']['backbone.blocks1.0.dwconv.bias']
    broken.fill_(float('nan'))
    torch.save(former, demo_data / 'nan.pth')
    nan = ['convert_checkpoint.py', 'nan.pth', 'out.pth', *verify]
    fails(*nan, words=['not finite; not written'])
    assert not (demo_data / 'out.pth').exists()


def test_convert_detector(detector, configs, call, demo_data):
    args = ['convert_checkpoint.py', detector, 'det_former.pth', '--to', 'released']
    args += ['--keep-optimizer', '--verify', configs / 'detector.py']
    score = ['--cfg-options', 'model.test_cfg.rcnn.score_thr=0.0']
    printed = call(*args, *score).out
    assert 'Verified: all' in printed and 'noise: 0 objects' not in printed
    former = torch.load(demo_data / 'det_former.pth', weights_only=False)
    assert {'meta', 'state_dict', 'optimizer'} <= set(former)


def test_convert_an_imagenet_file(configs, call, fails, demo_data):
    torch.manual_seed(0)
    source = OverLoCK(TINY)
    state = {k: v for k, v in source.state_dict().items() if 'extra_norm' not in k}
    torch.save(dict(model=state), demo_data / 'imagenet.pth')
    args = ['convert_checkpoint.py', 'imagenet.pth', 'dense.pth']
    fails(*args, words=['imagenet.pth is OverLoCK', "'segmentation' or 'detection'"])
    verify = ['--verify', configs / 'segmentor.py']
    assert 'Verified: all' in call(*args, '--to', 'segmentation', *verify).out
    source.load_state_dict(weights(demo_data / 'dense.pth'), strict=True)


def test_a_file_that_must_be_trusted(configs, call, fails, demo_data):
    """A tool says what it holds, and reads it when told to."""
    state = {f'backbone.{k}': v for k, v in OverLoCK(TINY).state_dict().items()}
    content = dict(state_dict=state, extra=pathlib.PurePosixPath('a'))
    torch.save(content, demo_data / 'path.pth')
    convert = ['convert_checkpoint.py', 'path.pth', 'trusted.pth']
    fails(*convert, words=['holds pathlib.', 'trust'])
    call(*convert, '--trust')
    deploy = ['deploy_checkpoint.py', configs / 'segmentor.py', 'path.pth', 'd.pth']
    fails(*deploy, '--trust', words=['missing from the file: decode_head.'])


@pytest.mark.parametrize(
    'config, words',
    [
        (
            'segmentation/upernet_overlock_t.py',
            [
                'data/ade/ADEChallengeData2016/images/training does not exist',
                'annotations/validation',
                'ADEChallengeData2016.zip',
                'link it',
            ],
        ),
        (
            'detection/mask_rcnn_overlock_t_1x.py',
            [
                'data/coco/annotations/instances_train2017.json does not exist',
                'data/coco/val2017',
                'cocodataset.org',
                'link it',
            ],
        ),
        (
            'segmentation/upernet_overlock_xt_demo.py',
            ['data/demo/images/training does not exist', 'overlock demo-data'],
        ),
    ],
)
def test_missing_dataset(fails, tmp_path, monkeypatch, config, words):
    monkeypatch.chdir(tmp_path)
    fails('train.py', ROOT / 'configs' / config, words=words)


def test_missing_files(fails):
    fails('train.py', 'none.py', words=['none.py does not exist'])
    fails('test.py', 'none.py', 'none.pth', words=['none.py does not exist'])
    fails('test.py', SEGMENTATION, 'none.pth', words=['none.pth does not exist'])
    resume = ['train.py', SEGMENTATION, '--resume', 'none.pth']
    fails(*resume, words=['none.pth does not exist'])


def test_weights_that_cannot_be_downloaded(configs, fails):
    options = [
        '--cfg-options',
        'model.backbone.init_cfg.type=Pretrained',
        'model.backbone.init_cfg.checkpoint=http://127.0.0.1:9/weights.pth',
    ]
    args = ['train.py', configs / 'segmentor.py', '--work-dir', 'pretrained', *options]
    fails(*args, words=['cannot be downloaded', '--no-pretrained'])


@pytest.mark.parametrize('absent', ['torch', 'overlock_mm'])
def test_missing_packages(absent, tmp_path):
    """All tools, in one process of their own: what they import stays half imported."""
    code = f"""
import runpy, sys
sys.modules[{absent!r}] = None  # what import does for a package that is not there
sys.path.insert(0, {str(ROOT / 'tools')!r})
for name in {TOOLS}:
    sys.argv = [name]
    try:
        runpy.run_path(f'{ROOT / 'tools'}/{{name}}.py', run_name='__main__')
    except SystemExit as ended:
        assert ended.code == 2, name
"""
    errors = run([sys.executable, '-c', code], tmp_path).stderr
    install = f'error: {absent} is not installed; in the folder of overlock_mm run: pip'
    assert errors.count(install) == errors.count('error: ') == len(TOOLS), errors


SCRIPTS = [
    (
        'dist_train.sh c.py 4 --amp',
        {},
        'python -m torch.distributed.run --nproc_per_node=4 --nnodes=1 --node_rank=0 '
        '--master_addr=127.0.0.1 --master_port=29500 TOOLS/train.py c.py '
        '--launcher pytorch --amp',
    ),
    (
        'dist_test.sh c.py w.pth 2 --out a&b',
        dict(NNODES='2', NODE_RANK='1', MASTER_ADDR='node0', PORT='1234'),
        'python -m torch.distributed.run --nproc_per_node=2 --nnodes=2 --node_rank=1 '
        '--master_addr=node0 --master_port=1234 TOOLS/test.py c.py w.pth '
        '--launcher pytorch --out a&b',
    ),
    (
        'slurm_train.sh gpu job c.py runs --amp',
        dict(GPUS='16'),
        'srun --partition=gpu --job-name=job --gres=gpu:8 --ntasks=16 '
        '--ntasks-per-node=8 --cpus-per-task=5 --kill-on-bad-exit=1 python -u '
        'TOOLS/train.py c.py --work-dir runs --launcher slurm --amp',
    ),
    (
        'slurm_train.sh gpu job c.py --resume',
        dict(GPUS='2', SRUN_ARGS='--mem=8G --time=1:00'),
        'srun --partition=gpu --job-name=job --gres=gpu:2 --ntasks=2 '
        '--ntasks-per-node=2 --cpus-per-task=5 --kill-on-bad-exit=1 --mem=8G '
        '--time=1:00 python -u TOOLS/train.py c.py --launcher slurm --resume',
    ),
    (
        'slurm_test.sh gpu job c.py w.pth --tta',
        dict(GPUS='8', GPUS_PER_NODE='4', CPUS_PER_TASK='2'),
        'srun --partition=gpu --job-name=job --gres=gpu:4 --ntasks=8 '
        '--ntasks-per-node=4 --cpus-per-task=2 --kill-on-bad-exit=1 python -u '
        'TOOLS/test.py c.py w.pth --launcher slurm --tta',
    ),
]


@pytest.mark.parametrize('command, variables, expected', SCRIPTS)
def test_scripts_for_several_gpus(tmp_path, command, variables, expected):
    for name in ('python', 'srun'):
        (tmp_path / name).write_text(f'#!/bin/sh\necho {name} "$@"\n')
        (tmp_path / name).chmod(0o755)
    env = dict(PATH=f'{tmp_path}:{os.environ["PATH"]}', **variables)
    name, *args = command.split()
    script = str(ROOT / 'tools' / name)
    printed = subprocess.run([script, *args], env=env, capture_output=True, text=True)
    assert printed.stdout.strip() == expected.replace('TOOLS', str(ROOT / 'tools'))
    usage = subprocess.run([script], env=env, capture_output=True, text=True)
    assert usage.returncode == 2 and usage.stderr.startswith(f'usage: {script} ')


def test_swap_backbone(call, fails, tmp_path):
    stock = Path(mmseg.__file__).parent / '.mim/configs'
    config = stock / 'segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py'
    printed = call('swap_backbone.py', config, '--arch', 'xt', '--dry-run').out
    assert '[32, 64, 160, 256] -> [56, 112, 340, 420]' in printed
    assert '_delete_=True' in printed and "type='OverLoCK'" in printed
    out = tmp_path / 'new.py'
    more = ['--no-pretrained', '--drop-path-rate', '0.4', '--out', out]
    printed = call('swap_backbone.py', config, '--arch', 'xt', *more).out
    assert f'wrote {out}' in printed
    backbone = Config.fromfile(out).model.backbone
    assert backbone == dict(type='OverLoCK', arch='xt', drop_path_rate=0.4)
    dilated = stock / 'pspnet/pspnet_r50-d8_4xb4-80k_ade20k-512x512.py'
    again = ['--force', '--out', out]
    fails('swap_backbone.py', dilated, *again, words=['strides [8, 8]', '--keep-strides'])
    assert 'pspnet' not in out.read_text()
    call('swap_backbone.py', dilated, '--keep-strides', *again)
    assert Config.fromfile(out).model.neck.scales == [2, 4]


@pytest.mark.parametrize(
    'code, expected',
    [
        ('import _guard, overlock_mm', "'1000' '1'"),  # a tool
        ("sys.argv = ['overlock']; import overlock_mm", "'1000' '1'"),
        ('import overlock_mm', 'None None'),  # a program of somebody else
        ("os.environ['GOMP_SPINCOUNT'] = '7'; import _guard, overlock_mm", "'7' '1'"),
    ],
)
def test_settings_of_a_process(code, expected, monkeypatch, tmp_path):
    for name in ('GOMP_SPINCOUNT', 'THP_MEM_ALLOC_ENABLE', 'OVERLOCK_MM_TOOL'):
        monkeypatch.delenv(name, raising=False)
    show = 'get = os.environ.get; print(repr(get("GOMP_SPINCOUNT")), '
    show += 'repr(get("THP_MEM_ALLOC_ENABLE")))'
    paths = f'import os, sys; sys.path.insert(0, {str(ROOT / "tools")!r}); '
    printed = run([sys.executable, '-c', f'{paths}{code}; {show}'], tmp_path).stdout
    assert printed.strip() == expected
