"""Create a virtual environment with a pinned stack and this package.

.venv is that of requirements-dev.txt; with the argument ``openmmlab``, .venv-openmmlab is
that of requirements-openmmlab.txt. Runs with any Python 3.11 to 3.13 (OpenMMLab's own
packages: 3.11) and nothing else installed. mmcv's ops are compiled once for each version
of mmcv, torch and Python, and kept in the user's cache folder.
"""

import fcntl
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
OPENMMLAB = sys.argv[1:] == ['openmmlab']
VENV = ROOT / ('.venv-openmmlab' if OPENMMLAB else '.venv')
PYTHON = VENV / 'bin' / 'python'
READY = VENV / 'overlock_mm.ready'
REQUIREMENTS = ROOT / f'requirements-{"openmmlab" if OPENMMLAB else "dev"}.txt'
LAST_PYTHON = (3, 11) if OPENMMLAB else (3, 13)  # torch 2.1.2 has no wheel for a later one
CACHE = Path(os.environ.get('XDG_CACHE_HOME') or Path.home() / '.cache') / 'overlock_mm'
# what mmcv is compiled with and against
BUILD = ('torch', 'torchvision', 'numpy', 'setuptools', 'wheel', 'ninja', 'psutil')
MMCV = 'mmcv' if OPENMMLAB else 'onedl-mmcv'
GIB = 2**30
NEEDED_GIB = 12
NO_NETWORK = re.compile(
    'NewConnectionError|NameResolutionError|ConnectTimeout|Network is unreachable|'
    'Temporary failure in name resolution|ProxyError|No route to host|Connection refused'
)


class SetupError(Exception):
    """A one-line reason why the set-up cannot go on, and what to do."""


def main():
    pins = dict(re.findall(r'^([\w-]+)==(\S+)', REQUIREMENTS.read_text(), re.M))
    stamp = hashlib.sha256(
        REQUIREMENTS.read_bytes()
        + (ROOT / 'setup.py').read_bytes()
        + f'{sys.version_info[:2]} {ROOT}'.encode()
    ).hexdigest()
    if READY.exists() and READY.read_text() == stamp and PYTHON.exists():
        return
    if not (3, 11) <= sys.version_info[:2] <= LAST_PYTHON:
        needed = '3.11' if OPENMMLAB else '3.11 to 3.13'
        raise SetupError(
            f'Python {needed} is needed, this is '
            f'{sys.version.split()[0]}; run make PYTHON=python3.11 ...'
        )
    CACHE.mkdir(parents=True, exist_ok=True)
    with open(CACHE / 'lock', 'w') as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            say('Another set-up is running; waiting for it.')
            fcntl.flock(lock, fcntl.LOCK_EX)
        install(pins)
    READY.write_text(stamp)


def install(pins):
    create_venv()
    check_disk(ROOT)
    say(f'Installing torch {pins["torch"]} (about 2 GB to download the first time)')
    pip('install', *(f'{name}=={pins[name]}' for name in BUILD if name in pins))
    wheel = mmcv_wheel(pins)
    # by force: an environment may hold ops for another torch under the same version
    pip('install', '--force-reinstall', '--no-deps', wheel)
    say('Installing MMDetection, MMSegmentation and the other packages')
    pip('install', '-r', REQUIREMENTS)
    pip('install', '--no-deps', '--no-build-isolation', '-e', ROOT)
    say(f'Ready: {VENV}')


def create_venv():
    if (
        PYTHON.exists()
        and subprocess.run(
            [PYTHON, '-m', 'pip', '--version'], capture_output=True
        ).returncode
        == 0
    ):
        version = subprocess.run(
            [PYTHON, '-c', 'import sys; print(sys.version_info[:2])'],
            capture_output=True,
            text=True,
        ).stdout.strip()
        if version == str(sys.version_info[:2]):
            return
    say(f'Creating {VENV}')
    result = subprocess.run(
        [sys.executable, '-m', 'venv', '--clear', VENV], capture_output=True, text=True
    )
    if result.returncode:
        raise SetupError(
            'python could not create a virtual environment; on Debian and '
            'Ubuntu run: apt-get install python3-venv'
        )


