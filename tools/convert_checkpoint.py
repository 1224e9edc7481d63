"""Convert a released checkpoint for this project's models, or back.

Weights keep their values. Without --to, SRC is a detector or segmentor of MMDetection 2.x
or MMSegmentation 0.x with OverLoCK, and DST becomes one for mmengine and the configs here.
"""

import argparse

from _guard import installed

with installed():
    import numpy as np

    from overlock_mm import cli
    from overlock_mm.checkpoint import fit, read_weights, write_weights
    from overlock_mm.config.edit import without_pretrained
    from overlock_mm.config.load import build_model, load_config
    from overlock_mm.convert import TARGETS, convert_checkpoint


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('src', metavar='SRC', help='checkpoint file or URL')
    parser.add_argument('dst', metavar='DST', help='file to write: .pth or .safetensors')
    parser.add_argument(
        '--to',
        choices=TARGETS,
        default='overlock_mm',
        help='what DST is for: this project (default); the released code; or, made of an '
        'ImageNet file, a backbone in segmentation or detection form, for toolboxes that '
        'load strictly',
    )
    parser.add_argument(
        '--verify',
        metavar='CONFIG',
        help='build the model of this config, load DST into it strictly and run an image',
    )
    parser.add_argument('--half', action='store_true', help='store weights as float16')
    parser.add_argument(
        '--safetensors', action='store_true', help='write this format; DST ends like it'
    )
    parser.add_argument(
        '--keep-optimizer',
        action='store_true',
        help='keep the state of the optimizer and all else that training resumes from',
    )
    parser.add_argument(
        '--trust', action='store_true', help='read SRC even if it runs code'
    )
    parser.add_argument('--force', action='store_true', help='overwrite DST')
    cli.add_config_options(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = load_config(args.verify, args.cfg_options) if args.verify else None
    suffixes = ['.safetensors'] if args.safetensors else ['.pth', '.safetensors']
    dst = cli.check_output(args.dst, suffixes, args.force)
    if args.keep_optimizer and dst.suffix == '.safetensors':
        raise cli.UserError('a .safetensors file has no place for --keep-optimizer')
    cli.check_file(args.src, 'checkpoint')
    content = convert_checkpoint(
        read_weights(args.src, trust=args.trust),
        args.to,
        args.src,
        config=args.verify,
        keep_optimizer=args.keep_optimizer,
        half=args.half,
    )
    if cfg is not None:
        verify(cfg, content, args.src)
    write_weights(content, dst)
    meta, state = content['meta'], content['state_dict']
    classes = meta.get('dataset_meta', {}).get('classes') or meta.get('CLASSES')
    config = meta.get('overlock_mm', {}).get('config')
    print(
        f'Wrote {dst} ({dst.stat().st_size / 2**20:.1f} MiB): {len(state)} entries, '
        f'{len(classes) if classes else "no"} class names'
        + (f'; it is for {config}' if config else '')
    )


def verify(cfg, content, source):
    """Load strictly, and predict one image: noise, through the test pipeline."""
    without_pretrained(cfg.model)
    model = build_model(cfg).eval()
    whole = any(k.startswith('backbone.') for k in content['state_dict'])
    target = model if whole else model.backbone
    report, state = fit(target, content, f'{source}, converted')
    target.load_state_dict(state, strict=True)
    model.cfg = cfg
    image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    if cfg.default_scope == 'mmdet':
        from mmdet.apis import inference_detector

        found = inference_detector(model, image).pred_instances
        finite = found.scores.isfinite().all() and found.bboxes.isfinite().all()
        result = f'{len(found)} objects'
    else:
        from mmseg.apis import inference_model

        prediction = inference_model(model, image)
        finite = prediction.seg_logits.data.isfinite().all()
        result = f'{len(prediction.pred_sem_seg.data.unique())} classes'
    if not finite:
        raise cli.UserError(f'{source} predicts values that are not finite; not written')
    print(f'Verified: all of {len(state)} entries loaded; in an image of noise: {result}')


if __name__ == '__main__':
    with cli.plain_errors():
        main()
