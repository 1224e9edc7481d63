"""Merge the dilated branches of a trained model: a checkpoint in deploy form.

Writes OUT and, beside it, a config that loads it. The weights of a folded model
(`overlock_mm.fold`) need no file: fold the loaded model.
"""

import argparse
import os

from _guard import installed

with installed():
    import torch

    from overlock_mm import OverLoCK, cli
    from overlock_mm.checkpoint import fit, read_weights, write_weights
    from overlock_mm.config.edit import without_pretrained
    from overlock_mm.config.load import build_model, load_config
    from overlock_mm.convert import origin

# Relative difference of a map that rounding explains.
_TOLERANCE = 1e-4


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('config', help='config of the trained model')
    parser.add_argument('checkpoint', help='its checkpoint, in training form; file or URL')
    parser.add_argument('out', metavar='OUT.pth', help='checkpoint to write')
    parser.add_argument(
        '--trust', action='store_true', help='read the checkpoint even if it runs code'
    )
    parser.add_argument('--force', action='store_true', help='overwrite OUT and its config')
    cli.add_config_options(parser)
    return parser.parse_args()


def main():
    args = parse_args()
    cfg = load_config(args.config, args.cfg_options)
    cli.check_file(args.checkpoint, 'checkpoint')
    out = cli.check_output(args.out, ['.pth'], args.force)
    config = cli.check_output(out.with_suffix('.py'), ['.py'], args.force)
    for given, written in ((args.checkpoint, out), (args.config, config)):
        if written.exists() and os.path.exists(given) and written.samefile(given):
            raise cli.UserError(
                f'{written} would be written over what was given; choose another OUT'
            )
    without_pretrained(cfg.get('model'))
    model = build_model(cfg)
    if not isinstance(getattr(model, 'backbone', None), OverLoCK) or model.backbone.deploy:
        raise cli.UserError(
            f'the backbone of {args.config} is no OverLoCK in training form; there is '
            'nothing to merge'
        )
    content = read_weights(args.checkpoint, trust=args.trust)
    report, state = fit(model, content, args.checkpoint)
    model.load_state_dict(state)
    backbone = model.backbone.eval()
    images = torch.randn(1, backbone.in_channels, 224, 320)
    with torch.no_grad():
        before, size = backbone(images), size_of(model)
        backbone.switch_to_deploy()
        after, merged_size = backbone(images), size_of(model)
    error = max(
        ((b - a).norm() / a.norm()).item() for a, b in zip(before, after, strict=True)
    )
    if not error < _TOLERANCE:
        raise cli.UserError(
            f'the merged backbone differs by {error:.1e} of its output, which rounding '
            'does not explain; nothing was written. Are the weights finite?'
        )
    cfg.model.backbone.deploy = True
    cfg.load_from = str(out.resolve())
    meta = content.get('meta', {}) if report.key else {}
    meta = dict(meta, overlock_mm=origin(args.checkpoint, args.config))
    write_weights(dict(meta=meta, state_dict=model.state_dict()), out)
    cfg.dump(config)
    print(
        f'Merged: outputs on random input agree to {error:.1e}. The model has '
        f'{merged_size[0] / 1e6:.2f}M parameters, before {size[0] / 1e6:.2f}M; in bytes '
        f'{merged_size[1] / 2**20:.1f} MiB, before {size[1] / 2**20:.1f} MiB. '
        f'Wrote {out} and {config}.'
    )


def size_of(model):
    """Number of parameters, and bytes of all that a checkpoint has of the model."""
    state = model.state_dict().values()
    return (
        sum(p.numel() for p in model.parameters()),
        sum(v.numel() * v.element_size() for v in state),
    )


if __name__ == '__main__':
    with cli.plain_errors():
        main()
