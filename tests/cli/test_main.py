"""The command ``overlock``: its commands, and what it says where it cannot run."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import ROOT, TINY, relative_error, run, tiny
from mmengine.config import Config, ConfigDict
from mmengine.logging import HistoryBuffer

import overlock_mm
from overlock_mm import cli
from overlock_mm.apis.swap import write_swapped
from overlock_mm.config.load import load_config
from overlock_mm.errors import UserError

TOOLS = dict(
    convert='convert_checkpoint',
    deploy='deploy_checkpoint',
    swap='swap_backbone',
    validate='validate_imagenet',
    demo_data='make_demo_data',
    init='init_config',
)


def call(monkeypatch, capsys, *arguments):
    """Exit status and output of ``overlock``, in this process."""
    monkeypatch.setattr(sys, 'argv', ['overlock', *arguments])
    status = 0
    try:
        cli.main()
    except SystemExit as ended:
        status = ended.code
    printed = capsys.readouterr()
    return status, printed.out, printed.err


@pytest.mark.parametrize('name', cli.COMMANDS)
def test_each_command_and_its_tool(name, monkeypatch, capsys):
    command = name.replace('_', '-')
    status, out, _ = call(monkeypatch, capsys, command, '--help')
    assert not status and out.startswith(f'usage: overlock {command} ')
    assert '--debug' in out
    if name != 'doctor':
        text = (ROOT / f'tools/{TOOLS.get(name, name)}.py').read_text()
        assert f'`overlock {command}`' in text and f"main('{name}')" in text


def test_help_and_version(monkeypatch, capsys):
    status, out, _ = call(monkeypatch, capsys, '--help')
    assert not status and all(about in out for about in cli.COMMANDS.values())
    status, out, _ = call(monkeypatch, capsys, '--version')
    assert not status and out == f'overlock_mm {overlock_mm.__version__}\n'
    status, _, err = call(monkeypatch, capsys, 'frain')
    assert status == 2 and "'frain'" in err and "'train'" in err


def test_the_two_ways_to_call_it(tmp_path):
    script = Path(sys.executable).with_name('overlock')
    for start in ([script], [sys.executable, '-m', 'overlock_mm']):
        found = subprocess.run(
            [*start, 'train', 'none.py'], cwd=tmp_path, capture_output=True, text=True
        )
        assert found.returncode == 2
        assert found.stderr.startswith('error: config none.py does not exist;')


@pytest.mark.parametrize(
    'absent, words',
    [
        (
            'mmengine',
            "error: mmengine is not installed; run: pip install 'overlock_mm[",
        ),
        ('mmcv', 'error: mmcv is not installed; `overlock doctor` says how to install it'),
        ('addict', 'error: addict is not installed; run: pip install addict\n'),
    ],
)
def test_a_package_is_missing(absent, words, monkeypatch, capsys):
    def missing(args):
        raise ModuleNotFoundError(f'No module named {absent!r}', name=absent)

    monkeypatch.setattr('overlock_mm.cli.demo_data.run', missing)
    status, _, err = call(monkeypatch, capsys, 'demo-data')
    assert status == 2 and err.startswith(words)


def test_a_broken_library(tmp_path):
    """The command says so and names the doctor; an import raises what was raised."""
    (tmp_path / 'timm').mkdir()
    (tmp_path / 'timm/__init__.py').write_text("raise RuntimeError('no nms')")
    path = f'PYTHONPATH={tmp_path}'
    command = ['env', path, sys.executable, '-m', 'overlock_mm']
    error = run([*command, 'train', 'a.py'], tmp_path, status=2).stderr
    assert error.startswith('error: overlock_mm cannot be imported (RuntimeError: no nms)')
    assert 'overlock doctor' in error
    command = ['env', path, sys.executable, '-c', 'import overlock_mm']
    error = run(command, tmp_path, status=1).stderr
    assert error.endswith('RuntimeError: no nms\n')


WITHOUT_MMENGINE = f"""
import sys
class Absent:
    def find_spec(name, path, target=None):
        if name == 'mmengine':
            raise ModuleNotFoundError('No module named mmengine', name=name)
sys.meta_path.insert(0, Absent)
import torch
import overlock_mm, overlock_mm.timm
import timm
model = overlock_mm.OverLoCK({TINY})
overlock_mm.load_checkpoint(model, 'trained.pth')
maps = overlock_mm.fold(model.eval())(torch.ones(1, 3, 64, 64))
torch.save(maps, 'maps.pth')
timm.create_model('overlock_xt')
try:
    overlock_mm.OverLoCK('xt', init_cfg=dict(type='Pretrained', checkpoint='a'))
except ModuleNotFoundError as error:
    print(error)
"""


def test_without_mmengine(tmp_path):
    """The backbone works, with what mmengine wrote, too."""
    model = tiny().eval()
    history = HistoryBuffer([1.0], [1])
    hub = dict(log_scalars=dict(loss=history), runtime_info=ConfigDict(a=1))
    state = {f'backbone.{k}': v for k, v in model.state_dict().items()}
    torch.save(dict(state_dict=state, message_hub=hub), tmp_path / 'trained.pth')
    printed = run([sys.executable, '-c', WITHOUT_MMENGINE], tmp_path).stdout
    assert f'{len(state)} keys loaded' in printed
    assert 'init_cfg needs mmengine, which is not installed; load weights with' in printed
    with torch.no_grad():
        expected = model(torch.ones(1, 3, 64, 64))
    for out, wanted in zip(torch.load(tmp_path / 'maps.pth'), expected, strict=True):
        assert relative_error(out, wanted) < 1e-4


def test_own_configs_as_a_base(tmp_path):
    """They are found from any folder, by the tools and by mmengine itself."""
    path, name = tmp_path / 'mine.py', 'segmentation/upernet_overlock_t.py'
    path.write_text(f"_base_ = 'overlock_mm::{name}'\nwork_dir = 'own'\n")
    expected = load_config(ROOT / 'configs' / name)
    for cfg in (load_config(path), load_config(f'overlock_mm::{name}')):
        assert cfg.model == expected.model
    assert Config.fromfile(path).model == expected.model
    other = dict(pretrained=False, out=str(tmp_path / 'other.py'))
    write_swapped(f'overlock_mm::{name}', arch='timm/resnet18', **other)
    assert f"_base_ = 'overlock_mm::{name}'" in (tmp_path / 'other.py').read_text()
    assert load_config(tmp_path / 'other.py').model.backbone.model_name == 'resnet18'
    with pytest.raises(UserError, match='overlock_mm::x.py does not exist'):
        load_config('overlock_mm::x.py')
