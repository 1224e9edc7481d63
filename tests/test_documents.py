"""What README and the other documents say exists, and their Python code compiles."""

import argparse
import ast
import importlib.util
import re
from pathlib import Path

import pytest
from helpers import ROOT, relative_error

from overlock_mm import OverLoCK
from overlock_mm.archs import ARCHS, DILATED_BRANCHES, STRIDES, context_channels
from overlock_mm.cli import COMMANDS
from overlock_mm.cli.common import add_debug_option
from overlock_mm.config.load import load_config

DOCUMENTS = [
    *ROOT.glob('*.md'),
    *ROOT.glob('docs/**/*.md'),
    *ROOT.glob('benchmarks/*.md'),
]


def blocks(path, language):
    return re.findall(rf'^```{language}\n(.*?)^```', path.read_text(), re.M | re.S)


def named(path):
    return str(path.relative_to(ROOT))


def anchors_of(path):
    """The anchors of the headings of a page, as GitHub and the site make them."""
    text = re.sub(r'^```.*?^```', '', path.read_text(), flags=re.M | re.S)
    titles = (t.replace('`', '').lower() for t in re.findall('^#+ (.*)', text, re.M))
    return {re.sub(r'[^\w\- ]', '', title).strip().replace(' ', '-') for title in titles}


@pytest.mark.parametrize('path', DOCUMENTS, ids=named)
def test_links_lead_somewhere(path):
    text = path.read_text()
    for link in re.findall(r'\]\(([^)\s]+)', text):
        if link.startswith(('http://', 'https://')):
            continue
        name, _, anchor = link.partition('#')
        target = path.parent / name if name else path
        assert target.exists(), link
        assert not anchor or anchor in anchors_of(target), link
    folders = 'configs|docs|tests|tools|overlock_mm|benchmarks'
    for name in re.findall(rf'`((?:{folders})/[\w/.-]+)`', text):
        assert (ROOT / name).exists() or 'NAME' in name, name


def options_of(command, words):
    """The options of a command of ``overlock``, or of what the first word is in it."""
    parser = argparse.ArgumentParser()
    importlib.import_module(f'overlock_mm.cli.{command}').add_arguments(parser)
    add_debug_option(parser)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            parser = action.choices.get(words[0] if words else '', parser)
    return set(parser._option_string_actions)


def checked_words(command, words):
    """Check a command of ``overlock`` with its arguments."""
    for word in words:
        if word.startswith('--'):
            assert word.partition('=')[0] in options_of(command, words), (command, word)
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


def test_the_forms_of_deployment():
    """The code of docs/deployment.md as it stands there: the outputs stay the same."""
    deploy, folded = {}, {}
    for code, names in zip(
        blocks(ROOT / 'docs/deployment.md', 'python')[:2], (deploy, folded), strict=True
    ):
        exec(code, names)
    assert not any('dil_' in name for name, _ in deploy['backbone'].named_modules())
    for before, after in zip(deploy['before'], deploy['after'], strict=True):
        assert relative_error(after, before) < 1e-4
    assert folded['backbone'].folded and len(folded['maps']) == 4


@pytest.mark.slow
@pytest.mark.dev_stack
@pytest.mark.filterwarnings('ignore::torch.jit.TracerWarning')  # the size is fixed
def test_the_exports_of_deployment():
    names = {}
    exec(blocks(ROOT / 'docs/deployment.md', 'python')[2], names)
    expected = names['backbone'](names['images'])
    for form in (names['exported'].module(), names['traced']):
        for out, wanted in zip(form(names['images']), expected, strict=True):
            assert relative_error(out, wanted) < 1e-4


def test_the_table_of_commands():
    """docs/getting_started.md has every command of overlock, with its tool."""
    text = (ROOT / 'docs/getting_started.md').read_text()
    table = re.search(r'^## Commands\n(.*?)^## ', text, re.M | re.S)[1]
    assert set(re.findall(r'`overlock ([a-z-]+)`', table)) == {
        name.replace('_', '-') for name in COMMANDS
    }
    tools = {
        str(tool.relative_to(ROOT)): re.search(r"main\('(\w+)'\)", tool.read_text())
        for tool in ROOT.glob('tools/*.py')
    }
    assert set(re.findall(r'tools/\w+\.py', table)) == {t for t, m in tools.items() if m}


