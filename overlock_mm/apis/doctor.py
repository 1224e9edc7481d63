"""Say what is installed, what it means here, and which command cures it.

Only the standard library is imported here, and every other package in another process:
what was compiled for another torch may raise anything, crash or hang.
"""

import importlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import PackageNotFoundError, distribution, distributions, requires
from pathlib import Path
from typing import Literal

Status = Literal['ok', 'absent', 'warning', 'broken']
Finding = tuple[Status, str, str]

# What is tried in each of two processes, in this order.
_PROBES = (
    ('torch', 'torch.cuda', 'torchvision', 'timm', 'overlock_mm'),
    ('numpy', 'cv2', 'pycocotools', 'triton')
    + ('mmengine', 'mmcv', 'mmcv._ext', 'mmdet', 'mmseg'),
)
_CHILD = (
    'import sys; sys.path[:] = sys.argv[3:]; import runpy; '
    "runpy.run_path(sys.argv[1])['answer'](sys.argv[2].split())"
)
_TIMEOUT = 120
_FREE_GB = 5
# The distributions that own an import name: onedl's, OpenMMLab's own, and others.
_OWNERS = dict(
    mmengine=('onedl-mmengine', 'mmengine', 'mmengine-lite'),
    mmcv=('onedl-mmcv', 'mmcv', 'mmcv-lite', 'mmcv-full'),
    mmdet=('onedl-mmdetection', 'mmdet'),
    mmseg=('onedl-mmsegmentation', 'mmsegmentation'),
    cv2=('opencv-python', 'opencv-python-headless', 'opencv-contrib-python'),
)
_INSTALLED_BY = dict(PIL='pillow', skimage='scikit-image', yaml='pyyaml')
_SETUPTOOLS = "'setuptools>=77,<82'"
_AGAIN = '--no-cache-dir --no-deps --force-reinstall'
_TORCH = "pip install 'torch==2.11.*' 'torchvision==0.26.*'"
_OTHER_NUMPY = re.compile(
    'numpy.core.multiarray failed|_ARRAY_API|numpy.dtype size changed'
)
_OTHER_TORCH = re.compile(r'undefined symbol|lib(c10|torch|cudart)\w*\.so')


@dataclass(frozen=True)
class Row:
    """What is known of one thing.

    Args:
        name: what it is about.
        status: 'ok'; 'absent' if it is not installed and need not be; 'warning'; or
            'broken' if it is needed, or installed, and does not work.
        found: what was found.
        cure: what to run; empty if there is nothing to do.
    """

    name: str
    status: Status
    found: str
    cure: str = ''


def doctor(as_json: bool = False) -> int:
    """Print what :func:`examine` finds.

    Args:
        as_json: print ``{"ok": bool, "rows": [...]}`` in place of a table.

    Returns:
        int: 1 if something is broken, else 0.
    """
    rows = examine()
    broken = ', '.join(row.name for row in rows if row.status == 'broken')
    warnings = ', '.join(row.name for row in rows if row.status == 'warning')
    if as_json:
        print(json.dumps({'ok': not broken, 'rows': [asdict(r) for r in rows]}, indent=1))
        return int(bool(broken))
    end = 'nothing is broken' + f'; warnings: {warnings}' * bool(warnings)
    if broken:
        end = f'broken: {broken}; follow the arrows from the top, and run this again'
    text = '\n'.join([*(line for row in rows for line in _lines(row)), end])
    encoding = sys.stdout.encoding or 'utf-8'
    print(text.encode(encoding, 'backslashreplace').decode(encoding))
    return int(bool(broken))


def _lines(row: Row) -> Iterator[str]:
    found = textwrap.wrap(row.found, 76, break_long_words=False, break_on_hyphens=False)
    for i, line in enumerate(found or ['']):
        yield f'{row.name if i == 0 else "":12}  {row.status if i == 0 else "":7}  {line}'
    if row.cure:  # on one line, to be copied
        yield f'    -> {row.cure}'


