"""What README and the other documents say exists, and their Python code compiles."""

import ast
import importlib.util
import re
from pathlib import Path

import pytest
from helpers import ROOT

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


@pytest.mark.parametrize('path', DOCUMENTS, ids=named)
def test_commands_exist(path):
    """Every tool, config and make target that is named, and every option of a tool."""
    shared = (ROOT / 'overlock_mm/cli.py').read_text()
    targets = re.findall(r'^([\w-]+):', (ROOT / 'Makefile').read_text(), re.M)
    text = path.read_text()
    for target in re.findall(r'`make ([\w-]+)`|^make ([\w-]+)', text, re.M):
        assert (target[0] or target[1]) in targets, target
    for command in re.findall(r'tools/\w+\.\w+[^`\n]*', text.replace('\\\n', ' ')):
        tool, *words = command.partition('#')[0].split()
        script = ROOT / tool.rstrip('.,:;)')
        assert script.is_file(), tool
        api = ROOT / 'overlock_mm/apis' / script.name
        source = script.read_text() + shared + (api.read_text() if api.exists() else '')
        for word in words:
            if word.startswith('--'):
                assert f"'{word.partition('=')[0]}'" in source, command
            if word.startswith('configs/'):
                assert (ROOT / word).is_file(), command


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