def mmcv_wheel(pins) -> Path:
    """The wheel of mmcv with its ops, compiled now if the cache has none."""
    probe = """
import re, subprocess, torch
from torch.utils.cpp_extension import CUDA_HOME
device = 'cpu'
if torch.cuda.is_available() and CUDA_HOME:
    text = subprocess.check_output([CUDA_HOME + '/bin/nvcc', '--version'], text=True)
    if re.search(r'release (\\d+)', text)[1] == torch.version.cuda.split('.')[0]:
        device = 'cu' + torch.version.cuda
print(device)
"""
    device = (
        subprocess.run([PYTHON, '-c', probe], capture_output=True, text=True).stdout.strip()
        or 'cpu'
    )
    tag = f'cp{sys.version_info[0]}{sys.version_info[1]}-{sysconfig.get_platform()}'
    folder = CACHE / 'wheels' / f'mmcv{pins[MMCV]}-torch{pins["torch"]}-{device}-{tag}'
    wheels = list(folder.glob('*.whl'))
    if wheels:
        say(f'Using the compiled ops of mmcv in {folder}')
        return wheels[0]
    if not shutil.which(os.environ.get('CXX', 'g++')):
        raise SetupError(
            'mmcv needs a C++ compiler, and there is no g++; on Debian and '
            'Ubuntu run: apt-get install g++ python3-dev'
        )
    if not (Path(sysconfig.get_path('include')) / 'Python.h').exists():
        raise SetupError(
            'mmcv needs the headers of Python; on Debian and Ubuntu run: '
            'apt-get install python3-dev'
        )
    memory = os.sysconf('SC_PHYS_PAGES') * os.sysconf('SC_PAGE_SIZE') / GIB
    jobs = max(1, min(len(os.sched_getaffinity(0)), int(memory / 2)))  # 2 GB each
    say(f"Compiling mmcv's ops for {device}, once (about 15 minutes on 2 cores)")
    folder.parent.mkdir(parents=True, exist_ok=True)
    # built beside its place and moved there whole, so an interrupted build leaves none
    with tempfile.TemporaryDirectory(dir=folder.parent, ignore_cleanup_errors=True) as temp:
        env = dict(
            os.environ,
            MMCV_WITH_OPS='1',
            MAX_JOBS=os.environ.get('MAX_JOBS', str(jobs)),
            PATH=f'{PYTHON.parent}{os.pathsep}{os.environ["PATH"]}',
        )
        if device == 'cpu':  # a GPU without nvcc must not be found by the build
            env['CUDA_VISIBLE_DEVICES'] = ''
        pip(
            'wheel',
            '--no-deps',
            '--no-build-isolation',
            '--no-cache-dir',
            '-w',
            temp,
            f'{MMCV}=={pins[MMCV]}',
            env=env,
        )
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(temp, folder)
    return next(folder.glob('*.whl'))


def pip(*arguments, env=None):
    """Run pip in the environment, with a sign of life, its output in a log file."""
    log = CACHE / 'pip.log'
    start = time.monotonic()
    with open(log, 'w') as out:
        process = subprocess.Popen(
            [PYTHON, '-m', 'pip', '--disable-pip-version-check', *arguments],
            env=env,
            stdout=out,
            stderr=subprocess.STDOUT,
        )
        try:
            while True:
                try:
                    code = process.wait(timeout=30)
                    break
                except subprocess.TimeoutExpired:
                    minutes, seconds = divmod(int(time.monotonic() - start), 60)
                    say(f'  ... {minutes} min {seconds:02d} s')
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if code:
        output = log.read_text(errors='replace')
        if NO_NETWORK.search(output):
            raise SetupError(
                'pip cannot reach the package index: no network? Connect, or '
                f'set PIP_INDEX_URL, and run this again (log: {log})'
            )
        if 'No space left on device' in output:
            raise SetupError(
                f'the disk is full; free some space and run this again (log: {log})'
            )
        errors = [line for line in output.splitlines() if 'error' in line.lower()]
        raise SetupError(
            f'pip {arguments[0]} failed: {(errors or ["?"])[-1].strip()} (log: {log})'
        )


def check_disk(path: Path):
    free = shutil.disk_usage(path).free / GIB
    used = sum(1 for _ in VENV.glob('lib/*/site-packages/torch/version.py'))
    if free < (2 if used else NEEDED_GIB):
        raise SetupError(
            f'{free:.1f} GB are free at {path}, the set-up needs about '
            f'{NEEDED_GIB} GB; free some space or clone elsewhere'
        )


def say(text: str):
    print(text, flush=True)


if __name__ == '__main__':
    if sys.argv[1:] and not OPENMMLAB:
        sys.exit("error: the only argument is 'openmmlab'; leave it out for .venv")
    try:
        main()
    except SetupError as error:
        sys.exit(f'error: {error}')
    except KeyboardInterrupt:
        sys.exit('Interrupted; run the same command again to go on.')