def examine() -> list[Row]:
    """Try all that is installed, in about 20 seconds.

    Returns:
        list[Row]: one for each thing, those that others need before them. A check that
        fails itself is a warning.
    """
    facts = _Facts(_installed(), _probe())
    for name, check in _CHECKS.items():
        try:
            row = Row(name, *check(facts))
        except Exception as error:  # this is made for environments in any state
            row = Row(name, 'warning', f'this check failed: {_message(error)}')
        facts.rows[name] = row
    return list(facts.rows.values())


def _message(error: BaseException) -> str:
    return ' '.join(f'{type(error).__name__}: {error}'.split())


def _shortened(text: str) -> str:
    return text if len(text) <= 300 else f'{text[:300]}...'


def answer(names: Sequence[str]) -> None:
    """Try one thing after the other in this process, and print a line of JSON for each.

    It ends at the first that fails: what that left half imported is not for the others.
    """
    for name in names:
        package, missing = name.partition('.')[0], False
        try:
            module = importlib.import_module(package)
            if module.__file__ is None:  # a folder that an uninstalled package left
                raise ModuleNotFoundError(f'No module named {package!r}', name=package)
            version = getattr(module, '__version__', None)
            found = {
                'version': version and str(version),
                **(_TRIALS.get(name, dict)() or {}),
            }
        except BaseException as error:
            missing = isinstance(error, ModuleNotFoundError) and error.name in (
                name,
                package,
            )
            found = {'error': _message(error), 'missing': missing}
        print('\n' + json.dumps({'probe': name, **found}), flush=True)
        if 'error' in found and not missing:
            return


def _try_torch() -> dict:
    import torch

    found = {'threads': torch.get_num_threads()}
    try:
        torch.zeros(1).numpy()
    except RuntimeError as error:
        found['without_numpy'] = str(error)
    return found


def _try_cuda() -> dict:
    import torch

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    gpus = [torch.cuda.get_device_properties(i) for i in range(count)]
    found = {'built': torch.version.cuda, 'hip': torch.version.hip}
    found['gpus'] = [f'{g.name} ({g.total_memory / 2**30:.0f} GiB)' for g in gpus]
    if found['built'] and not gpus:
        try:
            torch.cuda.init()
        except Exception as error:
            found['why'] = str(error)
    return found


def _try_backbone() -> dict:
    import torch

    from overlock_mm import OverLoCK
    from overlock_mm.ops import contmix_torch

    # by its path, for the package has a function of this name
    op = importlib.import_module('overlock_mm.ops.contmix')
    choose, device = op._backend, 'cuda' if torch.cuda.is_available() else 'cpu'
    found = {'device': device}

    def chosen(name, arguments):
        try:
            run = choose(name, arguments)
        except (ValueError, RuntimeError) as error:
            found['backend_error'] = str(error)
            return contmix_torch.contmix
        found['backend'] = run.__module__.rpartition('_')[2]
        if device == 'cuda' and found['backend'] == 'torch':
            found['why'] = op._why_not_triton('auto', arguments)
        return run

    op._backend = chosen
    model, images = OverLoCK('xt').eval().to(device), torch.rand(1, 3, 224, 224).to(device)
    start = time.perf_counter()
    with torch.no_grad():
        found['finite'] = all(m.isfinite().all().item() for m in model(images))
    return found | {'seconds': time.perf_counter() - start}


def _try_mmengine() -> None:
    importlib.import_module('mmengine.runner')
    # OpenMMLab's own needs pkg_resources for it
    importlib.import_module('mmengine.utils').is_installed('mmengine')


def _try_ops() -> dict:
    importlib.import_module('torch')  # the ops are linked against its libraries
    importlib.import_module('mmcv._ext')
    return {'cuda': importlib.import_module('mmcv.ops').get_compiling_cuda_version()}


def _try_imports(*names: str) -> None:
    for name in names:
        importlib.import_module(name)


_TRIALS = {
    'torch': _try_torch,
    'torch.cuda': _try_cuda,
    'overlock_mm': _try_backbone,
    'pycocotools': partial(_try_imports, 'pycocotools.mask'),
    'mmengine': _try_mmengine,
    'mmcv._ext': _try_ops,
    'mmdet': partial(_try_imports, 'mmdet.models', 'mmdet.datasets'),
    'mmseg': partial(_try_imports, 'mmseg.models', 'mmseg.datasets'),
}


