"""Packaging; the settings of the development tools are in pyproject.toml."""

import re
import shutil
from contextlib import suppress
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).parent
VERSION = re.search(r"'(.+)'", (ROOT / 'overlock_mm/version.py').read_text()).group(1)


class BuildWithConfigs(build_py):
    """Put the configs into overlock_mm/.mim, where mim and mmengine look for them.

    An editable installation gets links to them.
    """

    def run(self):
        super().run()
        folder = Path('' if self.editable_mode else self.build_lib, 'overlock_mm/.mim')
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for name in ('configs', 'model-index.yml'):
            source, target = (ROOT / name).resolve(), folder / name
            if self.editable_mode:
                with suppress(OSError):  # not every Windows user may make links
                    target.symlink_to(source)
            if not target.exists():
                copy = shutil.copytree if source.is_dir() else shutil.copy
                copy(source, target)


setup(
    name='overlock_mm',
    version=VERSION,
    description='The OverLoCK backbone for MMDetection and MMSegmentation',
    long_description=(ROOT / 'README.md').read_text(),
    long_description_content_type='text/markdown',
    license='Apache-2.0',
    packages=find_packages(include=['overlock_mm', 'overlock_mm.*']),
    cmdclass=dict(build_py=BuildWithConfigs),
    entry_points=dict(console_scripts=['overlock = overlock_mm.cli:main']),
    python_requires='>=3.11',
    install_requires=[
        'torch>=2.1',
        'torchvision',
        'timm>=1.0',
        'numpy',
        'filelock',
        'tqdm',
    ],
    # The two toolbox families own the same import names: install one of them. mmcv is
    # left to the user, because its ops must be compiled against the installed torch.
    extras_require={
        'onedl': [
            'onedl-mmengine>=0.10.12',
            'onedl-mmdetection>=3.5.1',
            'onedl-mmsegmentation>=1.4.2',
        ],
        'openmmlab': [
            'mmengine>=0.10',
            'mmdet>=3.3',
            'mmsegmentation>=1.2',
            'ftfy',
            'regex',
        ],
        'export': [
            'onnx>=1.19',
            'onnxscript>=0.5',
            'onnxruntime>=1.20',
            'openvino>=2025.0',
        ],
        'serve': ['nicegui>=3.0'],
        'visualize': ['grad-cam>=1.5'],
        'demo': ['imgviz>=2.0', 'scikit-image>=0.22', 'pycocotools', 'opencv-python'],
        'test': ['pytest>=8', 'pytest-xdist', 'ruff', 'fvcore', 'tensorboard'],
    },
    classifiers=[
        'Development Status :: 4 - Beta',
        'Intended Audience :: Science/Research',
        'Operating System :: OS Independent',
        'Programming Language :: Python :: 3',
        'Programming Language :: Python :: 3.11',
        'Programming Language :: Python :: 3.12',
        'Programming Language :: Python :: 3.13',
        'Topic :: Scientific/Engineering :: Artificial Intelligence',
        'Topic :: Scientific/Engineering :: Image Recognition',
    ],
)
