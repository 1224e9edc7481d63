"""Train a detector or segmentor from a config."""

import argparse
import sys

try:
    from overlock_mm import cli
    from overlock_mm.errors import CheckpointError
except ModuleNotFoundError as error:
    sys.stderr.write(
        f'error: {error.name.partition(".")[0]} is not installed; in the folder of '
        'overlock_mm run: '
        "pip install -e '.[onedl]'\n"
    )
    sys.exit(2)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config file')
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='PATH',
        help='go on from PATH or, without it, from the latest checkpoint in the work dir',
    )
    parser.add_argument('--amp', action='store_true', help='mixed precision (GPU only)')
    parser.add_argument(
        '--auto-scale-lr',
        action='store_true',
        help='scale the learning rate with the number of GPUs and images',
    )
    parser.add_argument(
        '--no-pretrained', action='store_true', help='start from random weights'
    )
    cli.add_run_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = cli.load_run_config(args)

    import torch
    from mmengine.runner import find_latest_checkpoint

    if args.amp:
        if not torch.cuda.is_available():
            raise cli.UserError('--amp needs a GPU, and torch sees none; leave it out')
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if args.auto_scale_lr:
        if not cfg.get('auto_scale_lr', {}).get('base_batch_size'):
            raise cli.UserError(
                f'--auto-scale-lr needs auto_scale_lr.base_batch_size in '
                f'{args.config}: the batch size that its rates are for'
            )
        cfg.auto_scale_lr.enable = True
    checkpoint = args.resume
    if checkpoint == 'auto':
        checkpoint = find_latest_checkpoint(cfg.work_dir)
    if checkpoint:
        cli.check_file(checkpoint, 'checkpoint')
        cfg.load_from, cfg.resume = checkpoint, True
    elif args.resume:
        print(f'No checkpoint in {cfg.work_dir} yet: training starts from the beginning.')
    if args.no_pretrained or replaces_all(cfg):
        cli.without_pretrained(cfg.model)
    cli.check_dataset(cfg, 'train_dataloader', 'val_dataloader')

    runner = cli.build_runner(cfg)
    try:
        runner.train()
    except CheckpointError as error:
        if cfg.get('load_from'):
            raise
        raise cli.UserError(f'{error}; or start without: --no-pretrained') from error


def replaces_all(cfg) -> bool:
    """Whether a checkpoint brings all weights, so that no others need be there."""
    if not cfg.get('load_from') or cfg.resume:
        return bool(cfg.resume)
    loading = cfg.get('default_hooks', {}).get('loading', {})
    ours = str(cfg.model.get('backbone', {}).get('type')).endswith('OverLoCK')
    return ours and loading.get('strict', True)


if __name__ == '__main__':
    with cli.plain_errors():
        main()