def cells(text, columns):
    """The rows of all tables with this many columns, without their headings."""
    rows = [line.strip('|').split(' | ') for line in re.findall(r'^\|.*\|$', text, re.M)]
    rows = [[cell.strip() for cell in row] for row in rows if '---' not in row[0]]
    return [row for row in rows if len(row) == columns]


def test_speed_is_that_of_the_measurements():
    """docs/performance.md and the README have the numbers of benchmarks/README.md."""
    measured = {}
    for run, _, ratio, memory, _ in cells((ROOT / 'benchmarks/README.md').read_text(), 5):
        ours_theirs = re.fullmatch(r'([\d.]+) against ([\d.]+) MiB', memory)
        if ours_theirs:
            name = re.match(r'\[(.*)\]', run)[1]
            measured[name] = ratio.split()[0], *map(float, ours_theirs.groups())
    runs = ['op-50x84', 'op-50x84-backward', 'backbone-reference']
    runs += ['backbone-convnext_base', 'backbone-convnext_base-1']
    runs += ['train-reference', 'train-convnext_base']
    page = (ROOT / 'docs/performance.md').read_text()
    _, *rows = cells(page, 4)
    assert len(rows) == len(runs)
    for (_, _, ratio, memory), run in zip(rows, runs, strict=True):
        expected, ours, theirs = measured[run]
        assert (ratio, memory) == (expected, f'{ours:.0f} MiB against {theirs:.0f} MiB')
    first = 'train-convnext_base'
    names = {'False': first, '(0,)': 'train-with_cp-0', '(0, 1)': 'train-with_cp-01'}
    names['True'] = 'train-with_cp-01234'
    rows = [row for row in cells(page, 3) if row[1].endswith('MiB')]
    archs, rows = rows[: -len(names)], rows[-len(names) :]
    for arch, memory, ratio in archs:
        arch = arch.removeprefix('OverLoCK-').lower()
        name = first if arch == 't' else f'train-{arch}-convnext_base'
        assert (ratio, memory) == (measured[name][0], f'{measured[name][1]:.0f} MiB')
    assert [row[0].strip('`') for row in rows] == list(names)
    for option, memory, time in rows:
        ratio, ours, _ = measured[names[option.strip('`')]]
        assert memory == f'{ours:.0f} MiB'
        assert time == f'{float(measured[first][0]) / float(ratio):.2f}'
    readme = re.findall(r'([\d.]+) times as fast', (ROOT / 'README.md').read_text())
    assert readme == [measured[n][0] for n in ('backbone-reference', runs[3])]


def test_how_it_works_has_the_sizes_of_the_network():
    text = (ROOT / 'docs/how_it_works.md').read_text()
    _, *rows = cells(text, 7)
    stride, blocks_, channels, kernels = ([*map(str, row[1:])] for row in rows)
    arch, context = ARCHS['t'], context_channels(ARCHS['t'])
    assert [int(s) for s in stride] == [*STRIDES, *STRIDES[2:]]
    assert [int(b) for b in blocks_] == [*arch['depths'], *arch['focus_depths']]
    dims = [*arch['embed_dims'], *arch['embed_dims'][2:]]
    context = ['', '', '', '', *[f' + {context} of the context'] * 2]
    assert channels == [f'{d}{c}' for d, c in zip(dims, context, strict=True)]
    assert [int(k) for k in kernels] == [*arch['kernel_sizes'], *arch['kernel_sizes'][2:]]
    branches = {
        int(kernel): tuple(tuple(map(int, b.split(', '))) for b in cell.split('; '))
        for kernel, cell in cells(text, 2)
        if kernel.isdigit()
    }
    assert branches == {k: DILATED_BRANCHES[k] for k in arch['kernel_sizes']}
    parts = {name.partition('.')[0] for name in OverLoCK('t').state_dict()}
    named = set(re.findall(r'`(\w+)`', text.split('## Names in the code')[1]))
    for part in parts | {'weight_query', 'weight_key', 'weight_proj', 'rpb1', 'rpb2'}:
        assert part in named or part[:-1] + '1' in named, part
