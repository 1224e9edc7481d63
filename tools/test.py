"""Evaluate a checkpoint of a detector or segmentor."""

import argparse
import os
import sys

try:
    import overlock_mm
    from overlock_mm import cli
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
    parser.add_argument('checkpoint', help='checkpoint file or URL')
    parser.add_argument(
        '--out',
        help='save predictions: a .pkl file from a detector, a '
        'folder of label maps from a segmentor',
    )
    parser.add_argument(
        '--show-dir', help='save pictures of the predictions in this folder'
    )
    parser.add_argument(
        '--tta',
        action='store_true',
        help='test-time augmentation: several scales, and flipped (boxes '
        'only for detectors)',
    )
    parser.add_argument(
        '--fold',
        action='store_true',
        help="evaluate the backbone's inference-only form (overlock_mm.fold): the same "
        'predictions up to rounding, faster',
    )
    cli.add_run_arguments(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = cli.load_run_config(args)
    cli.check_file(args.checkpoint, 'checkpoint')
    cli.check_dataset(cfg, 'test_dataloader')
    detection = cfg.default_scope == 'mmdet'
    if args.out and detection and not args.out.endswith(('.pkl', '.pickle')):
        raise cli.UserError(f'--out {args.out} must end in .pkl for a detector')

    cfg.load_from, cfg.resume = args.checkpoint, False
    cli.without_pretrained(cfg.model)
    evaluator = cfg.test_evaluator
    evaluator = evaluator[0] if isinstance(evaluator, list) else evaluator
    if args.show_dir:
        show_dir = os.path.abspath(args.show_dir)
        hook = cfg.default_hooks.get('visualization')
        if not hook:
            raise cli.UserError(
                '--show-dir needs default_hooks.visualization in the config'
            )
        hook.update(draw=True, interval=1)
        if detection:
            hook.test_out_dir = show_dir
        else:
            cfg.visualizer.save_dir = show_dir
    if args.out and not detection:
        evaluator.output_dir = args.out
    if args.tta:
        use_test_time_augmentation(cfg, evaluator)
    if args.fold:  # a checkpoint has averaged weights in their place: nothing to swap
        hooks = cfg.get('custom_hooks') or []
        cfg.custom_hooks = [hook for hook in hooks if hook.get('type') != 'EMAHook']
    runner = cli.build_runner(cfg)
    if args.out and detection:
        from mmdet.evaluation import DumpDetResults

        runner.test_evaluator.metrics.append(DumpDetResults(out_file_path=args.out))
    if args.fold:
        from mmengine.hooks import Hook

        hook = Hook()  # the runner loads the weights after it is built
        hook.before_test = lambda runner: overlock_mm.fold(runner.model)
        runner.register_hook(hook)
    runner.test()


def use_test_time_augmentation(cfg, evaluator):
    """Wrap the model and replace the test pipeline, as the config's tta_* entries say."""
    if 'tta_model' not in cfg or 'tta_pipeline' not in cfg:
        raise cli.UserError(
            '--tta needs tta_model and tta_pipeline in the config; see configs/_base_'
        )
    roi_head = cfg.model.get('roi_head') or {}
    if roi_head.get('mask_head'):
        if cli.is_main_process():
            print(
                'MMDetection cannot merge the masks of augmented images: with --tta, boxes '
                'are predicted and evaluated, masks are left out.'
            )
        roi_head.update(mask_head=None, mask_roi_extractor=None)
        loading = cli.loading_options(cfg)
        ignored = loading.get('ignore_unexpected', [])
        loading['ignore_unexpected'] = [*ignored, 'roi_head.mask_head.']
        evaluator.metric = 'bbox'
    cfg.tta_model.module = cfg.model
    cfg.model = cfg.tta_model
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    dataset.pipeline = cfg.tta_pipeline


if __name__ == '__main__':
    with cli.plain_errors():
        main()
