"""Broken environments, and what the doctor says about each."""

import io
import json
import re
import shlex
import subprocess
import sys
from collections import namedtuple

import pytest

from overlock_mm.apis import doctor

BUILD = (
    "pip install 'setuptools>=77,<82' wheel ninja psutil && MMCV_WITH_OPS=1 pip install "
    '--no-build-isolation --no-cache-dir --no-deps --force-reinstall onedl-mmcv'
)
STACK = "pip install 'torch==2.11.*' 'torchvision==0.26.*'"
# A healthy environment: distributions, and what came of each trial.
VERSIONS = {
    'numpy': '2.2.6',
    'opencv-python': '4.12.0',
    'overlock-mm': '0.1.0',
    'pycocotools': '2.0.11',
    'setuptools': '81.0.0',
    'timm': '1.0.31',
    'torch': '2.11.0',
    'torchvision': '0.26.0',
    'triton': '3.6.0',
    'onedl-mmcv': '2.3.6',
    'onedl-mmdetection': '3.5.1',
    'onedl-mmengine': '0.10.12',
    'onedl-mmsegmentation': '1.4.2',
}
PROBES = {
    **{name: {} for group in doctor._PROBES for name in group},
    'torch': {'threads': 1},
    'torch.cuda': {'built': '13.0', 'hip': None, 'gpus': []},
    'mmcv._ext': {'cuda': 'not available'},
    'overlock_mm': {'device': 'cpu', 'backend': 'torch', 'finite': True, 'seconds': 1.0},
}
OPENMMLAB = {
    'onedl-mmcv': None,
    'onedl-mmdetection': None,
    'onedl-mmengine': None,
    'onedl-mmsegmentation': None,
    'mmcv': '2.1.0',
    'mmdet': '3.3.0',
    'mmengine': '0.10.7',
    'mmsegmentation': '1.2.2',
}
NO_TOOLBOX = {name: None for name in VERSIONS if name.startswith('onedl')}
GPU = {'torch.cuda': {'built': '13.0', 'hip': None, 'gpus': ['NVIDIA H100 (79 GiB)']}}
NMS = 'RuntimeError: operator torchvision::nms does not exist'
SYMBOL = (
    'ImportError: /lib/mmcv/_ext.cpython-311.so: undefined symbol: _ZN3c105Error4whatEv'
)
NUMPY = 'ImportError: numpy.core.multiarray failed to import'


def missing(name):
    return {'error': f"ModuleNotFoundError: No module named '{name}'", 'missing': True}


def failing(error):
    return {'error': error, 'missing': False}


@pytest.fixture
def examine(monkeypatch):
    """Rows by name, in an environment that differs from the healthy one."""
    for variable in ('OMP_NUM_THREADS', 'OVERLOCK_MM_CONTMIX'):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(doctor, '_cores', lambda: 2)
    monkeypatch.setattr(doctor, 'requires', lambda name: ['setuptools<82', 'filelock'])

    def run(versions=None, probes=None):
        installed = {n: v for n, v in {**VERSIONS, **(versions or {})}.items() if v}
        monkeypatch.setattr(doctor, '_installed', lambda: installed)
        monkeypatch.setattr(doctor, '_probe', lambda: {**PROBES, **(probes or {})})
        rows = {row.name: row for row in doctor.examine()}
        for row in rows.values():
            shlex.split(row.cure.partition(': ')[2] or row.cure)  # quotes fit together
            assert 'this check failed' not in row.found
        return rows

    return run


def statuses(rows, status):
    return [name for name, row in rows.items() if row.status == status]


def test_this_environment(capsys):
    assert doctor.doctor(as_json=True) == 0
    result = json.loads(capsys.readouterr().out)
    assert result['ok'] is True
    rows = {row.pop('name'): row for row in result['rows']}
    assert list(rows) == list(doctor._CHECKS)
    assert not [row for row in rows.values() if row['status'] == 'broken']
    for name in (
        'torch',
        'torchvision',
        'timm',
        'numpy',
        'mmengine',
        'mmcv ops',
        'ContMix',
    ):
        assert rows[name]['status'] == 'ok', rows[name]
    assert re.search(r'\d s; all outputs are finite', rows['forward pass']['found'])