def _installed() -> dict[str, str | None]:
    """Versions by name of the distribution, None where the metadata has none."""
    versions = {}
    with suppress(Exception):  # metadata may be broken in any way
        for dist in distributions():
            with suppress(Exception):
                name = re.sub(r'[-_.]+', '-', dist.metadata['Name']).lower()
                versions.setdefault(name, dist.version)
    return versions


def _probe() -> dict[str, dict]:
    """What came of each trial; where it failed, its 'error'."""
    with ThreadPoolExecutor(len(_PROBES)) as pool:
        first, second = pool.map(_chain, _PROBES)
    return first | second


def _chain(names: Sequence[str]) -> dict[str, dict]:
    """Try in one process, and go on in another after a failure."""
    found, left = {}, list(names)
    while left:
        output, end = _run(left)
        answers = [json.loads(a) for a in re.findall(r'^{"probe".*}$', output, re.M)]
        found |= {a.pop('probe'): a for a in answers}
        left = left[len(answers) :]
        failed = any('error' in a and not a['missing'] for a in answers)
        slow = answers and end.startswith('no answer')  # not the fault of the next one
        if left and not failed and not slow:
            found[left.pop(0)] = {'error': end}
    return found


def _run(names: Sequence[str]) -> tuple[str, str]:
    """The output of a process that tries, and how it ended."""
    command = [sys.executable, '-c', _CHILD, __file__, ' '.join(names), *map(str, sys.path)]
    pipes = dict(stdin=subprocess.DEVNULL, capture_output=True)
    # else idle threads of one process spin, and take the cores from the other
    pipes['env'] = {'GOMP_SPINCOUNT': '1000', **os.environ}
    try:
        done = subprocess.run(command, **pipes, timeout=_TIMEOUT)
        output, errors = (b.decode(errors='replace') for b in (done.stdout, done.stderr))
        if done.returncode < 0:
            return output, f'killed by {signal.Signals(-done.returncode).name}'
        last = (errors.strip().splitlines() or [''])[-1]
        return output, f'the process ended with status {done.returncode}: {last}'
    except subprocess.TimeoutExpired as error:
        output = (error.stdout or b'').decode(errors='replace')
        return output, f'no answer in {_TIMEOUT} seconds'
    except Exception as error:
        return '', _message(error)


@dataclass
class _Facts:
    versions: dict[str, str | None]
    probes: dict[str, dict]
    rows: dict[str, Row] = field(default_factory=dict)

    def error(self, name: str) -> str:
        return self.probes[name].get('error', '')

    def missing(self, name: str) -> bool:
        """Whether it is neither installed nor importable."""
        return self.probes[name].get('missing', False) and not self.owners(name)

    def broken(self, name: str) -> bool:
        return name in self.rows and self.rows[name].status == 'broken'

    def owners(self, name: str) -> list[str]:
        """The installed distributions of an import name."""
        names = _OWNERS.get(name, (name.replace('_', '-'),))
        prebuilt = 'onedl-mmcv-' if name == 'mmcv' else '\n'  # one for each torch
        return [n for n in self.versions if n in names or n.startswith(prebuilt)]

    def version(self, name: str) -> str:
        versions = [self.versions[n] for n in self.owners(name)]
        versions.append(self.probes[name].get('version'))
        return next(filter(None, versions), 'version unknown')

    def minor(self, name: str) -> tuple[int, ...]:
        """The first two numbers of a version; empty if it is not known."""
        found = re.match(r'(\d+)\.(\d+)', self.version(name))
        return tuple(map(int, found.groups())) if found else ()

    def package(self, name: str) -> str:
        """The distribution to install: of the family of which more is here, or onedl's."""
        toolboxes = [_OWNERS[n] for n in ('mmengine', 'mmdet', 'mmseg')]
        onedl, own = (sum(t[i] in self.versions for t in toolboxes) for i in (0, 1))
        return _OWNERS[name][name != 'cv2' and own > onedl] if name in _OWNERS else name

    def index(self) -> str:
        """Where to find what fits a torch that is not from PyPI, as an option of pip."""
        local = self.version('torch').partition('+')[2]
        return f' --index-url https://download.pytorch.org/whl/{local}' if local else ''

    def build(self, versions: str = '<2.2', uninstall: bool = True) -> str:
        """Compile mmcv's ops against the installed torch."""
        package, tools, torch = self.package('mmcv'), _SETUPTOOLS, self.minor('torch')
        owners = self.owners('mmcv')
        again = _AGAIN if owners else '--no-cache-dir'
        others = ' '.join(n for n in owners if n != package)
        steps = [f'pip uninstall -y {others}'] if others and uninstall else []
        if package == 'mmcv':
            package = f"'mmcv{versions}'"
            if torch and torch < (2, 3):  # compiles with pkg_resources.packaging
                tools = "'setuptools<70'"
        elif torch >= (2, 14):  # does not compile as C++17, which onedl-mmcv asks for
            steps.append(_TORCH)
        steps += [
            f'pip install {tools} wheel ninja psutil',
            f'MMCV_WITH_OPS=1 pip install --no-build-isolation {again} {package}',
        ]
        return ' && '.join(steps)


