"""The metafiles: one entry for every config and classifier, with the published numbers."""

import re
from functools import cache
from itertools import product
from pathlib import Path

import pytest
from helpers import ROOT
from mmengine.config import Config
from mmengine.config.utils import MODULE2PACKAGE
from mmengine.fileio import load
from mmengine.hub import get_config

from overlock_mm.timm import default_cfgs

README = (ROOT / 'README.md').read_text()
# The documents that may have tables of results; what several have must be the same.
DOCUMENTS = [README, *(path.read_text() for path in sorted(ROOT.glob('docs/*.md')))]
CONFIGS = sorted(ROOT.glob('configs/[!_]*/*.py'))
METAFILES = {path: load(path) for path in sorted(ROOT.glob('configs/*/metafile.yml'))}
CLASSIFIERS = METAFILES.pop(ROOT / 'configs/classification/metafile.yml')
ENTRIES = [entry for metafile in METAFILES.values() for entry in metafile['Models']]
NAMES = [entry['Name'] for entry in ENTRIES]

SOURCE = 'published by the authors, not measured here'
TASKS = {
    'mIoU': ('Semantic Segmentation', 'ADE20K'),
    'box AP': ('Object Detection', 'COCO'),
    'mask AP': ('Instance Segmentation', 'COCO'),
    'Top 1 Accuracy': ('Image Classification', 'ImageNet-1K'),
}
COLLECTIONS = dict(
    EncoderDecoder='UperNet', MaskRCNN='Mask R-CNN', CascadeRCNN='Cascade Mask R-CNN'
)
TRAINING_DATA = {
    'data/ade/ADEChallengeData2016/': 'ADE20K',
    'data/coco/': 'COCO',
    'data/demo/': 'demo scenes',
}
LENGTHS = dict(Iterations='max_iters', Epochs='max_epochs')


def in_documents(pattern):
    """What a pattern finds in the documents, each once."""
    return list(dict.fromkeys(f for text in DOCUMENTS for f in re.findall(pattern, text)))


def rows():
    """The results by the config that is linked beside them; None: not published."""
    found = in_documents(r'\| ([^|\n]+) \| \[config\]\((?:\.\./)?configs/\w+/(\w+)\.py\)')
    assert len({name for _, name in found}) == len(found)  # no two numbers for one
    return {name: metrics(cell) for cell, name in found}


def metrics(cell):
    if cell == 'none published':
        return None
    values = [float(value) for value in cell.split(' / ')]
    names = ['mIoU'] if len(values) == 1 else ['box AP', 'mask AP']
    return dict(zip(names, values, strict=True))


def as_results(values):
    """Metrics as an entry should have them."""
    return [
        dict(Task=task, Dataset=dataset, Metrics={name: values[name]}, Source=SOURCE)
        for name, (task, dataset) in TASKS.items()
        if name in values
    ]


def expanded(pattern):
    """The file names of a pattern with braces."""
    parts = re.split(r'\{(.*?)\}', pattern)
    return [''.join(choice) for choice in product(*(part.split(',') for part in parts))]


def with_key(key):
    return {entry['Name']: entry[key] for entry in ENTRIES if key in entry}