def test_healthy(examine):
    rows = examine()
    assert set(statuses(rows, 'ok')) == set(doctor._CHECKS)
    assert not any(row.cure for row in rows.values())
    assert rows['mmdet'].found == 'onedl-mmdetection 3.5.1'
    assert rows['ContMix'].found == "backend 'torch' on cpu"


def test_openmmlab(examine):
    assert set(statuses(examine(OPENMMLAB), 'ok')) == set(doctor._CHECKS)


def test_no_toolbox(examine):
    versions = NO_TOOLBOX | {'opencv-python': None, 'pycocotools': None}
    names = ('mmengine', 'mmcv', 'mmcv._ext', 'mmdet', 'mmseg', 'cv2', 'pycocotools')
    rows = examine(versions, {n: missing(n.partition('.')[0]) for n in names})
    assert not statuses(rows, 'broken') + statuses(rows, 'warning')
    assert rows['OpenMMLab'].cure == "pip install 'overlock_mm[onedl]'"
    assert rows['mmdet'].cure == 'pip install onedl-mmdetection'
    assert rows['mmcv'].cure.endswith(
        'MMCV_WITH_OPS=1 pip install --no-build-isolation --no-cache-dir onedl-mmcv'
    )
    assert rows['mmcv ops'] == doctor.Row('mmcv ops', 'absent', 'they come with mmcv', '')
    assert rows['opencv'].cure == 'pip install opencv-python'


def test_opencv_missing(examine):
    gone = {'cv2': missing('cv2'), 'mmengine': failing(missing('cv2')['error'])}
    rows = examine({**OPENMMLAB, 'opencv-python': None}, gone)
    assert statuses(rows, 'broken') == ['opencv', 'mmengine']
    assert rows['opencv'].cure == 'pip install opencv-python'


def test_torch_missing(examine):
    gone = failing("ModuleNotFoundError: No module named 'torch'")
    broken = ('torchvision', 'timm', 'mmengine', 'mmcv._ext', 'mmdet', 'overlock_mm')
    probes = {'torch': missing('torch'), 'torch.cuda': missing('torch')}
    rows = examine({'torch': None}, probes | dict.fromkeys(broken, gone))
    assert rows['torch'].cure == 'pip install torch torchvision'
    assert rows['CUDA'].status == 'warning'
    for name in ('torchvision', 'timm', 'mmengine', 'mmcv ops', 'mmdet', 'forward pass'):
        assert rows[name].status == 'broken'
        assert 'while torch is broken' in rows[name].found
        assert not rows[name].cure


@pytest.mark.parametrize('name', ['numpy', 'timm'])
def test_needed_by_the_backbone(examine, name):
    row = examine({name: None}, {name: missing(name)})[name]
    assert (row.status, row.cure) == ('broken', f'pip install {name}')


def test_package_that_does_not_work(examine):
    error = 'OSError: libcudnn.so.9: cannot open shared object file'
    rows = examine({'torch': '2.11.0+cu126'}, {'torch': failing(error)})
    assert error in rows['torch'].found
    index = '--index-url https://download.pytorch.org/whl/cu126'
    assert (
        rows['torch'].cure == f'pip install --force-reinstall torch==2.11.0+cu126 {index}'
    )
    rows = examine(probes={'timm': {'error': 'killed by SIGSEGV'}})
    assert rows['timm'].found == '1.0.31 does not work: killed by SIGSEGV'
    again = 'pip install --no-cache-dir --no-deps --force-reinstall'
    assert rows['timm'].cure == f'{again} timm==1.0.31'
    rows = examine(probes={'mmdet': missing('mmdet')})  # only its metadata is there
    assert rows['mmdet'].status == 'broken'
    assert rows['mmdet'].cure == f'{again} onedl-mmdetection==3.5.1'
    rows = examine(probes={'cv2': failing('ImportError: libGL.so.1: cannot open')})
    assert rows['opencv'].cure.endswith('opencv-python-headless')


@pytest.mark.parametrize(
    'torch, torchvision', [('2.1.2', '0.16.2'), ('2.11.0', '0.26.0'), ('2.14.1', '0.29.0')]
)
def test_pairs(examine, torch, torchvision):
    versions = {'torch': torch, 'torchvision': torchvision, 'numpy': '1.26.4'}
    assert examine(versions)['torchvision'].status == 'ok'


