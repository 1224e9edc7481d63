"""The documentation site: its navigation, the names in it, and a strict build."""

import importlib.util
import pkgutil
import re
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from helpers import ROOT

import overlock_mm
import overlock_mm.hooks

pytestmark = pytest.mark.dev_stack
PAGES = sorted(ROOT.glob('docs/**/*.md'))


@pytest.fixture(scope='module')
def hooks():
    """docs/hooks.py as a module."""
    spec = importlib.util.spec_from_file_location('site_hooks', ROOT / 'docs/hooks.py')
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def pages_in(nav):
    """The pages of a navigation, in order."""
    if isinstance(nav, str):
        return [nav]
    parts = nav.values() if isinstance(nav, dict) else nav
    return [page for part in parts for page in pages_in(part)]


def test_every_page_is_in_the_navigation(hooks):
    text = re.sub('!!python/.*', '{}', (ROOT / 'mkdocs.yml').read_text())
    pages = [str(page.relative_to(ROOT / 'docs')) for page in PAGES]
    outside = set(hooks.PAGES.values()) - {'index.md'}
    assert sorted(pages_in(yaml.safe_load(text)['nav'])) == sorted([*pages, *outside])


def test_names_exist():
    """What pages and the API name in backquotes or after ::: can be imported."""
    found = set()
    for page in PAGES:
        text = page.read_text()
        found.update(re.findall(r'`(overlock_mm(?:\.\w+)+)', text))
        found.update(re.findall(r'^::: (\S+)$', text, re.M))
    assert len(found) > 20
    for name in sorted(found):
        if not hasattr(torch.ops.overlock_mm, name.partition('.')[2]):  # an operator
            pkgutil.resolve_name(name)


def test_the_api_has_all_that_is_public():
    text = ''.join(page.read_text() for page in ROOT.glob('docs/api/*.md'))
    described = {name.rpartition('.')[2] for name in re.findall('^::: (.*)', text, re.M)}
    public = set(overlock_mm.__all__) - {'__version__'} | set(overlock_mm.hooks.__all__)
    assert public <= described


@pytest.fixture(scope='module')
def copy(tmp_path_factory):
    """The repository with a copy of its documents."""
    root = tmp_path_factory.mktemp('repository')
    for path in ROOT.iterdir():
        if path.name in ('docs', 'README.md'):
            (shutil.copytree if path.is_dir() else shutil.copy)(path, root / path.name)
        elif not path.name.startswith('.') and path.name not in ('site', 'data'):
            (root / path.name).symlink_to(path)
    return root


def built(root):
    command = [sys.executable, '-m', 'mkdocs', 'build', '--strict']
    return subprocess.run(command, cwd=root, capture_output=True, text=True)


def test_build(copy):
    """Links to files of the repository and names of code lead to pages with these."""
    done = built(copy)
    assert not done.returncode, done.stderr[-3000:]
    page = (copy / 'site/results.html').read_text()
    config = 'files/configs/segmentation/upernet_overlock_t.py.html'
    assert f'href="{config}"' in page
    assert 'upernet_overlock.py' in (copy / 'site' / config).read_text()
    assert 'href="files/tests/parity/README.md.html"' in page
    assert 'href="contributing.html"' in page
    assert 'href="../docs' not in page
    page = (copy / 'site/how_it_works.html').read_text()
    anchor = 'overlock_mm.OverLoCK'
    assert f'href="api/models.html#{anchor}"' in page
    assert f'id="{anchor}"' in (copy / 'site/api/models.html').read_text()
    page = (copy / 'site/benchmarks.html').read_text()
    assert 'href="files/benchmarks/cpu-op-32x32.json.html"' in page
    assert 'src="speed.png"' in page
    written = ''.join(p.read_text() for p in copy.glob('site/api/*.html'))
    assert not re.search(r':(class|func|meth):', written)  # roles of Sphinx
    page = (copy / 'site/api/hooks.html').read_text()
    assert 'href="models.html#overlock_mm.fold"' in page
    assert 'href="models.html#overlock_mm.OverLoCK"' in page
    for path in copy.glob('site/**/*.html'):  # nothing is loaded from elsewhere
        assert not re.search(
            r'<(script|link|img)[^>]* (src|href)="(https?:)?//', path.read_text()
        )


@pytest.mark.parametrize(
    'text, expected',
    [
        ('[a](nowhere.md)', 'nowhere.md'),
        ('[a](../tools/nowhere.py)', 'nowhere.py'),
        ('[a](weights.md#nowhere)', '#nowhere'),
        ('[a](../CHANGELOG.md#nowhere)', '#nowhere'),
        ('::: overlock_mm.nowhere', 'overlock_mm.nowhere'),
    ],
)
@pytest.mark.slow
def test_what_is_broken_fails(copy, text, expected):
    page = copy / 'docs/block.md'
    before = page.read_text()
    page.write_text(f'{before}\n\n{text}\n')
    try:
        done = built(copy)
    finally:
        page.write_text(before)
    assert done.returncode and expected in done.stderr