def _imported(
    facts: _Facts,
    name: str,
    needs: Sequence[str] = (),
    without: str = '',
    install: str = '',
) -> Finding:
    """Judge a package that should be importable.

    Args:
        facts: what is known.
        name: its import name.
        needs: rows of what it imports.
        without: who needs it; if given, it may be absent.
        install: how to install it, if not by its name.
    """
    if facts.missing(name):
        found = f'not installed; {without or "the backbone needs it"}'
        install = install or f'pip install {facts.package(name)}'
        return 'absent' if without else 'broken', found, install
    owners = [f'{n} {facts.versions[n] or ""}'.strip() for n in facts.owners(name)]
    found = ', '.join(owners) if name in _OWNERS and owners else facts.version(name)
    if facts.error(name):
        return 'broken', *_failure(facts, name, found, needs)
    return 'ok', found, ''


def _failure(
    facts: _Facts, name: str, found: str, needs: Sequence[str], cure: str = ''
) -> tuple[str, str]:
    """What the error of an import means, and the cure."""
    error, text = facts.error(name), _shortened(facts.error(name))
    refused = re.search(r'install (mmcv|mmengine)((?:,? *[<>]=?[\w.]*\w)+)', error)
    if error.startswith('AssertionError') and refused:  # a toolbox checks versions
        package, versions = refused[1], refused[2].replace(' ', '')
        cure = f"pip install '{facts.package(package)}{versions}'"
        if package == 'mmcv':  # MMSegmentation's message leaves out that it refuses 2.2
            cure = facts.build(versions if '<' in versions else f'{versions},<2.2')
        return f'{found} refuses what is installed: {text}', cure
    culprit = next(filter(facts.broken, needs), None)
    # a numpy that others cannot use is no reason for any other error
    if culprit and (
        culprit != 'numpy' or facts.error('numpy') or _OTHER_NUMPY.search(error)
    ):
        return f'{found} does not work while {culprit} is broken: {text}', ''
    found = f'{found} does not work: {text}'
    module = re.search(r"No module named '(\w+)", error)
    if 'libGL' in error:
        cure = (
            f'pip uninstall -y opencv-python && pip install {_AGAIN} opencv-python-headless'
        )
    elif module and module[1] != name.partition('.')[0]:
        package = _INSTALLED_BY.get(module[1]) or facts.package(module[1])
        cure = facts.build() if module[1] == 'mmcv' else f'pip install {package}'
    elif re.search(r"cannot import name .* from 'torch\b", error):  # torch is too old
        cure = f'{_TORCH} && {facts.build()}'
    elif name == 'mmcv':
        cure = facts.build()
    elif name == 'torch':  # with what it depends on: CUDA's libraries, for one
        cure = f'pip install --force-reinstall torch=={facts.version(name)}{facts.index()}'
    elif not cure:
        package = (facts.owners(name) or [facts.package(name)])[0]
        version = f'=={facts.version(name)}' if facts.minor(name) else ''
        cure = f'pip install {_AGAIN} {package}{version}'
    return found, cure


def _python(facts: _Facts) -> Finding:
    return 'ok', f'{platform.python_version()}, {sys.executable}', ''