def test_torchvision_for_another_torch(examine):
    probes = {'torchvision': failing(NMS), 'timm': failing(NMS)}
    rows = examine({'torchvision': '0.20.1'}, probes)
    assert statuses(rows, 'broken') == ['torchvision', 'timm']
    assert NMS in rows['torchvision'].found
    assert 'torch 2.11.0 needs torchvision 0.26' in rows['torchvision'].found
    again = 'pip install --no-cache-dir --no-deps --force-reinstall'
    assert rows['torchvision'].cure == f"{again} 'torchvision==0.26.*'"
    assert 'while torchvision is broken' in rows['timm'].found
    assert not rows['timm'].cure
    # a torch for the CPU, and a torchvision of the right version for CUDA
    rows = examine({'torch': '2.11.0+cpu'}, probes)
    assert 'another build of torch 2.11.0+cpu' in rows['torchvision'].found
    assert rows['torchvision'].cure.endswith(
        "'torchvision==0.26.*' --index-url https://download.pytorch.org/whl/cpu"
    )
    # it can be imported
    assert examine({'torchvision': '0.20.1'})['torchvision'].status == 'warning'


def test_torchvision_missing(examine):
    gone = {'torchvision': missing('torchvision')}
    row = examine({'torchvision': None}, gone)['torchvision']
    assert (row.status, row.cure) == ('absent', "pip install 'torchvision==0.26.*'")
    gone['timm'] = failing(missing('torchvision')['error'])
    rows = examine({'torchvision': None}, gone)
    assert rows['torchvision'].status == 'broken'
    assert not rows['timm'].cure


def test_numpy_2_with_an_old_torch(examine):
    old = {'torch': '2.1.2', 'torchvision': '0.16.2'}
    row = examine({**old, **OPENMMLAB})['numpy']
    assert (row.status, row.cure) == ('broken', "pip install 'numpy<2'")
    assert row.found == '2.2.6; compiled for another numpy: torch 2.1.2'
    # MMSegmentation of onedl needs numpy 2
    assert examine(old)['numpy'].cure == f'{STACK} && {BUILD}'
    assert examine({**old, 'numpy': '1.26.4'})['numpy'].status == 'ok'
    probes = {'torch': {'threads': 1, 'without_numpy': 'Numpy is not available'}}
    assert examine(probes=probes)['numpy'].status == 'broken'


def test_packages_for_another_numpy(examine):
    probes = {'pycocotools': failing(NUMPY), 'mmdet': failing(NUMPY)}
    rows = examine(probes=probes)
    assert statuses(rows, 'broken') == ['numpy', 'pycocotools', 'mmdet']
    assert rows['numpy'].found == '2.2.6; compiled for another numpy: pycocotools 2.0.11'
    assert rows['numpy'].cure.endswith('--force-reinstall --upgrade pycocotools')
    for name in ('pycocotools', 'mmdet'):
        assert 'while numpy is broken' in rows[name].found and not rows[name].cure
    probes = {'cv2': failing('AttributeError: _ARRAY_API not found')}
    rows = examine(OPENMMLAB, probes)
    assert rows['numpy'].found.endswith('opencv-python 4.12.0')
    assert rows['numpy'].cure == "pip install 'numpy<2'"
    # any other error is not its fault
    probes['mmdet'] = failing("ModuleNotFoundError: No module named 'scipy'")
    assert examine(OPENMMLAB, probes)['mmdet'].cure == 'pip install scipy'
    assert examine(probes={'mmcv': failing(NUMPY)})['numpy'].cure == BUILD


def test_setuptools(examine):
    cure = "pip install 'setuptools>=77,<82'"
    probes = {'mmengine': failing("ModuleNotFoundError: No module named 'pkg_resources'")}
    for version in ('82.0.1', None):
        rows = examine({**OPENMMLAB, 'setuptools': version}, probes)
        assert (rows['setuptools'].status, rows['setuptools'].cure) == ('broken', cure)
        assert 'mmengine needs pkg_resources' in rows['setuptools'].found
        assert 'while setuptools is broken' in rows['mmengine'].found
    row = examine({'setuptools': '82.0.1'})['setuptools']
    assert (row.status, row.cure) == ('warning', cure)
    assert row.found == '82.0.1; torch requires less than 82'
    row = examine({'setuptools': None})['setuptools']
    assert (row.status, row.cure) == ('absent', cure)


