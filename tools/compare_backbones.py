"""Train on two demo scenes with OverLoCK-XT, ResNet-18 and Swin-T; draw the losses.

All start from random weights. It takes about 10 minutes on one idle CPU core.
"""

import argparse
import os
from pathlib import Path

from _guard import installed

with installed('onedl,demo'):
    import torch
    from mmengine.config import Config
    from mmengine.logging import MMLogger

    from overlock_mm.apis import learning
    from overlock_mm.cli import common as cli
    from overlock_mm.config.swap import swap
    from overlock_mm.datasets.demo import make_demo_data

ROOT = Path(__file__).resolve().parent.parent
CONFIGS = (
    'configs/detection/cascade_mask_rcnn_overlock_xt_demo.py',
    'configs/segmentation/upernet_overlock_xt_demo.py',
)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--iterations', type=int, default=40)
    parser.add_argument('--out', type=Path, default='docs/learning.png', help='PNG file')
    args = parser.parse_args()
    out = args.out.absolute()
    os.chdir(ROOT)
    MMLogger.get_instance('compare_backbones', log_level='WARNING')  # not every weight
    make_demo_data('data/demo')
    histories = {}
    for path in CONFIGS:
        scope = Config.fromfile(path).default_scope
        runs = histories[scope] = {}
        for name in ('overlock_xt', *learning.BACKBONES):
            for form in (None, torch.channels_last):
                if form is not None and (scope == 'mmseg' or name == 'swin_t'):
                    continue
                cfg = Config.fromfile(path)
                if name in learning.BACKBONES:
                    cfg, _ = swap(cfg, backbone=learning.BACKBONES[name])
                run = name if form is None else f'{name}, maps in channels_last memory'
                runs[run] = learning.fit_two_scenes(
                    cfg, args.iterations, memory_format=form
                )
                last = runs[run][-5:]
                numbers = {
                    key: round(sum(log[key] for log in last) / len(last), 3)
                    for key in last[0]
                }
                print(f'{scope}, {run}, mean of the last 5: {numbers}', flush=True)
    learning.draw_curves(histories, out)
    print(out)


if __name__ == '__main__':
    with cli.plain_errors():
        main()