def _overlock_mm(facts: _Facts) -> Finding:
    folder = Path(__file__).resolve().parents[1]
    version = re.search(r"'(.+)'", (folder / 'version.py').read_text())[1]
    try:
        url = distribution('overlock_mm').read_text('direct_url.json')
    except PackageNotFoundError:
        cure = f'pip install --no-deps -e {shlex.quote(str(folder.parent))}'
        status = 'broken' if facts.probes['overlock_mm'].get('missing') else 'warning'
        return status, f'{version} in {folder}, not installed', cure
    editable = json.loads(url or '{}').get('dir_info', {}).get('editable')
    how = 'editable' if editable else 'from a wheel'
    return 'ok', f'{version}, {how}, in {folder}', ''


def _numpy(facts: _Facts) -> Finding:
    status, found, cure = _imported(facts, 'numpy')
    two, torch = facts.minor('numpy') >= (2, 0), facts.minor('torch')
    old = 'without_numpy' in facts.probes['torch'] or (two and torch and torch < (2, 3))
    failed = [
        n.partition('.')[0] for n in facts.probes if _OTHER_NUMPY.search(facts.error(n))
    ]
    failed = [n for n in failed if n in ('cv2', 'pycocotools')] or failed  # others use them
    names = ['torch'] * bool(old) + [o for n in failed for o in facts.owners(n) or [n]]
    if status != 'ok' or not names:
        return status, found, cure
    found += '; compiled for another numpy: '
    found += ', '.join(f'{n} {facts.versions.get(n) or ""}'.strip() for n in names)
    if two and 'onedl-mmsegmentation' not in facts.versions:  # which needs numpy 2
        return 'broken', found, "pip install 'numpy<2'"
    if old or 'mmcv' in failed:
        return 'broken', found, f'{_TORCH} && ' * bool(old) + facts.build()
    return 'broken', found, f'pip install {_AGAIN} --upgrade {" ".join(names)}'


def _torchvision(facts: _Facts) -> Finding:
    torch, (major, minor) = facts.version('torch'), facts.minor('torch') or (0, 0)
    wanted = f"'torchvision==0.{minor + 15}.*'" if major == 2 else 'torchvision'
    wanted += facts.index()
    without = '' if facts.error('timm') else 'this timm does not need it'
    install, again = f'pip install {wanted}', f'pip install {_AGAIN} {wanted}'
    status, found, cure = _imported(facts, 'torchvision', ('torch',), without, install)
    mine = facts.minor('torchvision')
    if facts.missing('torchvision') or facts.broken('torch') or major != 2:
        return status, found, cure
    if mine and mine != (0, minor + 15):
        status = 'warning' if status == 'ok' else status
        return status, f'{found}; torch {torch} needs torchvision 0.{minor + 15}', again
    if 'torchvision::' in facts.error('torchvision'):
        return status, f'{found}; compiled for another build of torch {torch}', again
    return status, found, cure


def _setuptools(facts: _Facts) -> Finding:
    version, cure = facts.versions.get('setuptools'), f'pip install {_SETUPTOOLS}'
    if 'pkg_resources' in facts.error('mmengine'):
        found = f'{version or "not installed"}; mmengine needs pkg_resources, gone since 82'
        return 'broken', found, cure
    if not version:
        return 'absent', "not installed; needed only to compile mmcv's ops", cure
    with suppress(PackageNotFoundError):
        limit = re.search(r'setuptools\W*<(\d+)', '\n'.join(requires('torch') or ()))
        if limit and int(version.partition('.')[0]) >= int(limit[1]):
            return 'warning', f'{version}; torch requires less than {limit[1]}', cure
    return 'ok', version, ''


def _opencv(facts: _Facts) -> Finding:
    without = '' if facts.owners('mmengine') else 'the toolboxes need it'
    return _imported(facts, 'cv2', ('numpy',), without)


def _families(facts: _Facts) -> Finding:
    owners = {name: facts.owners(name) for name in _OWNERS if name != 'cv2'}
    twice = {name: names for name, names in owners.items() if len(names) > 1}
    if not any(owners.values()):
        return 'absent', 'the backbone works without', "pip install 'overlock_mm[onedl]'"
    if not twice:
        return 'ok', ', '.join(sum(owners.values(), [])), ''
    clash = '; '.join(f'{name} by {" and ".join(names)}' for name, names in twice.items())
    steps = [f'pip uninstall -y {" ".join(sum(twice.values(), []))}']
    again = [facts.package(name) for name in twice if name != 'mmcv']
    steps += [f'pip install {" ".join(again)}'] if again else []
    steps += [facts.build(uninstall=False)] if 'mmcv' in twice else []
    return 'broken', f'folders that two packages own: {clash}', ' && '.join(steps)