def test_both_families(examine):
    rows = examine({'mmengine': '0.10.7'})
    assert statuses(rows, 'broken') == ['OpenMMLab']
    assert 'mmengine by onedl-mmengine and mmengine' in rows['OpenMMLab'].found
    cure = 'pip uninstall -y onedl-mmengine mmengine && pip install onedl-mmengine'
    assert rows['OpenMMLab'].cure == cure
    # what most of the packages belong to stays
    rows = examine({**OPENMMLAB, 'onedl-mmengine': '0.10.12', 'onedl-mmcv': '2.3.6'})
    uninstall, install, tools, build = rows['OpenMMLab'].cure.split(' && ')
    assert set(uninstall.split()[3:]) == {
        'onedl-mmengine',
        'mmengine',
        'onedl-mmcv',
        'mmcv',
    }
    assert install == 'pip install mmengine'
    assert tools.startswith('pip install') and build.endswith(
        "--no-deps --force-reinstall 'mmcv<2.2'"
    )
    probes = {'mmdet': failing("ImportError: cannot import name 'MMDistributed'")}
    rows = examine({'mmengine': '0.10.7'}, probes)
    assert 'while OpenMMLab is broken' in rows['mmdet'].found


def test_ops_for_another_torch(examine):
    probes = {'mmcv._ext': failing(SYMBOL), 'mmdet': failing(SYMBOL)}
    rows = examine(probes=probes)
    assert statuses(rows, 'broken') == ['mmcv ops', 'mmdet']
    expected = f'compiled for another torch than the installed 2.11.0: {SYMBOL}'
    assert (rows['mmcv ops'].found, rows['mmcv ops'].cure) == (expected, BUILD)
    assert 'while mmcv ops is broken' in rows['mmdet'].found
    probes['mmcv._ext'] = failing('ImportError: libcudart.so.12: cannot open')
    assert 'another torch' in examine(probes=probes)['mmcv ops'].found
    probes['mmcv._ext'] = failing('killed by SIGSEGV')
    row = examine(probes=probes)['mmcv ops']
    assert 'killed by SIGSEGV' in row.found and row.cure == BUILD


def test_how_to_compile_the_ops(examine):
    def cure(**versions):
        versions = {name.replace('_', '-'): v for name, v in versions.items()}
        return examine(versions, {'mmcv._ext': failing(SYMBOL)})['mmcv ops'].cure

    assert cure() == BUILD
    # its headers refuse C++17, which onedl-mmcv asks for
    assert cure(torch='2.14.0', torchvision='0.29.0') == f'{STACK} && {BUILD}'
    # it imports packaging from pkg_resources
    old = cure(torch='2.1.2', numpy='1.26.4', **OPENMMLAB)
    assert "'setuptools<70'" in old and old.endswith("'mmcv<2.2'")
    assert "'setuptools>=77,<82'" in cure(torch='2.4.0', torchvision='0.19.0', **OPENMMLAB)
    lite = {'onedl_mmcv': None, 'mmcv_lite': '2.1.0'}
    assert cure(**lite) == f'pip uninstall -y mmcv-lite && {BUILD}'
    prebuilt = {'onedl_mmcv': None, 'onedl_mmcv_cu128_torch2_8': '2.3.6'}
    assert cure(**prebuilt).startswith('pip uninstall -y onedl-mmcv-cu128-torch2-8 && ')


def test_mmcv_without_ops(examine):
    probes = {'mmcv._ext': missing('mmcv._ext')}
    gone = failing("ModuleNotFoundError: No module named 'mmcv._ext'")
    rows = examine(probes=probes | {'mmdet': gone})
    assert statuses(rows, 'broken') == ['mmcv ops', 'mmdet']
    assert rows['mmcv ops'].cure == BUILD and not rows['mmdet'].cure
    probes['mmdet'] = missing('mmdet')
    rows = examine({'onedl-mmdetection': None}, probes)
    assert not statuses(rows, 'broken')
    assert (rows['mmcv ops'].status, rows['mmcv ops'].cure) == ('absent', BUILD)
    # OpenMMLab's own MMSegmentation imports them
    rows = examine({**OPENMMLAB, 'mmdet': None}, probes | {'mmseg': gone})
    assert statuses(rows, 'broken') == ['mmcv ops', 'mmseg']


