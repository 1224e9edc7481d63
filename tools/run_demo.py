"""Train, evaluate and picture OverLoCK on the demo scenes, from random weights.

Used by make demo and make demo-detection. Everything goes through the tools that a
user would call: make_demo_data.py, train.py and test.py. An interrupted run goes on
from its last checkpoint.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

import torch
from mmcv.ops import get_compiling_cuda_version

from overlock_mm.apis import demo

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = dict(
    segmentation='configs/segmentation/upernet_overlock_xt_demo.py',
    detection='configs/detection/cascade_mask_rcnn_overlock_xt_demo.py',
)
DATA = 'data/demo'


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('task', choices=CONFIGS)
    task = parser.parse_args().task
    os.chdir(ROOT)
    config, work_dir = CONFIGS[task], Path('work_dirs') / f'demo_{task}'
    if torch.cuda.is_available() and get_compiling_cuda_version() == 'not available':
        print("mmcv's ops were compiled without CUDA: the demo uses the CPU")
        os.environ['CUDA_VISIBLE_DEVICES'] = ''
    start = time.monotonic()

    say('1/4 The scenes: real photographed objects in new places')
    tool('make_demo_data.py')
    if demo.prepare_work_dir(config, DATA, work_dir):
        print(f'{work_dir} was of another config or data set: starting afresh')
    say('2/4 The model before training, for comparison')
    demo.save_untrained(config, work_dir / 'untrained.pth')
    untrained = evaluate(config, work_dir / 'untrained.pth', work_dir / 'untrained')
    say(f'3/4 Training; interrupt at will and run again to go on ({work_dir})')
    tool('train.py', config, '--work-dir', work_dir, '--resume')
    checkpoint = Path(work_dir, 'last_checkpoint').read_text().strip()
    say('4/4 Evaluation')
    pictures = work_dir / 'predictions'
    out = work_dir / ('labels' if task == 'segmentation' else 'instances.pkl')
    options = ('--show-dir', pictures, '--out', out)
    trained = evaluate(config, checkpoint, work_dir / 'test', *options)
    sheet = work_dir / 'predictions.png'
    if task == 'segmentation':
        demo.draw_scenes(demo.segmentation_scenes(DATA, out)[:6], sheet)
    else:
        scenes = demo.detection_scenes(DATA, out, min_score=0.3)[:6]
        demo.draw_scenes(scenes, sheet, 'prediction (score from 0.3)')
    curve = demo.plot_curve(work_dir)

    say(f'Done in {(time.monotonic() - start) / 60:.1f} minutes.')
    if task == 'segmentation':
        print(
            f'Validation mIoU: {trained["mIoU"] / 100:.3f}   (untrained '
            f'{untrained["mIoU"] / 100:.3f}, only background '
            f'{demo.background_miou(DATA):.3f})'
        )
    else:
        for kind in ('bbox', 'segm'):
            # nothing is logged where no object was found
            (ap, ap50), before = (
                [run.get(f'coco/{kind}_mAP{end}', 0.0) for end in ('', '_50')]
                for run in (trained, untrained)
            )
            print(
                f'Validation {kind} AP: {ap:.3f}, AP50 {ap50:.3f}   (untrained '
                f'{before[0]:.3f}, {before[1]:.3f})'
            )
    for name, (first, last) in demo.losses_of(work_dir).items():
        print(f'{name}: {first:.3f} -> {last:.3f}')
    print(f'Ground truth and predictions: {sheet}; every validation image: {pictures}')
    print(f'Curve: {curve}\nCheckpoint: {checkpoint}')


def say(text):
    print(f'\n=== {text}', flush=True)


def tool(name, *arguments):
    """Run one of this folder's command lines in the repository's root."""
    result = subprocess.run([sys.executable, ROOT / 'tools' / name, *arguments], cwd=ROOT)
    if result.returncode:
        sys.exit(f'error: {name} failed; its message is above')


def evaluate(config, checkpoint, work_dir, *options):
    """Run test.py and return the metrics that it logs."""
    tool('test.py', config, checkpoint, '--work-dir', work_dir, *options)
    return demo.metrics_of(work_dir)


if __name__ == '__main__':
    try:
        main()
    except KeyboardInterrupt:
        sys.exit('Interrupted; run the same command again to go on.')
