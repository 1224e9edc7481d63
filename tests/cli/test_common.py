"""What the command lines share."""

import argparse
import os

import pytest

from overlock_mm.apis.files import check_file, check_output
from overlock_mm.cli import common as cli
from overlock_mm.errors import CheckpointError, UserError


def failed(capsys, error):
    with pytest.raises(SystemExit) as stopped, cli.plain_errors():
        raise error
    assert stopped.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize('kind', [UserError, CheckpointError])
def test_errors_are_one_line(capsys, kind):
    assert failed(capsys, kind('give a file')) == 'error: give a file\n'


@pytest.mark.parametrize('name', ['RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK'])
def test_every_process_says_why_it_ends(monkeypatch, capsys, name):
    monkeypatch.setenv(name, '3')
    error = failed(capsys, UserError('give a file'))
    assert error == 'error (rank 3): give a file\n'
    monkeypatch.setenv(name, '0')
    assert failed(capsys, UserError('give a file')) == 'error: give a file\n'


@pytest.mark.parametrize('how', ['option', 'environment'])
def test_debug(monkeypatch, capsys, how):
    monkeypatch.setenv('OVERLOCK_MM_DEBUG', '0')
    if how == 'option':
        parser = argparse.ArgumentParser()
        cli.add_debug_option(parser)
        assert vars(parser.parse_args(['--debug'])) == {}
    else:
        monkeypatch.setenv('OVERLOCK_MM_DEBUG', '1')
    error = failed(capsys, UserError('give a file'))
    assert 'Traceback' in error and 'in failed' in error
    assert error.endswith('\nerror: give a file\n')


def test_other_errors_and_interruptions():
    with pytest.raises(ZeroDivisionError), cli.plain_errors():
        raise ZeroDivisionError
    with pytest.raises(SystemExit) as stopped, cli.plain_errors():
        raise KeyboardInterrupt
    assert stopped.value.code == 130


@pytest.mark.parametrize('given', ['--local-rank=2', '--local_rank=2'])
def test_the_rank_of_older_launchers(monkeypatch, given):
    monkeypatch.setenv('LOCAL_RANK', 'unset')
    del os.environ['LOCAL_RANK']
    parser = argparse.ArgumentParser()
    cli.add_run_arguments(parser)
    parser.parse_args([given])
    assert os.environ['LOCAL_RANK'] == '2'


def test_files_to_read(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    with pytest.raises(UserError, match='checkpoint ~/w.pth does not exist; give'):
        check_file('~/w.pth', 'checkpoint')
    (tmp_path / 'w.pth').touch()
    assert check_file('~/w.pth', 'checkpoint') == str(tmp_path / 'w.pth')
    url = 'https://x.org/w.pth'
    assert check_file(url, 'checkpoint') == url


def test_files_to_write(tmp_path):
    out = tmp_path / 'w.pth'
    assert check_output(out, ['.pth'], False) == out
    for path in (tmp_path / 'w.bin', tmp_path / 'none' / 'w.pth'):
        with pytest.raises(UserError, match='must end in .pth or .safetensors and'):
            check_output(path, ['.pth', '.safetensors'], False)
    out.touch()
    with pytest.raises(UserError, match='w.pth exists; give another name, or --force'):
        check_output(out, ['.pth'], False)
    assert check_output(out, ['.pth'], True) == out


@pytest.mark.parametrize(
    'given, expected',
    [
        ('4', 4),
        ('1,2.5,none.pth', [1, 2.5, 'none.pth']),
        ('[(1,2),[a,True]]', [(1, 2), ['a', True]]),
        ("[dict(type='A', n=2), {'type': 'B', 'sizes': (1, -1)}]", None),
        ('[dict(type=A,n=2),dict(type="B",sizes=(1,-1))]', None),  # quotes lost in a shell
        ('{}_epoch.pth', '{}_epoch.pth'),
        (
            'dict(type=mmdet.EMA, on=True, off=None)',
            dict(type='mmdet.EMA', on=True, off=None),
        ),
    ],
)
def test_options_of_a_config(given, expected):
    """Numbers, text and lists as mmengine reads them, and dicts inside of them."""
    parser = argparse.ArgumentParser()
    cli.add_config_options(parser)
    if expected is None:
        expected = [dict(type='A', n=2), dict(type='B', sizes=(1, -1))]
    options = parser.parse_args(['--cfg-options', f'a.b={given}']).cfg_options
    assert options == {'a.b': expected}


def test_options_that_are_none(capsys):
    parser = argparse.ArgumentParser()
    cli.add_config_options(parser)
    with pytest.raises(SystemExit):
        parser.parse_args(['--cfg-options', 'a'])
    assert '--cfg-options: a is not KEY=VALUE' in capsys.readouterr().err
    for wrong in ("[dict(type='A']", 'dict(a=open(b))', 'dict(**a)', 'dict(a=1+x)'):
        with pytest.raises(UserError, match='is not a value; write dicts as in a config'):
            parser.parse_args(['--cfg-options', f'a={wrong}'])