def test_ops_without_cuda(examine):
    row = examine(probes=GPU)['mmcv ops']
    assert row.status == 'broken' and BUILD in row.cure
    assert 'compiled without CUDA' in row.found
    probes = {**GPU, 'mmdet': missing('mmdet')}
    assert examine({'onedl-mmdetection': None}, probes)['mmcv ops'].status == 'warning'
    assert examine(probes={**GPU, 'mmcv._ext': {'cuda': '13.0'}})['mmcv ops'].status == 'ok'


def test_toolboxes_that_refuse_versions(examine):
    """The messages are those of mmdet 3.3.0 and mmsegmentation 1.2.2."""
    refused = 'AssertionError: MMCV==2.2.0 is used but incompatible. Please install mmcv'
    mmdet = failing(f'{refused}>=2.0.0rc4, <2.2.0.')
    mmseg = failing(f'{refused}>=2.0.0rc4.')
    rows = examine({**OPENMMLAB, 'mmcv': '2.2.0'}, {'mmdet': mmdet, 'mmseg': mmseg})
    assert statuses(rows, 'broken') == ['mmdet', 'mmseg']
    assert rows['mmdet'].found.startswith('mmdet 3.3.0 refuses what is installed: ')
    assert 'MMCV==2.2.0' in rows['mmdet'].found
    assert rows['mmdet'].cure.endswith("--force-reinstall 'mmcv>=2.0.0rc4,<2.2.0'")
    assert rows['mmseg'].cure.endswith("--force-reinstall 'mmcv>=2.0.0rc4,<2.2'")
    refused = (
        'AssertionError: MMEngine==1.0.0 is used but incompatible. Please install '
        'mmengine>=0.7.1, <1.0.0.'
    )
    rows = examine({**OPENMMLAB, 'mmengine': '1.0.0'}, {'mmdet': failing(refused)})
    assert rows['mmdet'].cure == "pip install 'mmengine>=0.7.1,<1.0.0'"


@pytest.mark.parametrize(
    'module, cure',
    [('ftfy', 'pip install ftfy'), ('cv2', 'pip install opencv-python'), ('mmcv', BUILD)],
)
def test_toolbox_that_lacks_a_package(examine, module, cure):
    error = failing(f"ModuleNotFoundError: No module named '{module}'")
    row = examine(probes={'mmseg': error})['mmseg']
    assert (row.status, row.cure) == ('broken', cure)


def test_mmengine_that_needs_a_newer_torch(examine):
    error = failing("ImportError: cannot import name 'GradScaler' from 'torch.amp' (x.py)")
    rows = examine({'torch': '2.1.2', 'numpy': '1.26.4'}, {'mmengine': error})
    assert rows['mmengine'].cure == f'{STACK} && {BUILD}'


def test_cuda(examine):
    row = examine()['CUDA']
    assert (row.status, row.cure) == ('ok', '')
    assert 'built for CUDA 13.0; no GPU is visible' in row.found
    assert examine(probes=GPU)['CUDA'].found == 'CUDA 13.0: NVIDIA H100 (79 GiB)'
    cpu = {'built': None, 'hip': None, 'gpus': []}
    assert examine(probes={'torch.cuda': cpu})['CUDA'].found == 'torch is built for the CPU'
    old = {**PROBES['torch.cuda'], 'why': 'The NVIDIA driver on your system is too old'}
    row = examine(probes={'torch.cuda': old})['CUDA']
    assert row.status == 'warning' and 'too old' in row.found and 'nvidia-smi' in row.cure
    row = examine(probes={'torch.cuda': {'error': 'no answer in 120 seconds'}})['CUDA']
    assert row.status == 'broken' and 'no answer' in row.found


def test_triton(examine):
    gone = {'triton': missing('triton')}
    row = examine({'triton': None}, gone)['Triton']
    assert (row.status, row.cure) == ('absent', 'pip install triton')
    assert examine({'triton': None}, gone | GPU)['Triton'].status == 'warning'
    assert examine(probes={'triton': failing('OSError: x')})['Triton'].status == 'warning'


def test_contmix(examine, monkeypatch):
    probe = PROBES['overlock_mm'] | {'device': 'cuda', 'why': 'triton cannot be imported'}
    found = examine(probes={'overlock_mm': probe})['ContMix'].found
    assert found == "backend 'torch' on cuda: triton cannot be imported"
    rows = examine(probes={'overlock_mm': failing('RuntimeError: x')})
    assert rows['ContMix'].status == 'warning'
    assert rows['forward pass'].status == 'broken'
    monkeypatch.setenv('OVERLOCK_MM_CONTMIX', 'reference')
    assert 'OVERLOCK_MM_CONTMIX=reference' in examine()['ContMix'].found


