"""What the figures show: backbones with or without weights, and images for them."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import timm
import torch
from PIL import Image
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, resolve_data_config
from torch import Tensor, nn

from ...archs import ARCHS
from ...checkpoint import form_of, load_checkpoint, read_weights, unwrap
from ...errors import UserError
from ...models import OverLoCK, TimmBackbone
from ..files import check_file
from ..messages import say

_SUFFIXES = ('.bmp', '.jpeg', '.jpg', '.png', '.tif', '.tiff', '.webp')
_CONFIGS = ('.py', '.yml', '.yaml', '.json')


class Normalisation(NamedTuple):
    """What is done to the values of an RGB image, 0 to 255, before a network sees it."""

    mean: tuple[float, ...] = tuple(255 * v for v in IMAGENET_DEFAULT_MEAN)
    std: tuple[float, ...] = tuple(255 * v for v in IMAGENET_DEFAULT_STD)
    bgr: bool = False  # whether the network takes BGR, with these in that order

    @classmethod
    def of(cls, model: nn.Module) -> 'Normalisation':
        """That of a detector or segmentor."""
        processor = model.data_preprocessor
        # toolboxes read BGR, and turn it around if the network takes RGB
        # MMSegmentation's own packages name it without the underscore
        names = ('_channel_conversion', 'channel_conversion')
        bgr = not any(getattr(processor, name, False) for name in names)
        if not getattr(processor, '_enable_normalize', False):
            return cls((0.0,), (1.0,), bgr)
        mean, std = (v.flatten().tolist() for v in (processor.mean, processor.std))
        return cls(tuple(mean), tuple(std), bgr)

    def apply(self, image: np.ndarray) -> Tensor:
        """What the network takes for an image ``(H, W, 3)``: ``(1, 3, H, W)``."""
        pixels = (image[..., ::-1] if self.bgr else image) - np.float64(self.mean)
        pixels = torch.from_numpy(pixels / self.std).float()
        return pixels.permute(2, 0, 1)[None].contiguous()

    def undo(self, inputs: Tensor) -> np.ndarray:
        """The image ``(H, W, 3)``, uint8, of what the network takes, ``(C, H, W)``.

        Of an image that is not RGB it has the first channels, or the only one, stretched.
        """
        pixels = inputs.permute(1, 2, 0).double().cpu().numpy() * self.std + self.mean
        if pixels.shape[2] != 3:
            pixels = pixels[..., [0, 1, 2] if pixels.shape[2] > 3 else [0, 0, 0]]
            low, high = np.percentile(pixels, (1, 99))
            pixels = (pixels - low) / max(high - low, 1e-12) * 255
        elif self.bgr:
            pixels = pixels[..., ::-1]
        return pixels.round().clip(0, 255).astype(np.uint8)


class Network(NamedTuple):
    """A backbone in evaluation mode, and how its images are normalised."""

    name: str
    weights: str  # where they come from
    backbone: nn.Module
    in_channels: int = 3
    normalisation: Normalisation = Normalisation()


class Seen(NamedTuple):
    """An image as the backbone of a model sees it.

    Attributes:
        inputs: what the backbone takes, normalised and padded, ``(1, C, H, W)``.
        picture: the image itself, resized but not padded, ``(h, w, 3)`` RGB in uint8.
        size: height and width of the image's file.
        result: the prediction, a data sample.
    """

    inputs: Tensor
    picture: np.ndarray
    size: tuple[int, int]
    result: object

    def scaled(self, x: float, y: float) -> tuple[float, float]:
        """Where a position in the file's pixels is in those of ``picture``."""
        (height, width), (h, w) = self.size, self.picture.shape[:2]
        return (x + 0.5) * w / width - 0.5, (y + 0.5) * h / height - 0.5


