"""The set-up: what it reuses, and one clear line for what it cannot do."""

import importlib.util
import shutil
import stat
import sys

import pytest
from helpers import ROOT

PINS = {'onedl-mmcv': '1.0', 'torch': '2.0'}


@pytest.fixture
def setup_env(tmp_path, monkeypatch):
    """The script as a module, with its folders and its environment's Python replaced."""
    spec = importlib.util.spec_from_file_location('setup_env', ROOT / 'tools/setup_env.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, 'CACHE', tmp_path / 'cache')
    monkeypatch.setattr(module, 'VENV', tmp_path / '.venv')
    module.CACHE.mkdir()

    def python(script):
        """Make the environment's python a shell script."""
        path = tmp_path / 'python'
        path.write_text(
            f'#!/bin/sh\ncase "$*" in *CUDA_HOME*) echo cpu; exit;; esac\n{script}\n'
        )
        path.chmod(path.stat().st_mode | stat.S_IEXEC)
        monkeypatch.setattr(module, 'PYTHON', path)

    module.fake_python = python
    python('exit 1')
    return module


def fails(module, function, *arguments):
    with pytest.raises(module.SetupError) as error:
        function(*arguments)
    assert '\n' not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize('output, expected', [
    ('NewConnectionError: Failed to establish a new connection', 'no network?'),
    ('OSError: [Errno 28] No space left on device', 'the disk is full'),
    ('ERROR: No matching distribution found for nothing==1', 'No matching distribution'),
])  # fmt: skip
def test_pip_fails(setup_env, output, expected):
    setup_env.fake_python(f'echo "{output}"; exit 1')
    assert expected in fails(setup_env, setup_env.pip, 'install', 'nothing==1')


def test_too_little_disk(setup_env, monkeypatch):
    usage = shutil.disk_usage(ROOT)._replace(free=3 * 2**30)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: usage)
    assert '3.0 GB are free' in fails(setup_env, setup_env.check_disk, ROOT)
    # with torch in place, what is left to install fits
    version = setup_env.VENV / 'lib/python3/site-packages/torch/version.py'
    version.parent.mkdir(parents=True)
    version.touch()
    setup_env.check_disk(ROOT)


def test_no_compiler(setup_env, monkeypatch):
    monkeypatch.setenv('CXX', 'no-such-compiler')
    assert 'apt-get install g++' in fails(setup_env, setup_env.mmcv_wheel, PINS)


def test_no_python_headers(setup_env, monkeypatch, tmp_path):
    monkeypatch.setenv('CXX', 'true')
    monkeypatch.setattr(setup_env.sysconfig, 'get_path', lambda name: str(tmp_path))
    assert 'apt-get install python3-dev' in fails(setup_env, setup_env.mmcv_wheel, PINS)


def test_wheel_is_built_once_for_each_version(setup_env, monkeypatch, tmp_path):
    monkeypatch.setenv('CXX', 'true')
    monkeypatch.setattr(setup_env.sysconfig, 'get_path', lambda name: str(tmp_path))
    (tmp_path / 'Python.h').touch()
    # "pip wheel ... -w FOLDER ..." writes a wheel there, and says that it ran
    setup_env.fake_python(
        f'echo built >>{tmp_path}/builds; '
        'while [ "$1" != -w ]; do shift; done; touch "$2/mmcv.whl"'
    )
    first = setup_env.mmcv_wheel(PINS)
    assert setup_env.mmcv_wheel(PINS) == first and first.exists()
    other = setup_env.mmcv_wheel({**PINS, 'torch': '2.1'})
    assert other != first
    assert (tmp_path / 'builds').read_text().split() == ['built', 'built']


def test_failed_build_leaves_no_wheel(setup_env, monkeypatch, tmp_path):
    monkeypatch.setenv('CXX', 'true')
    monkeypatch.setattr(setup_env.sysconfig, 'get_path', lambda name: str(tmp_path))
    (tmp_path / 'Python.h').touch()
    setup_env.fake_python(
        'while [ "$1" != -w ]; do shift; done; touch "$2/mmcv.whl"; exit 1'
    )
    fails(setup_env, setup_env.mmcv_wheel, PINS)
    assert list((setup_env.CACHE / 'wheels').iterdir()) == []


def test_set_up_is_repeated_only_when_the_pins_change(setup_env, monkeypatch, tmp_path):
    calls, requirements = [], tmp_path / 'requirements.txt'
    requirements.write_text('torch==2.0\n')
    monkeypatch.setattr(setup_env, 'REQUIREMENTS', requirements)
    monkeypatch.setattr(setup_env, 'READY', tmp_path / 'ready')
    monkeypatch.setattr(setup_env, 'install', calls.append)
    setup_env.main()
    setup_env.main()
    requirements.write_text('torch==2.1\n')
    setup_env.main()
    assert calls == [{'torch': '2.0'}, {'torch': '2.1'}]


def test_other_python(monkeypatch, setup_env):
    monkeypatch.setattr(sys, 'version_info', (3, 9, 0, 'final', 0))
    assert 'Python 3.11 to 3.13 is needed' in fails(setup_env, setup_env.main)