def test_forward_pass(examine):
    row = examine()['forward pass']
    assert row.found == 'OverLoCK-XT at 224x224 on cpu: 1.0 s; all outputs are finite'
    probe = PROBES['overlock_mm'] | {'finite': False}
    row = examine(probes={'overlock_mm': probe})['forward pass']
    assert row.status == 'broken' and 'not finite' in row.found
    error = {'overlock_mm': failing('RuntimeError: no C compiler')}
    row = examine(probes=GPU | error)['forward pass']
    assert row.cure.endswith('export OVERLOCK_MM_CONTMIX=torch')
    rows = examine(probes={'torch': failing('OSError: x')} | error)
    assert 'while torch is broken' in rows['forward pass'].found


def test_threads(examine, monkeypatch):
    assert examine(probes={'torch': {'threads': 2}})['CPU threads'].status == 'ok'
    row = examine(probes={'torch': {'threads': 3}})['CPU threads']
    assert (row.status, row.cure) == ('warning', 'export OMP_NUM_THREADS=2')
    assert 'torch takes 3; this process may use 2 cores' in row.found
    monkeypatch.setenv('OMP_NUM_THREADS', '8')
    row = examine()['CPU threads']
    assert row.status == 'warning' and 'OMP_NUM_THREADS=8' in row.found
    monkeypatch.setenv('OMP_NUM_THREADS', 'many')
    assert examine()['CPU threads'].status == 'ok'


@pytest.mark.parametrize(
    'files, cores',
    [
        ({}, 8),
        ({'cpu.max': 'max 100000'}, 8),
        ({'cpu.max': '150000 100000'}, 2),
        ({'cpu.max': '1000 100000'}, 1),
        ({'cpu.max': '9900000 100000'}, 8),
        ({'cpu/cpu.cfs_quota_us': '-1', 'cpu/cpu.cfs_period_us': '100000'}, 8),
        ({'cpu/cpu.cfs_quota_us': '300000', 'cpu/cpu.cfs_period_us': '100000'}, 3),
    ],
)
def test_cores(monkeypatch, tmp_path, files, cores):
    monkeypatch.setattr('os.sched_getaffinity', lambda pid: set(range(8)))
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f'{text}\n')
    assert doctor._cores(tmp_path) == cores


def test_disk(examine, monkeypatch):
    usage = namedtuple('usage', 'free')
    for free, status in ((4.9e9, 'warning'), (5.1e9, 'ok')):
        monkeypatch.setattr('shutil.disk_usage', lambda path, free=free: usage(free))
        assert examine()['disk space'].status == status


def test_overlock_mm_that_is_not_installed(examine, monkeypatch):
    def distribution(name):
        raise doctor.PackageNotFoundError(name)

    monkeypatch.setattr(doctor, 'distribution', distribution)
    row = examine()['overlock_mm']
    assert row.status == 'warning' and row.cure.startswith('pip install --no-deps -e /')
    gone = {'overlock_mm': missing('overlock_mm')}
    rows = examine({'overlock-mm': None}, gone)
    assert statuses(rows, 'broken') == ['overlock_mm', 'forward pass']


def test_check_that_fails(monkeypatch, capsys):
    """Nothing that a check does stops the others; here the trials found nothing at all."""
    monkeypatch.setattr(doctor, '_installed', dict)
    monkeypatch.setattr(doctor, '_probe', dict)
    rows = {row.name: row for row in doctor.examine()}
    assert list(rows) == list(doctor._CHECKS)
    assert rows['torch'].status == 'warning'
    assert rows['torch'].found == "this check failed: KeyError: 'torch'"
    assert doctor.doctor() == 0
    assert 'this check failed' in capsys.readouterr().out


