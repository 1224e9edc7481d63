"""Merge the dilated branches of a trained model and write it with its config."""

import os

import torch

from ..checkpoint import fit, read_weights, write_weights
from ..config.edit import without_pretrained
from ..config.load import build_model, load_config
from ..convert import described
from ..errors import UserError
from ..models import OverLoCK
from .convert import described_config
from .files import check_file, check_output

# Relative difference of a map that rounding explains.
_TOLERANCE = 1e-4


def deploy(
    config: str,
    checkpoint: str,
    out: str,
    cfg_options: dict | None = None,
    trust: bool = False,
    force: bool = False,
) -> str:
    """Merge the dilated branches of a trained model, and write a checkpoint and a config.

    The checkpoint also has the text of the config in deploy form, from which mmengine's
    inferencers build the model.

    Args:
        config: config of the trained model.
        checkpoint: path or URL of its checkpoint, in training form.
        out: the checkpoint to write, ``.pth``; the config is written beside it, ``.py``.
        cfg_options: values for keys of the config.
        trust: read a file that holds more than plain data, which can run code.
        force: overwrite existing files.

    Returns:
        What was done, as a line.

    Raises:
        UserError: if a file cannot be read or written, the backbone is not an OverLoCK in
            training form, or the merged one gives other outputs.
        CheckpointError: if the checkpoint cannot be read, or does not fit the model.
    """
    cfg = load_config(config, cfg_options)
    checkpoint = check_file(checkpoint, 'checkpoint')
    out = check_output(out, ['.pth'], force)
    out_config = check_output(out.with_suffix('.py'), ['.py'], force)
    for given, written in ((checkpoint, out), (config, out_config)):
        if written.exists() and os.path.exists(given) and written.samefile(given):
            raise UserError(
                f'{written} is one of the given files and would be overwritten; choose '
                'another OUT'
            )
    without_pretrained(cfg.get('model'))
    model = build_model(cfg)
    if not isinstance(getattr(model, 'backbone', None), OverLoCK) or model.backbone.deploy:
        raise UserError(
            f'the backbone of {config} is not an OverLoCK in training form; there is '
            'nothing to merge'
        )
    content = read_weights(checkpoint, trust=trust)
    report, state = fit(model, content, checkpoint)
    model.load_state_dict(state)

    size = _size_of(model)
    error = _merge(model.backbone.eval())
    merged_size = _size_of(model)
    if not error < _TOLERANCE:
        raise UserError(
            f'the merged backbone differs by {error:.1e} of its output, which rounding '
            'does not explain; nothing was written. Check that the weights are finite'
        )
    meta = content.get('meta') if report.key else None
    meta = described(
        meta if isinstance(meta, dict) else {},
        checkpoint,
        str(config),
        described_config(cfg, deploy=True),
    )
    write_weights(dict(meta=meta, state_dict=model.state_dict()), out)
    cfg.model.backbone.deploy = True
    cfg.load_from, cfg.resume = str(out.resolve()), False
    cfg.dump(out_config)
    return (
        f'Merged: outputs on random input agree to {error:.1e}. The model has '
        f'{merged_size[0] / 1e6:.2f}M parameters, before {size[0] / 1e6:.2f}M; in bytes '
        f'{merged_size[1] / 2**20:.1f} MiB, before {size[1] / 2**20:.1f} MiB. '
        f'Wrote {out} and {out_config}.'
    )


def _merge(backbone: OverLoCK) -> float:
    """Merge the branches in place; the largest relative difference of a map."""
    images = torch.randn(1, backbone.in_channels, 224, 320)
    with torch.no_grad():
        before = backbone(images)
        backbone.switch_to_deploy()
        after = backbone(images)
    errors = ((b - a).norm() / a.norm() for a, b in zip(before, after, strict=True))
    # the largest, or NaN if there is one: max() of floats would lose it
    return torch.stack(tuple(errors)).max().item()


def _size_of(model) -> tuple[int, int]:
    """Number of parameters, and bytes of all that a checkpoint has of the model."""
    state = model.state_dict().values()
    return (
        sum(p.numel() for p in model.parameters()),
        sum(v.numel() * v.element_size() for v in state),
    )
