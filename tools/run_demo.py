"""Train, evaluate and picture OverLoCK on the demo scenes, from random weights.

Used by make demo and make demo-detection. Everything goes through the tools that a
user would call: make_demo_data.py, train.py and test.py. An interrupted run goes on
from its last checkpoint.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import matplotlib
import numpy as np
import torch
from mmcv.ops import get_compiling_cuda_version
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import set_random_seed
from PIL import Image

matplotlib.use('Agg')
import matplotlib.pyplot as plt  # noqa: E402

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = dict(
    segmentation='configs/segmentation/upernet_overlock_xt_demo.py',
    detection='configs/detection/cascade_mask_rcnn_overlock_xt_demo.py',
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('task', choices=CONFIGS)
    task = parser.parse_args().task
    config, work_dir = CONFIGS[task], Path('work_dirs') / f'demo_{task}'
    if torch.cuda.is_available() and get_compiling_cuda_version() == 'not available':
        print("mmcv's ops were compiled without CUDA: the demo uses the CPU")
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    start = time.monotonic()

    say('1/4 The scenes: real photographed objects in new places')
    tool('make_demo_data.py')
    start_afresh_if_changed(config, work_dir)
    say('2/4 The model before training, for comparison')
    untrained = evaluate(config, save_untrained(config, work_dir), work_dir / 'untrained')
    say(f'3/4 Training; interrupt at will and run again to go on ({work_dir})')
    tool('train.py', config, '--work-dir', work_dir, '--resume')
    checkpoint = ROOT.joinpath(work_dir, 'last_checkpoint').read_text().strip()
    say('4/4 Evaluation')
    pictures = work_dir / 'predictions'
    trained = evaluate(config, checkpoint, work_dir / 'test', '--show-dir', pictures)
    sheet = contact_sheet(pictures)
    curve = plot_curve(work_dir)

    say(f'Done in {(time.monotonic() - start) / 60:.1f} minutes.')
    if task == 'segmentation':
        print(
            f'Validation mIoU: {trained["mIoU"] / 100:.3f}   (untrained '
            f'{untrained["mIoU"] / 100:.3f}, only background {background_miou():.3f})'
        )
    else:
        for kind in ('bbox', 'segm'):
            print(
                f'Validation {kind} AP: {trained[f"coco/{kind}_mAP"]:.3f}, AP50 '
                f'{trained[f"coco/{kind}_mAP_50"]:.3f}   (untrained '
                f'{untrained[f"coco/{kind}_mAP"]:.3f}, '
                f'{untrained[f"coco/{kind}_mAP_50"]:.3f})'
            )
    for name, (first, last) in losses(work_dir).items():
        print(f'{name}: {first:.3f} -> {last:.3f}')
    print(f'Labels and predictions side by side: {sheet}, each in {pictures}')
    print(f'Curve: {curve}\nCheckpoint: {checkpoint}')


def start_afresh_if_changed(config, work_dir):
    """Remove what an earlier run left if it followed another config or data set."""
    recipe = Config.fromfile(ROOT / config).pretty_text
    recipe += (ROOT / 'data/demo/demo.json').read_text()
    path = ROOT / work_dir / 'recipe.txt'
    if path.parent.exists() and not (path.exists() and path.read_text() == recipe):
        print(f'{work_dir} is of another config or data set: starting afresh')
        shutil.rmtree(path.parent)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(recipe)


def say(text):
    print(f'\n=== {text}', flush=True)


def tool(name, *arguments):
    """Run one of this folder's command lines in the repository's root."""
    result = subprocess.run([sys.executable, ROOT / 'tools' / name, *arguments], cwd=ROOT)
    if result.returncode:
        sys.exit(f'error: {name} failed; its message is above')


def save_untrained(config, work_dir):
    cfg = Config.fromfile(ROOT / config)
    init_default_scope(cfg.default_scope)
    set_random_seed(cfg.randomness.seed)
    model = MODELS.build(cfg.model)
    model.init_weights()
    path = ROOT / work_dir / 'untrained.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


def evaluate(config, checkpoint, work_dir, *options):
    """Run test.py and return the metrics that it logs."""
    tool('test.py', config, checkpoint, '--work-dir', work_dir, *options)
    log = max((ROOT / work_dir).glob('*/*.json'), key=lambda p: p.stat().st_mtime)
    return json.loads(log.read_text().splitlines()[-1])


def scalars(work_dir):
    """All logged records of training, over interrupted runs, by iteration."""
    records = {}
    for path in sorted((ROOT / work_dir).glob('*/vis_data/scalars.json')):
        for line in path.read_text().splitlines():
            record = json.loads(line)
            key = ('loss' in record, record.get('iter', record['step']))
            records[key] = record
    return [records[key] for key in sorted(records)]


def losses(work_dir):
    """First and last logged value of every loss."""
    records = [r for r in scalars(work_dir) if 'loss' in r]
    return {k: (records[0][k], records[-1][k]) for k in records[0] if 'loss' in k}


def plot_curve(work_dir):
    records = scalars(work_dir)
    train = [r for r in records if 'loss' in r]
    figure, axes = plt.subplots(figsize=(6, 3.5), layout='constrained')
    axes.plot([r['step'] for r in train], [r['loss'] for r in train], color='tab:blue')
    axes.set(xlabel='iteration', ylim=(0, None))
    axes.set_ylabel('training loss', color='tab:blue')
    metric = next(k for k in ('mIoU', 'coco/segm_mAP_50') if any(k in r for r in records))
    scores = [(r['step'], r[metric]) for r in records if metric in r]
    if metric.startswith('coco'):  # logged by epoch
        per_epoch = max(r['step'] for r in train) / max(s for s, _ in scores)
        scores = [(s * per_epoch, v) for s, v in scores]
    right = axes.twinx()
    right.plot(*zip(*scores, strict=True), 'o-', color='tab:orange')
    right.set_ylim(0, None)
    right.set_ylabel(f'validation {metric}', color='tab:orange')
    path = work_dir / 'curve.png'
    figure.savefig(ROOT / path, dpi=150)
    return path


def contact_sheet(folder, rows=3, columns=2):
    """Join the first pictures, each of which shows labels and predictions."""
    paths = sorted((ROOT / folder).rglob('*scene*.png'))[: rows * columns]
    pictures = [np.array(Image.open(path).convert('RGB')) for path in paths]
    lines = [
        np.concatenate(pictures[i : i + columns], axis=1)
        for i in range(0, len(pictures) - columns + 1, columns)
    ]
    path = folder.parent / 'predictions.png'
    Image.fromarray(np.concatenate(lines)).save(ROOT / path)
    return path


def background_miou():
    """The mIoU of predicting background everywhere: its own IoU over all classes."""
    maps = [
        np.array(Image.open(path))
        for path in (ROOT / 'data/demo/annotations/validation').glob('*.png')
    ]
    labels = np.concatenate([m.ravel() for m in maps])
    return float((labels == 0).mean() / len(np.unique(labels)))


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('Interrupted; run the same command again to go on.')