def test_table(monkeypatch, capsys):
    long = 'word ' * 60
    rows = [
        doctor.Row('torch', 'broken', long, f'pip install {long}'),
        doctor.Row('timm', 'ok', '1.0'),
        doctor.Row('numpy', 'warning', 'caf\xe9'),
    ]
    monkeypatch.setattr(doctor, 'examine', lambda: rows)
    assert doctor.doctor() == 1
    lines = capsys.readouterr().out.splitlines()
    assert re.split(' {2,}', lines[0])[:2] == ['torch', 'broken']
    assert max(len(line) for line in lines if '->' not in line) <= 100
    assert f'    -> pip install {long}'.rstrip() in [line.rstrip() for line in lines]
    assert lines[-1].startswith('broken: torch; ')
    assert doctor.doctor(as_json=True) == 1
    assert json.loads(capsys.readouterr().out)['ok'] is False
    monkeypatch.setattr(doctor, 'examine', lambda: rows[1:])
    assert doctor.doctor() == 0
    assert capsys.readouterr().out.endswith('nothing is broken; warnings: numpy\n')
    monkeypatch.setattr('sys.stdout', io.TextIOWrapper(io.BytesIO(), 'ascii'))
    assert doctor.doctor() == 0


def test_broken_metadata(monkeypatch):
    class Distribution:
        def __init__(self, name, version):
            self.metadata, self.version = {'Name': name}, version

    found = [('Some_Package', '1.0'), (None, '2.0'), ('torch', None), ('torch', '2.1')]
    monkeypatch.setattr(doctor, 'distributions', lambda: [Distribution(*f) for f in found])
    assert doctor._installed() == {'some-package': '1.0', 'torch': None}


def test_slow_but_not_hanging(monkeypatch):
    """What took the time of those before it gets another turn."""
    answers = [
        ('{"probe": "a", "version": "1"}', 'no answer in 120 seconds'),
        ('{"probe": "b", "version": "2"}', 'the process ended with status 0: '),
    ]
    monkeypatch.setattr(doctor, '_run', lambda names: answers.pop(0))
    assert doctor._chain(['a', 'b']) == {'a': {'version': '1'}, 'b': {'version': '2'}}


def test_same_path(monkeypatch, tmp_path):
    (tmp_path / 'triton.py').write_text("__version__ = 'this one'")
    monkeypatch.setattr(sys, 'path', [str(tmp_path), *sys.path])
    assert doctor._chain(['triton']) == {'triton': {'version': 'this one'}}


def test_no_process(monkeypatch):
    for executable in ('/nowhere/python', '', None):
        monkeypatch.setattr(sys, 'executable', executable)
        assert 'Error' in doctor._chain(['triton'])['triton']['error']


# In another Python, which has nothing installed but what is written for the test.

TORCH = """
import sys, types
__version__ = '2.11.0'
get_num_threads = lambda: 1
zeros = lambda n: types.SimpleNamespace(numpy=lambda: None)
cuda = types.SimpleNamespace(is_available=lambda: False)
version = types.SimpleNamespace(cuda=None, hip=None)
print('noise')
"""


@pytest.fixture(scope='session')
def bare_python(tmp_path_factory):
    folder = tmp_path_factory.mktemp('bare')
    command = [sys.executable, '-m', 'venv', '--without-pip', folder]
    subprocess.run(command, check=True)
    return folder / 'bin' / 'python'


@pytest.fixture
def run_in(bare_python, tmp_path):
    """Rows by name, with these files first on the path; and the exit status."""

    def run(files, timeout=30):
        for name, text in files.items():
            (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / name).write_text(text)
        code = (
            'import runpy\n'
            f'run = runpy.run_path({doctor.__file__!r})["doctor"]\n'
            f'run.__globals__["_TIMEOUT"] = {timeout}\n'
            'raise SystemExit(run(as_json=True))'
        )
        done = subprocess.run(
            [bare_python, '-c', code],
            env={'PYTHONPATH': str(tmp_path)},
            cwd=tmp_path,
            capture_output=True,
            text=True,
        )
        assert not done.stderr
        rows = json.loads(done.stdout)['rows']
        return {row['name']: doctor.Row(**row) for row in rows}, done.returncode

    return run


def metadata(name, version):
    text = f'Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n'
    return {f'{name.replace("-", "_")}-{version}.dist-info/METADATA': text}


def test_nothing_installed(run_in):
    rows, status = run_in({})
    assert status == 1
    broken = ['overlock_mm', 'numpy', 'torch', 'torchvision', 'timm', 'forward pass']
    assert statuses(rows, 'broken') == broken
    assert rows['mmdet'].status == rows['mmcv ops'].status == 'absent'