@pytest.fixture(scope='module')
def read():
    """Reads a config; MMDetection's metafiles only once (else 1 s for each config)."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('mmengine.config.utils.load', cache(load))
        yield lambda path: Config.fromfile(ROOT / path, import_custom_modules=False)


def test_index():
    files = [str(path.relative_to(ROOT)) for path in METAFILES]
    assert load(ROOT / 'model-index.yml') == dict(Import=files)
    assert {path.parent for path in METAFILES} == {path.parent for path in CONFIGS}


@pytest.mark.parametrize('path', METAFILES, ids=lambda path: path.parent.name)
def test_every_config_has_one_entry(path):
    entries = METAFILES[path]['Models']
    files = [str(p.relative_to(ROOT)) for p in CONFIGS if p.parent == path.parent]
    assert sorted(entry['Config'] for entry in entries) == files
    assert all(Path(entry['Config']).stem == entry['Name'] for entry in entries)
    needed = {'Name', 'In Collection', 'Config', 'Metadata'}
    for entry in entries:
        assert needed <= set(entry) <= needed | {'Results', 'Weights'}, entry['Name']


def test_names_are_unique():
    assert sorted(set(NAMES)) == sorted(NAMES)


@pytest.mark.parametrize('path', METAFILES, ids=lambda path: path.parent.name)
def test_collections(path):
    """Each is used, and has the paper that the README cites."""
    collections = METAFILES[path]['Collections']
    names = [collection['Name'] for collection in collections]
    assert len(set(names)) == len(names)
    assert set(names) == {entry['In Collection'] for entry in METAFILES[path]['Models']}
    (title,) = re.findall(r'^  title=\{(.+)\},$', README, re.M)
    for collection in collections:
        assert collection['Paper']['Title'] == title
        assert f'({collection["Paper"]["URL"]})' in README
        assert (ROOT / collection['README']).is_file()


def test_results_are_those_of_the_documents():
    published = rows()
    assert with_key('Results') == {
        name: as_results(values) for name, values in published.items() if values
    }
    # the others are not in its tables
    others = re.compile('cascade|_demo$|_layer_decay$')
    assert set(published) == {name for name in NAMES if not others.search(name)}


def test_the_table_of_the_readme():
    """One line for each arch: top-1, UperNet, and Mask R-CNN 1x and 3x."""
    cells = re.findall(r'^\| OverLoCK-(\w+) \| \d+M \| ([\d.]+) \| (.+) \|$', README, re.M)
    assert len(cells) == 4
    top1 = {
        e['Name'].removeprefix('overlock_'): e['Results'][0]['Metrics']['Top 1 Accuracy']
        for e in CLASSIFIERS['Models']
    }
    published = rows()
    for arch, accuracy, rest in cells:
        arch = arch.lower()
        names = (
            'upernet_overlock_{}',
            'mask_rcnn_overlock_{}_1x',
            'mask_rcnn_overlock_{}_3x',
        )
        assert float(accuracy) == top1[arch]
        for cell, name in zip(rest.split(' | '), names, strict=True):
            assert metrics(cell) == published[name.format(arch)], (arch, name)


def test_weights_are_those_of_the_documents():
    (address,) = in_documents(r'The released files are at `(\S+)`')
    patterns = in_documents(r'(?m)^\| `((?:upernet|maskrcnn)\S+\.pth)` \|')
    expected = {}
    for arch, size in dict(t='tiny', s='small', b='base').items():
        expected[f'upernet_overlock_{arch}'] = f'upernet_overlock_{size}_ade20k.pth'
        for kind in ('1x', '3x'):
            name = f'mask_rcnn_overlock_{arch}_{kind}'
            expected[name] = f'maskrcnn{kind}_overlock_{size}_coco.pth'
    files = [file for pattern in patterns for file in expanded(pattern)]
    assert sorted(files) == sorted(expected.values())
    assert with_key('Weights') == {name: address + f for name, f in expected.items()}


@pytest.mark.parametrize('entry', ENTRIES, ids=NAMES)
def test_metadata_is_that_of_the_config(entry, read):
    cfg = read(entry['Config'])
    backbone = f'OverLoCK-{cfg.model.backbone.arch.upper()}'
    (parameters,) = in_documents(rf'(?m)^\| {backbone} \| (\d+)M \|')
    assert entry['Metadata'] == {
        'Backbone': backbone,
        'Backbone Parameters (M)': int(parameters),
        'Training Data': TRAINING_DATA[cfg.train_dataloader.dataset.data_root],
        'Batch Size': cfg.auto_scale_lr.base_batch_size,
        **{n: cfg.train_cfg[key] for n, key in LENGTHS.items() if key in cfg.train_cfg},
    }
    assert entry['In Collection'] == f'{COLLECTIONS[cfg.model.type]} with OverLoCK'
    if 'Weights' in entry:  # the ImageNet weights are in the same place
        start = cfg.model.backbone.init_cfg.checkpoint
        assert start.rpartition('/')[0] == entry['Weights'].rpartition('/')[0]


def test_classifiers():
    """Those of timm, with the numbers and weights of the documents."""
    published = in_documents(r'(?m)^\| OverLoCK-(\w+) \| (\d+)M \| [\d.]+G \| ([\d.]+) \|')
    released = in_documents(r'(?m)^\| `(overlock_\{\S+_224\.pth)` \|')
    assert len(published) == 4 and len(released) == 1
    files = expanded(released[0])
    (collection,) = CLASSIFIERS['Collections']
    (title,) = in_documents(r'(?m)^  title=\{(.+)\},$')
    assert collection['Paper']['Title'] == title
    assert (ROOT / collection['README']).is_file()
    for entry, (arch, size, top1), file in zip(
        CLASSIFIERS['Models'], published, files, strict=True
    ):
        assert entry == {
            'Name': f'overlock_{arch.lower()}',
            'In Collection': collection['Name'],
            'Metadata': {
                'Backbone': f'OverLoCK-{arch}',
                'Backbone Parameters (M)': int(size),
                'Training Data': 'ImageNet-1K',
            },
            'Results': as_results({'Top 1 Accuracy': float(top1)}),
            'Weights': default_cfgs[entry['Name']].cfgs['in1k'].url,
        }
        assert entry['Weights'].endswith(f'/{file}')


@pytest.mark.parametrize(
    'path', ['segmentation/upernet_overlock_s.py', 'detection/mask_rcnn_overlock_b_3x.py']
)
def test_mmengine_finds_the_weights(path, read, tmp_path, monkeypatch):
    """As it does for a package whose folder .mim holds the index and the configs."""
    (tmp_path / '.mim').mkdir()
    for name in ('model-index.yml', 'configs'):
        (tmp_path / '.mim' / name).symlink_to(ROOT / name)
    monkeypatch.setitem(MODULE2PACKAGE, 'overlock_mm', 'overlock_mm')
    monkeypatch.setattr('mmengine.hub.hub.install_package', lambda package: None)
    monkeypatch.setattr('mmengine.hub.hub.get_installed_path', lambda package: tmp_path)
    cfg = get_config(f'overlock_mm::{path}', pretrained=True)
    assert cfg.model_path == with_key('Weights')[Path(path).stem]
    assert cfg.model == read(f'configs/{path}').model
