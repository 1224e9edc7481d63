"""The wheel: what it carries, and a training with it outside of the repository."""

import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest
from helpers import ROOT

SOURCES = ('setup.py', 'pyproject.toml', 'MANIFEST.in', 'README.md', 'model-index.yml')


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    """The wheel of a copy of the repository."""
    source = tmp_path_factory.mktemp('source')
    for name in SOURCES:
        shutil.copy(ROOT / name, source)
    ignored = shutil.ignore_patterns('__pycache__', '.mim')
    for name in ('overlock_mm', 'configs'):
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check', 'wheel', '--no-deps']
    command = [*pip, '--no-build-isolation', '--no-index', '-w', source / 'dist', source]
    subprocess.run(command, check=True, capture_output=True)
    (path,) = (source / 'dist').glob('*.whl')
    return path


@pytest.fixture(scope='module')
def installed(wheel, tmp_path_factory):
    """Run a command of a new environment with the wheel, in an empty folder.

    It sees the packages of this environment, but not the editable overlock_mm: Python
    does not follow the .pth files of a folder that a .pth file names.
    """
    root = tmp_path_factory.mktemp('environment')
    subprocess.run(
        [sys.executable, '-m', 'venv', '--without-pip', root / 'env'], check=True
    )
    (packages,) = (root / 'env').glob('lib/python*/site-packages')
    (packages / 'others.pth').write_text(sysconfig.get_path('purelib'))
    pip = [sys.executable, '-m', 'pip', '--python', root / 'env/bin/python', 'install']
    subprocess.run(
        [*pip, '--no-deps', '--no-index', wheel], check=True, capture_output=True
    )
    (root / 'empty').mkdir()
    hidden = ('PYTHONPATH', 'PYTEST_ADDOPTS')
    env = {k: v for k, v in os.environ.items() if k not in hidden}
    env.update(CUDA_VISIBLE_DEVICES='', OMP_NUM_THREADS='1')

    def run(*command):
        command = [root / 'env/bin' / command[0], *command[1:]]
        done = subprocess.run(
            command, cwd=root / 'empty', env=env, capture_output=True, text=True
        )
        assert not done.returncode, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    run.folder = root / 'empty'
    return run


def test_what_the_wheel_carries(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    configs = [p.relative_to(ROOT) for p in (ROOT / 'configs').rglob('*.*')]
    configs = {f'overlock_mm/.mim/{p}' for p in configs if p.suffix in ('.py', '.yml')}
    assert configs | {'overlock_mm/.mim/model-index.yml'} == {
        name for name in names if name.startswith('overlock_mm/.mim/')
    }
    modules = {
        str(p.relative_to(ROOT))
        for p in (ROOT / 'overlock_mm').rglob('*.py')
        if '.mim' not in p.parts
    }
    assert modules == {n for n in names if n.endswith('.py') and '/.mim/' not in n}


def test_it_is_found(installed):
    code = (
        'import overlock_mm, mmengine.hub as hub; print(overlock_mm.__file__);'
        "cfg = hub.get_config('overlock_mm::segmentation/upernet_overlock_t.py');"
        'print(cfg.model.backbone.arch)'
    )
    path, arch = installed('python', '-c', code).split()
    assert not Path(path).is_relative_to(ROOT) and 'site-packages' in path and arch == 't'
    assert installed('overlock', '--version').startswith('overlock_mm ')


def test_training_in_an_empty_folder(installed):
    size = ('--train', '4', '--val', '2', '--size', '64')
    installed('overlock', 'demo-data', *size)
    (installed.folder / 'my.py').write_text(
        "_base_ = ['overlock_mm::segmentation/upernet_overlock_xt_demo.py']\n"
        'model = dict(data_preprocessor=dict(size=(160, 160)))\n'
        'train_cfg = dict(max_iters=1, val_interval=1)\n'
    )
    installed('python', '-m', 'overlock_mm', 'train', 'my.py')
    checkpoint = 'work_dirs/my/iter_1.pth'
    assert (installed.folder / checkpoint).is_file()
    assert 'mIoU' in installed('overlock', 'test', 'my.py', checkpoint)
    where = ('--images', 'data/demo/images/training', '--arch', 'xt')
    masks = ('--masks', 'data/demo/annotations/training')
    printed = installed('overlock', 'init', '--task', 'segmentation', *where, *masks)
    assert 'next: overlock train my_segmentation.py' in printed
