"""What README and the other documents say exists, and their Python code compiles."""

import argparse
import ast
import importlib.util
import re
from pathlib import Path

import pytest
from helpers import ROOT

from overlock_mm.cli import COMMANDS
from overlock_mm.cli.common import add_debug_option
from overlock_mm.config.load import load_config

DOCUMENTS = [
    *ROOT.glob('*.md'),
    *ROOT.glob('docs/*.md'),
    *ROOT.glob('benchmarks/*.md'),
]


def blocks(path, language):
    return re.findall(rf'^```{language}\n(.*?)^```', path.read_text(), re.M | re.S)


def named(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize('path', DOCUMENTS, ids=named)
def test_links_lead_somewhere(path):
    text = path.read_text()
    links = re.findall(r'\]\(([^)#\s]+)', text)
    for link in links:
        if not link.startswith(('http://', 'https://')):
            assert (path.parent / link).exists(), link
    anchors = re.findall(r'\]\(#([^)]+)\)', text)
    titles = [
        t.strip('# ').lower().replace(' ', '-') for t in re.findall('^#+ .*', text, re.M)
    ]
    assert set(anchors) <= set(titles)
    folders = 'configs|docs|tests|tools|overlock_mm|benchmarks'
    for name in re.findall(rf'`((?:{folders})/[\w/.-]+)`', text):
        assert (ROOT / name).exists() or 'NAME' in name, name


def options_of(command):
    """The options of a command of ``overlock``."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f'overlock_mm.cli.{command}').add_arguments(parser)
    add_debug_option(parser)
    return set(parser._option_string_actions)


def checked_words(command, words):
    """Check a command of ``overlock`` with its arguments."""
    for word in words:
        if word.startswith('--'):
            assert word.partition('=')[0] in options_of(command), (command, word)
        if word.startswith('configs/'):
            assert (ROOT / word).is_file(), (command, word)


@pytest.mark.parametrize('path', DOCUMENTS, ids=named)
def test_commands_exist(path):
    """Every command, tool, config and make target that is named, and every option."""
    targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M)
    text = path.read_text().replace('\\\n', ' ')
    for target in re.findall(r'`make ([\w-]+)`|^make ([\w-]+)', text, re.M):
        assert (target[0] or target[1]) in targets, target
    for name, rest in re.findall(r'(?:`|^)overlock ([a-z-]+)([^`\n]*)', text, re.M):
        assert name.replace('-', '_') in COMMANDS, name
        checked_words(name.replace('-', '_'), rest.split())
    for command in re.findall(r'tools/\w+\.\w+[^`\n]*', text):
        tool, *words = command.partition('#')[0].split()
        script = ROOT / tool.rstrip('.,:;)')
        assert script.is_file(), tool
        source = script.read_text()
        called = re.search(r"main\('(\w+)'\)", source)
        called = called or re.search(r'/(train|test)\.py', source)  # the shell scripts
        if called:
            checked_words(called[1], words)
            continue
        for word in words:
            if word.startswith('--'):
                assert f"'{word.partition('=')[0]}'" in source, command


def test_the_walk_through_own_data(tmp_path, monkeypatch, capsys):
    """The commands of docs/custom_data.md, and what it says that they print."""
    from overlock_mm.cli import main

    monkeypatch.chdir(tmp_path)
    path = ROOT / 'docs/custom_data.md'
    text = path.read_text().replace('\\\n', ' ')
    commands = re.findall(r'^overlock (demo-data|init .*data/demo.*)$', text, re.M)
    assert len(commands) == 3
    for command in commands:
        monkeypatch.setattr('sys.argv', ['overlock', *command.split()])
        main()
    printed = capsys.readouterr().out
    (shown,) = re.findall(r'^```\n(images.*?)^```', path.read_text(), re.M | re.S)
    for line in shown.splitlines():
        assert line in printed or line.strip() == '...', line
    assert load_config('seg.py').model.decode_head.num_classes == 10
    assert load_config('det.py').model.roi_head.mask_head.num_classes == 9


@pytest.mark.parametrize('path', DOCUMENTS, ids=named)
def test_python_code_compiles(path):
    for block in blocks(path, 'python'):
        ast.parse(block)


def test_the_examples_of_the_block():
    """The code of docs/block.md as it stands there."""
    codes = blocks(ROOT / 'docs/block.md', 'python')
    resnet, unet, contmix = ({} for _ in codes)
    for code, names in zip(codes, (resnet, unet, contmix), strict=True):
        exec(code, names)
    assert resnet['logits'].shape == (2, 10)
    assert unet['logits'].shape == (2, 2, 64, 96)
    assert not any('lk_origin' in name for name in unet['fast'].state_dict())
    assert contmix['mixed'].shape == (2, 64, 20, 30)


@pytest.mark.dev_stack
def test_the_table_of_families():
    """Its counts are those of its rows, and each family of the toolboxes has one."""
    _, detection, segmentation = (ROOT / 'docs/families.md').read_text().split('\n## ')
    for text, toolbox, least in ((detection, 'mmdet', 45), (segmentation, 'mmseg', 35)):
        rows = re.findall(r'^\| (\S+) \| (\S*) \| (.*) \|$', text, re.M)
        rows = [row for row in rows if row[0] != 'family']
        works = sum(row[2].startswith('works') for row in rows)
        assert f'{works} of {len(rows)} families work' in text and works >= least
        root = Path(importlib.util.find_spec(toolbox).origin).parent / '.mim/configs'
        families = {p.name for p in root.iterdir() if p.is_dir()} - {'_base_', 'common'}
        assert {row[0] for row in rows} == families
