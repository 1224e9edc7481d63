"""Convert checkpoints from and to the released layouts."""

import copy
from pathlib import Path

import numpy as np
import torch

from ..checkpoint import fit, read_weights, write_weights
from ..config.edit import without_pretrained
from ..config.load import build_model, load_config
from ..convert import convert_checkpoint
from ..errors import UserError
from .files import check_file, check_output


def convert(
    source: str,
    target: str,
    to: str = 'overlock_mm',
    verify: str | None = None,
    cfg_options: dict | None = None,
    half: bool = False,
    keep_optimizer: bool = False,
    trust: bool = False,
    force: bool = False,
) -> str:
    """Convert a checkpoint file; see :func:`overlock_mm.convert.convert_checkpoint`.

    Args:
        source: path or URL of the checkpoint.
        target: the file to write, ``.pth`` or ``.safetensors``.
        to: what the file is for.
        verify: a config. The model is built from it, loads the result strictly, and
            predicts an image; then the file has the config's text, too.
        cfg_options: values for keys of that config.
        half: store floating-point tensors as float16.
        keep_optimizer: keep the optimizer's state and all else that training resumes from.
        trust: read a file that holds more than plain data, which can run code.
        force: overwrite an existing file.

    Returns:
        What was done, a line for each step.

    Raises:
        UserError: if a file cannot be read or written, or the prediction is not finite.
        CheckpointError: if the checkpoint cannot be read or converted.
    """
    cfg = load_config(verify, cfg_options) if verify else None
    target = check_output(target, ['.pth', '.safetensors'], force)
    if keep_optimizer and target.suffix == '.safetensors':
        raise UserError(
            'a .safetensors file has no place for --keep-optimizer; write a .pth file'
        )
    source = check_file(source, 'checkpoint')
    content = read_weights(source, trust=trust)
    whole = to in ('overlock_mm', 'released')
    text = described_config(cfg) if cfg is not None and whole else None
    content = convert_checkpoint(
        content, to, source, verify, keep_optimizer, half, cfg=text
    )
    lines = []
    if cfg is not None:
        lines.append(_verify(cfg, content, source))
    write_weights(content, target)
    return '\n'.join([*lines, _summary(content, target)])


def described_config(cfg, deploy: bool | None = None) -> str:
    """The text of a config as a checkpoint has it: what it needs is in the file.

    Args:
        cfg: the config, which stays as it is.
        deploy: the form of the backbone, if it is another than the config's.
    """
    cfg = copy.deepcopy(cfg)
    without_pretrained(cfg.model)
    if deploy is not None:
        cfg.model.backbone.deploy = deploy
    cfg.load_from, cfg.resume = None, False
    return cfg.pretty_text


def _verify(cfg, content, source) -> str:
    """Load strictly, and predict an image of noise through the test pipeline."""
    without_pretrained(cfg.model)
    model = build_model(cfg).eval()
    whole = any(k.startswith('backbone.') for k in content['state_dict'])
    target = model if whole else model.backbone
    _, state = fit(target, content, f'{source}, converted')
    target.load_state_dict(state, strict=True)
    model.cfg = cfg
    image = np.random.default_rng(0).integers(0, 256, (240, 320, 3), np.uint8)
    with torch.no_grad():
        finite, result = _predict(model, image)
    if not finite:
        raise UserError(f'{source} predicts values that are not finite; not written')
    return f'Verified: all {len(state)} keys loaded; in an image of noise: {result}'


def _predict(model, image):
    """Whether a prediction is finite, and what it is."""
    # imported here because only one of the toolboxes may be installed
    if hasattr(model, 'decode_head'):
        from mmseg.apis import inference_model

        found = inference_model(model, image)
        classes = len(found.pred_sem_seg.data.unique())
        return found.seg_logits.data.isfinite().all(), f'{classes} classes'
    from mmdet.apis import inference_detector

    found = inference_detector(model, image).pred_instances
    finite = found.scores.isfinite().all() and found.bboxes.isfinite().all()
    return finite, f'{len(found)} objects'


def _summary(content, target: Path) -> str:
    meta, state = content['meta'], content['state_dict']
    classes = meta.get('dataset_meta', {}).get('classes') or meta.get('CLASSES')
    config = meta.get('overlock_mm', {}).get('config')
    return (
        f'Wrote {target} ({target.stat().st_size / 2**20:.1f} MiB): {len(state)} keys, '
        f'{len(classes) if classes else "no"} class names'
        + (f'; its config is {config}' if config else '')
    )
