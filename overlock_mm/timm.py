"""Registers OverLoCK's classifiers with timm when it is imported.

>>> import timm, overlock_mm.timm
>>> model = timm.create_model('overlock_t', num_classes=10)
"""

from urllib.error import URLError

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import register_notrace_module
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model

from .checkpoint import (
    RELEASE,
    LoadOptions,
    cannot_download,
    fit,
    plain_data_allowed,
)
from .models.blocks import DynamicConvBlock, RepConvBlock
from .models.classifier import AuxiliaryLoss, OverLoCKClassifier
from .openmmlab import print_log

__all__ = ['AuxiliaryLoss', 'OverLoCKClassifier']

_CLASSIFIERS = ('head.4', 'aux_head.2')
_FIRST_CONV = 'patch_embed1.0'
_REPARAM_TAG = 'in1k_reparam'

# torch.fx, and timm's feature extractors with it, take a block as one node
for _block in (RepConvBlock, DynamicConvBlock):
    register_notrace_module(_block)


def checkpoint_filter_fn(checkpoint: dict, model: OverLoCKClassifier) -> dict:
    """The weights that timm is to load, checked and reported as in ``load_checkpoint``.

    timm does not load strictly if the number of classes differs. Here everything but the
    classifiers and the first convolution, which timm adapts, must fit the model.

    Args:
        checkpoint: content of a checkpoint file.
        model: the model to load into.

    Returns:
        A state dict for ``model``.

    Raises:
        CheckpointError: if the checkpoint is not one of this arch and form.
    """
    adapted = (*(f'{name}.' for name in _CLASSIFIERS), f'{_FIRST_CONV}.')
    cfg = getattr(model, 'pretrained_cfg', None) or {}
    source = cfg.get('file') or cfg.get('url') or 'the checkpoint'
    report, state = fit(
        model,
        checkpoint,
        source,
        LoadOptions(ignore_mismatched=adapted),
        logger='silent',
    )
    report.ignored_because = 'timm adapts them'
    print_log(str(report), logger='current')
    return state | report.ignored


def _cfg(url: str, crop_pct: float) -> dict:
    return dict(
        url=RELEASE + url,
        num_classes=1000,
        input_size=(3, 224, 224),
        pool_size=(7, 7),
        crop_pct=crop_pct,
        interpolation='bicubic',
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv=_FIRST_CONV,
        classifier=_CLASSIFIERS,
        license='apache-2.0',
        origin_url='https://github.com/LMMMEng/OverLoCK',
        paper_ids='arXiv:2502.20087',
        paper_name='OverLoCK: An Overview-first-Look-Closely-next ConvNet with '
        'Context-Mixing Dynamic Kernels',
    )


default_cfgs = generate_default_cfgs(
    {
        f'overlock_{arch}.{tag}': _cfg(f'overlock_{arch}_in1k_224{suffix}.pth', crop_pct)
        for arch, crop_pct in dict(xt=0.925, t=0.95, s=0.95, b=0.975).items()
        for tag, suffix in (('in1k', ''), (_REPARAM_TAG, '_reparam'))
    }
)


def _create_overlock(arch: str, pretrained: bool, pretrained_cfg=None, **kwargs):
    """Build a model; ``deploy`` and the weights in deploy form imply each other."""
    tag = pretrained_cfg
    if not isinstance(tag, str | None):
        tag = tag.get('tag') if isinstance(tag, dict) else tag.tag
    if tag == _REPARAM_TAG:
        kwargs.setdefault('deploy', True)
    if pretrained_cfg is None and kwargs.get('deploy'):
        pretrained_cfg = _REPARAM_TAG
    try:
        with plain_data_allowed():  # timm's own reader takes less
            return build_model_with_cfg(
                OverLoCKClassifier,
                f'overlock_{arch}',
                pretrained,
                pretrained_cfg=pretrained_cfg,
                pretrained_filter_fn=checkpoint_filter_fn,
                feature_cfg=dict(out_indices=(0, 1, 2, 3), feature_cls='getter'),
                arch=arch,
                **kwargs,
            )
    except URLError as error:
        tag = pretrained_cfg if isinstance(pretrained_cfg, str) else tag
        url = default_cfgs[f'overlock_{arch}'].cfgs[tag or 'in1k'].url
        raise cannot_download(url, error) from error


@register_model
def overlock_xt(pretrained: bool = False, **kwargs) -> OverLoCKClassifier:
    """OverLoCK-XT, 17M parameters."""
    return _create_overlock('xt', pretrained, **kwargs)


@register_model
def overlock_t(pretrained: bool = False, **kwargs) -> OverLoCKClassifier:
    """OverLoCK-T, 35M parameters."""
    return _create_overlock('t', pretrained, **kwargs)


@register_model
def overlock_s(pretrained: bool = False, **kwargs) -> OverLoCKClassifier:
    """OverLoCK-S, 58M parameters."""
    return _create_overlock('s', pretrained, **kwargs)


@register_model
def overlock_b(pretrained: bool = False, **kwargs) -> OverLoCKClassifier:
    """OverLoCK-B, 98M parameters."""
    return _create_overlock('b', pretrained, **kwargs)