def open_model(
    config: str,
    checkpoint: str,
    device: str | None = None,
    cfg_options: dict | None = None,
    trust: bool = False,
):
    """A :class:`~overlock_mm.apis.inference.Predictor` that is not folded.

    A segmentor predicts images as a whole, not in windows.

    Raises:
        UserError: if the config or an argument cannot be used.
        CheckpointError: if the weights cannot be loaded, or do not fit.
    """
    from ...config.load import load_config, toolbox_of
    from ..inference import Predictor

    cfg = load_config(config, cfg_options)
    if toolbox_of(cfg) == 'mmseg' and (cfg.get('model') or {}).get('test_cfg'):
        cfg.model.test_cfg.mode = 'whole'
    predictor = Predictor(cfg, checkpoint, device, fold=False, trust=trust)
    predictor.model.requires_grad_(False)
    return predictor


def look(predictor, backbone: nn.Module, image: str) -> Seen:
    """Predict an image, and keep what the backbone takes.

    Raises:
        UserError: if the image cannot be read or predicted.
    """
    seen = []
    hook = backbone.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    try:
        result = predictor(image)
    except (AssertionError, RuntimeError, ValueError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise UserError(f'{image} cannot be predicted: {lines[0]}') from error
    finally:
        hook.remove()
    height, width = result.img_shape[:2]
    inputs = seen[0][:1].detach()
    picture = Normalisation.of(predictor.model).undo(inputs[0, :, :height, :width])
    return Seen(inputs, picture, tuple(result.ori_shape[:2]), result)


def build_network(
    model: str,
    checkpoint: str | None = None,
    size: int = 224,
    seed: int = 0,
    trust: bool = False,
    device: str | torch.device = 'cpu',
) -> Network:
    """Build a backbone.

    Args:
        model: an arch of OverLoCK, ``timm/NAME``, or a config, whose backbone is taken.
            ``=CHECKPOINT`` may follow an arch or a config, ``=random`` any of them.
        checkpoint: file or URL of weights, if ``model`` does not have it. Without one,
            models of timm get their pretrained weights, if these are at hand or can be
            downloaded, and all others random ones.
        size: side of the images, for models of timm that need to know it.
        seed: of random weights.
        trust: read the checkpoint even if that runs code in it.
        device: where the backbone goes.

    Raises:
        UserError: if there is no such model, or it cannot be built.
        CheckpointError: if the checkpoint cannot be read, or does not fit.
    """
    name, _, given = model.partition('=')
    random = given == 'random'
    checkpoint = None if random else given or checkpoint
    if checkpoint:
        checkpoint = check_file(checkpoint, 'checkpoint')
    torch.manual_seed(seed)
    if name in ARCHS:
        network = _overlock(name, checkpoint, trust)
    elif name.startswith('timm/'):
        if checkpoint:
            raise UserError(
                f'{model}: models of timm take their own pretrained weights; put the model '
                'into a config (`overlock swap --arch`) to give it a checkpoint'
            )
        network = _timm(name.removeprefix('timm/'), size, not random)
    elif Path(name).suffix in _CONFIGS:
        network = _of_config(name, checkpoint, trust, device)
    else:
        raise UserError(
            f'{name} is not a model; give xt, t, s or b, timm/NAME, or a config, which '
            f'ends in {" or ".join(_CONFIGS)}'
        )
    network.backbone.eval().requires_grad_(False).to(device)
    return network


def _weights(checkpoint: str | None) -> str:
    return Path(checkpoint).name if checkpoint else 'random weights'


def _overlock(arch: str, checkpoint: str | None, trust: bool) -> Network:
    kind = None
    if checkpoint:
        _, state = unwrap(read_weights(checkpoint, trust=trust), checkpoint)
        kind = form_of(
            state, 'backbone.' if 'backbone.extra_norm.0.weight' in state else ''
        )
    backbone = OverLoCK(
        arch,
        deploy=kind is not None and kind.deploy,
        context_skip=kind is not None and kind.layout == 'detection',
    )
    if checkpoint:
        load_checkpoint(backbone, checkpoint, trust=trust)
    short = next(name for name in ARCHS if ARCHS[name] is ARCHS[arch])
    return Network(f'OverLoCK-{short.upper()}', _weights(checkpoint), backbone)


def _timm(name: str, size: int, pretrained: bool) -> Network:
    options, cfg = {}, timm.get_pretrained_cfg(name)
    if cfg is not None and cfg.fixed_input_size:
        options['img_size'] = size
    try:
        info = timm.create_model(name, features_only=True, **options).feature_info
        strides = sorted(set(info.reduction()))
        options['out_strides'] = [s for s in strides if s >= 4] or strides
        backbone = TimmBackbone(name, **options)
    except (AssertionError, AttributeError, RuntimeError, TypeError, ValueError) as error:
        raise UserError(
            f'timm/{name} cannot be built as a backbone: {str(error).splitlines()[0]}; '
            'timm.list_models() has the names'
        ) from error
    weights = 'random weights'
    if pretrained and cfg is not None and cfg.has_weights:
        try:
            backbone = TimmBackbone(name, pretrained=True, **options)
            weights = f'pretrained, {backbone.model.pretrained_cfg.get("tag") or "timm"}'
        except (OSError, RuntimeError, ValueError) as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            say(
                f'timm/{name} has random weights, as its own cannot be had ({reason}); '
                f'timm/{name}=random does not try'
            )
    data = resolve_data_config(pretrained_cfg=dict(vars(cfg)) if cfg is not None else {})
    mean, std = (tuple(255 * v for v in data[key]) for key in ('mean', 'std'))
    return Network(name, weights, backbone, normalisation=Normalisation(mean, std))


def _of_config(
    name: str, checkpoint: str | None, trust: bool, device: str | torch.device
) -> Network:
    if checkpoint:
        model = open_model(name, checkpoint, device, trust=trust).model
    else:
        from ...config.edit import without_pretrained
        from ...config.load import build_model, load_config

        cfg = load_config(name)
        without_pretrained(cfg.get('model', {}))
        model = build_model(cfg)
        model.init_weights()
    backbone = backbone_of(model, name)
    first = next((m for m in backbone.modules() if isinstance(m, nn.Conv2d)), None)
    return Network(
        Path(name).stem,
        _weights(checkpoint),
        backbone,
        getattr(backbone, 'in_channels', first.in_channels if first else 3),
        Normalisation.of(model),
    )


def backbone_of(model: nn.Module, name: str) -> nn.Module:
    """The OverLoCK inside of a detector or segmentor, or else its backbone.

    Args:
        model: the model.
        name: what it is called in the error.

    Raises:
        UserError: if it has none.
    """
    parts = dict(model.named_modules())
    own = [part for part in parts.values() if isinstance(part, OverLoCK)]
    own += [part for key, part in parts.items() if key.rpartition('.')[2] == 'backbone']
    if not own:
        raise UserError(f'the model of {name} has no backbone; give another config')
    return own[0]


def image_files(folder: str, count: int) -> list[Path]:
    """Images in a folder and those below it, spread evenly over them in order of names.

    Args:
        folder: the folder, or one image.
        count: how many, at most.

    Raises:
        UserError: if there are none, or no such folder.
    """
    top = Path(folder).expanduser()
    if not top.exists():
        raise UserError(f'{folder} does not exist; give a folder of images')
    found = [top] if top.is_file() else sorted(top.rglob('*'))
    found = [f for f in found if f.suffix.lower() in _SUFFIXES and f.is_file()]
    if not found:
        raise UserError(
            f'{folder} has no images ({", ".join(_SUFFIXES)}); give a folder with some'
        )
    count = min(count, len(found))
    return [found[i * len(found) // count] for i in range(count)]


def read_square(path: Path, size: int) -> np.ndarray:
    """The middle of an image, its short side resized to ``size``: ``(size, size, 3)`` RGB.

    Raises:
        UserError: if it cannot be read.
    """
    try:
        with Image.open(path) as opened:
            image = opened.convert('RGB')
    except OSError as error:
        raise UserError(f'image {path} cannot be read; repair or remove it') from error
    scale = size / min(image.size)
    width, height = (max(size, round(side * scale)) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return np.asarray(image.crop((left, top, left + size, top + size)))