def _ops(facts: _Facts) -> Finding:
    probe, error = facts.probes['mmcv._ext'], facts.error('mmcv._ext')
    detection = not facts.missing('mmdet')
    if facts.missing('mmcv'):
        return 'absent', 'they come with mmcv', ''
    if probe.get('missing') and not facts.broken('mmcv'):
        needed = detection or re.search(r'mmcv\.(_ext|ops)', facts.error('mmseg'))
        user = 'an installed toolbox needs them' if needed else 'only detection needs them'
        return 'broken' if needed else 'absent', f'mmcv has none; {user}', facts.build()
    torch = facts.version('torch')
    if _OTHER_TORCH.search(error) and not facts.broken('torch'):
        found = (
            f'compiled for another torch than the installed {torch}: {_shortened(error)}'
        )
        return 'broken', found, facts.build()
    if error:
        needs, found = _NEEDED_BY_OPS, f'with torch {torch}: it'
        return 'broken', *_failure(facts, 'mmcv._ext', found, needs, facts.build())
    if probe['cuda'] == 'not available' and facts.probes['torch.cuda'].get('gpus'):
        cure = f'with nvcc on the PATH: {facts.build()}; or: export CUDA_VISIBLE_DEVICES='
        found = 'compiled without CUDA, and this machine has a GPU'
        return 'broken' if detection else 'warning', found, cure
    return 'ok', f'they load; CUDA: {probe["cuda"]}', ''


def _cuda(facts: _Facts) -> Finding:
    probe = facts.probes['torch.cuda']
    if 'error' in probe and facts.broken('torch'):
        return 'warning', 'not known while torch is broken', ''
    if 'error' in probe:
        cure = 'nvidia-smi; to do without the GPU: export CUDA_VISIBLE_DEVICES='
        return 'broken', f'torch.cuda does not work: {probe["error"]}', cure
    built = f'CUDA {probe["built"]}' if probe['built'] else f'ROCm {probe["hip"]}'
    if probe['gpus']:
        return 'ok', f'{built}: {", ".join(probe["gpus"])}', ''
    if 'too old' in probe.get('why', ''):
        cure = 'update the driver, or take a torch for the CUDA that this shows: nvidia-smi'
        return 'warning', f'torch is built for {built}: {probe["why"]}', cure
    if probe['built'] or probe['hip']:
        return 'ok', f'torch is built for {built}; no GPU is visible, the CPU is used', ''
    return 'ok', 'torch is built for the CPU', ''


def _triton(facts: _Facts) -> Finding:
    status, found, cure = _imported(facts, 'triton', (), 'needed only on NVIDIA GPUs')
    gpus = facts.probes['torch.cuda'].get('gpus')
    if status == 'broken' or (status == 'absent' and gpus):
        return 'warning', f'{found}; without it ContMix is slower on GPUs', cure
    return status, found, cure


def _contmix(facts: _Facts) -> Finding:
    probe, variable = facts.probes['overlock_mm'], os.environ.get('OVERLOCK_MM_CONTMIX')
    if 'backend_error' in probe:
        return 'broken', probe['backend_error'], 'unset OVERLOCK_MM_CONTMIX'
    if 'backend' not in probe:
        return 'warning', 'its backend is not known: the forward pass fails, see below', ''
    found = f"backend '{probe['backend']}' on {probe['device']}"
    found += f', from OVERLOCK_MM_CONTMIX={variable}' if variable else ''
    found += f': {probe["why"]}' if probe.get('why') else ''
    return 'ok', found, ''