def test_torchvision_that_raises(run_in):
    files = {
        'torch.py': TORCH,
        'torchvision/__init__.py': f'raise RuntimeError({NMS.partition(": ")[2]!r})',
        'timm/__init__.py': 'import torchvision',
        'numpy/__init__.py': "__version__ = '2.2.6'",
        **metadata('torchvision', '0.20.1'),
        'torch-2.11.0.dist-info/RECORD': '',  # metadata of an installation that broke off
    }
    rows, status = run_in(files)
    assert status == 1
    assert rows['torch'].status == rows['numpy'].status == 'ok'
    assert rows['torch'].found == '2.11.0'
    assert NMS in rows['torchvision'].found and '0.26' in rows['torchvision'].cure
    assert 'while torchvision is broken' in rows['timm'].found


def test_packages_that_abort_or_hang(run_in):
    files = {
        'torch.py': TORCH,
        'torchvision.py': 'import time; time.sleep(60)',
        'timm.py': 'raise SystemExit(3)',
        'numpy.py': "import os; print('{', end='', flush=True); os.abort()",
        'cv2.py': 'import os; os._exit(7)',
        'triton.py': "raise ValueError('two\\nlines')",
        'mmdet/left_behind.txt': '',
    }
    rows, status = run_in(files, timeout=4)
    assert status == 1
    assert 'no answer in 4 seconds' in rows['torchvision'].found
    assert rows['torch'].found == '2.11.0'
    assert 'SystemExit: 3' in rows['timm'].found
    assert 'killed by SIGABRT' in rows['numpy'].found
    assert 'ended with status 7' in rows['opencv'].found
    assert rows['Triton'].status == 'warning'
    assert 'ValueError: two lines' in rows['Triton'].found
    assert rows['mmdet'].status == 'absent'


def test_ops_that_do_not_load(run_in):
    files = {
        'torch.py': TORCH,
        'mmcv/__init__.py': "__version__ = '2.3.6'",
        'mmcv/_ext.py': f'raise ImportError({SYMBOL.partition(": ")[2]!r})',
        'mmdet/__init__.py': "raise AssertionError('Please install mmcv>=2.0.0, <2.2.0.')",
        **metadata('onedl-mmcv', '2.3.6'),
        **metadata('mmdet', '3.3.0'),
    }
    rows, _ = run_in(files)
    assert rows['mmcv'].status == 'ok'
    expected = f'compiled for another torch than the installed 2.11.0: {SYMBOL}'
    assert rows['mmcv ops'].found == expected
    # the other family's MMDetection takes its own mmcv
    assert rows['mmdet'].cure.startswith('pip uninstall -y onedl-mmcv && ')
    assert rows['mmdet'].cure.endswith("'mmcv>=2.0.0,<2.2.0'")


def test_half_an_import_is_not_for_the_others(run_in):
    files = {
        'numpy.py': "import builtins; builtins.left = True; raise ValueError('no')",
        'cv2.py': "import builtins; __version__ = str(hasattr(builtins, 'left'))",
    }
    rows, _ = run_in(files)
    assert rows['numpy'].status == 'broken'
    assert rows['opencv'].found == 'False'


def test_pkg_resources(run_in):
    files = {
        'mmengine/__init__.py': "__version__ = '0.10.7'",
        'mmengine/runner.py': '',
        'mmengine/utils.py': 'def is_installed(name):\n    import pkg_resources',
        **metadata('mmengine', '0.10.7'),
        **metadata('setuptools', '82.0.1'),
    }
    rows, _ = run_in(files)
    assert rows['setuptools'].status == 'broken'
    assert rows['setuptools'].cure == "pip install 'setuptools>=77,<82'"
    assert 'while setuptools is broken' in rows['mmengine'].found


@pytest.mark.slow
def test_unknown_backend(monkeypatch):
    """The trial itself, which says so and goes on."""
    monkeypatch.setenv('OVERLOCK_MM_CONTMIX', 'fast')
    probe = doctor._chain(['overlock_mm'])['overlock_mm']
    assert probe['finite']
    monkeypatch.setattr(doctor, '_probe', lambda: {**PROBES, 'overlock_mm': probe})
    row = {row.name: row for row in doctor.examine()}['ContMix']
    assert (row.status, row.cure) == ('broken', 'unset OVERLOCK_MM_CONTMIX')
    assert "OVERLOCK_MM_CONTMIX='fast'" in row.found and "'triton'" in row.found
