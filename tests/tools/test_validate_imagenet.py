"""The command line of validate_imagenet.py; what it computes is tested in tests/apis."""

import runpy
import sys

import pytest
import timm
import torch
from helpers import ROOT, run, tool
from PIL import Image

from overlock_mm.apis import validate as module
from overlock_mm.errors import UserError

SCRIPT = ROOT / 'tools/validate_imagenet.py'


def main(monkeypatch, *arguments):
    monkeypatch.setattr(sys, 'argv', [str(SCRIPT), *arguments])
    runpy.run_path(str(SCRIPT), run_name='__main__')


def test_a_run(tmp_path):
    (tmp_path / 'val/class_0').mkdir(parents=True)
    Image.new('RGB', (64, 64)).save(tmp_path / 'val/class_0/image.png')
    model = timm.create_model('overlock_xt', num_classes=1)
    torch.save(model.state_dict(), tmp_path / 'weights.pth')
    options = ['--model', 'overlock_xt', '--checkpoint', 'weights.pth', '--workers', '0']
    stdout = run([*tool('validate_imagenet.py'), '.', *options], tmp_path).stdout
    line = stdout.splitlines()[-1]
    assert line.startswith('overlock_xt: top-1 100.000 (1 of 1), top-5 100.000 (1 of 1)')


@pytest.mark.parametrize(
    'arguments, expected',
    [
        ([], {}),
        (
            [
                *('--model', 'overlock_s', '--checkpoint', 'https://host/w.pth', '--trust'),
                *('--batch-size', '3', '--workers', '2', '--subset', '5'),
                *('--device', 'cpu', '--fold'),
            ],
            dict(
                model='overlock_s',
                checkpoint='https://host/w.pth',
                trust=True,
                batch_size=3,
                workers=2,
                subset=5,
                device='cpu',
                fold=True,
            ),
        ),
    ],
)
def test_options(monkeypatch, capsys, arguments, expected):
    """Every option arrives, and without options all is as in Python."""
    calls = []

    def validate(folder, **options):
        calls.append((folder, options))
        return 'the result'

    defaults = dict(
        zip(
            module.validate.__code__.co_varnames[1:9],
            module.validate.__defaults__,
            strict=True,
        )
    )
    monkeypatch.setattr(module, 'validate', validate)
    main(monkeypatch, 'images', *arguments)
    assert calls == [('images', {**defaults, **expected})]
    assert capsys.readouterr().out == 'the result\n'


def test_errors(monkeypatch, capsys):
    def validate(*args, **options):
        raise UserError('the reason')

    monkeypatch.setattr(module, 'validate', validate)
    for arguments, message in (
        (['images'], 'error: the reason\n'),
        (['images', '--checkpoint', 'none.pth'], 'none.pth does not exist'),
        (['images', '--batch-size', '0'], '0 must be at least 1'),
        (['images', '--subset', '-1'], '-1 must be at least 1'),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(monkeypatch, *arguments)
        assert stopped.value.code == 2
        assert message in capsys.readouterr().err