def _threads(facts: _Facts) -> Finding:
    variable, cores = os.environ.get('OMP_NUM_THREADS', ''), _cores()
    threads = facts.probes['torch'].get('threads', 0)
    found = f'torch takes {threads}' if threads else 'not known while torch is broken'
    if variable.isdecimal():
        found, threads = f'{found}, OMP_NUM_THREADS={variable}', max(threads, int(variable))
    found += f'; this process may use {cores} cores'
    if threads <= cores:
        return 'ok', found, ''
    return 'warning', f'{found}: more are slower', f'export OMP_NUM_THREADS={cores}'


def _cores(cgroup: Path = Path('/sys/fs/cgroup')) -> int:
    """The cores that this process may use, by affinity and by the quota of a container."""
    affinity = getattr(os, 'sched_getaffinity', lambda _: range(os.cpu_count() or 1))
    cores = len(affinity(0))
    for names in (('cpu.max',), ('cpu/cpu.cfs_quota_us', 'cpu/cpu.cfs_period_us')):
        with suppress(OSError, ValueError):  # of the other version; or 'max', no quota
            texts = [(cgroup / name).read_text() for name in names]
            quota, period = map(int, ' '.join(texts).split())
            cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores
    return cores


def _disk(facts: _Facts) -> Finding:
    free = shutil.disk_usage('.').free / 1e9
    found = f'{free:.1f} GB are free in {os.getcwd()}'
    if free >= _FREE_GB:
        return 'ok', found, ''
    return 'warning', f'{found}; checkpoints fill it', 'free some space; all disks: df -h'


def _forward(facts: _Facts) -> Finding:
    probe, found = facts.probes['overlock_mm'], 'OverLoCK-XT at 224x224'
    if 'error' in probe:
        cure = "to see where: python -c 'import overlock_mm.models'"
        if facts.probes['torch.cuda'].get('gpus'):
            cure = 'to do without the Triton kernels: export OVERLOCK_MM_CONTMIX=torch'
        return 'broken', *_failure(facts, 'overlock_mm', found, _NEEDED, cure)
    found = f'{found} on {probe["device"]}: {probe["seconds"]:.1f} s'
    if not probe['finite']:
        cure = 'try the plain backend: export OVERLOCK_MM_CONTMIX=reference'
        return 'broken', f'{found}; its outputs are not finite', cure
    return 'ok', f'{found}; all outputs are finite', ''


_NEEDED_BY_TIMM = ('torch', 'torchvision', 'numpy')
_NEEDED = ('overlock_mm', *_NEEDED_BY_TIMM, 'timm', 'mmengine')
_NEEDED_BY_TOOLBOXES = (
    'OpenMMLab',
    'setuptools',
    *_NEEDED_BY_TIMM,
    'opencv',
    'pycocotools',
)
_NEEDED_BY_OPS = (*_NEEDED_BY_TOOLBOXES, 'mmengine', 'mmcv')


def _toolbox(name: str, without: str):
    return partial(
        _imported, name=name, needs=(*_NEEDED_BY_OPS, 'mmcv ops'), without=without
    )


def _mmcv(facts: _Facts) -> Finding:
    needs = (*_NEEDED_BY_TOOLBOXES, 'mmengine')
    return _imported(facts, 'mmcv', needs, 'the toolboxes need it', facts.build())


_CHECKS = {
    'Python': _python,
    'overlock_mm': _overlock_mm,
    'numpy': _numpy,
    'torch': partial(_imported, name='torch', install='pip install torch torchvision'),
    'torchvision': _torchvision,
    'timm': partial(_imported, name='timm', needs=_NEEDED_BY_TIMM),
    'setuptools': _setuptools,
    'opencv': _opencv,
    'pycocotools': partial(
        _imported, name='pycocotools', needs=['numpy'], without='only detection needs it'
    ),
    'OpenMMLab': _families,
    'mmengine': partial(
        _imported,
        name='mmengine',
        needs=_NEEDED_BY_TOOLBOXES,
        without='the toolboxes need it',
    ),
    'mmcv': _mmcv,
    'mmcv ops': _ops,
    'mmdet': _toolbox('mmdet', 'only detection needs it'),
    'mmseg': _toolbox('mmseg', 'only segmentation needs it'),
    'CUDA': _cuda,
    'Triton': _triton,
    'ContMix': _contmix,
    'CPU threads': _threads,
    'disk space': _disk,
    'forward pass': _forward,
}
