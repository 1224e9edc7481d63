"""Predicting images with a trained model, without labels."""

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import TRANSFORMS

from ..checkpoint import dataset_meta_of, read_weights, unwrap
from ..checkpoint.kinds import shown
from ..checkpoint.matching import fit
from ..config.data_checks import DataSet, plain
from ..config.edit import (
    class_of,
    inner_datasets,
    loads_labels,
    without_pretrained,
    without_steps,
)
from ..config.load import build_model, load_config, toolbox_of
from ..datasets import ChannelsLast
from ..datasets.survey.classes import make_palette
from ..errors import CheckpointError, UserError
from ..hooks.precision import autocast
from ..models import OverLoCK, fold
from .devices import usable_device, usable_dtype
from .drawing import draw_objects, draw_regions, to_rgb
from .files import check_file
from .messages import say
from .tiling import Tiling, join_labels, join_objects, objects_of

_DTYPES = [np.dtype(t) for t in ('uint8', 'uint16', 'int16', 'float32', 'float64')]


class UnreadableError(Exception):
    """An image that cannot be read, with the reason."""


class Predictor:
    """A detector or segmentor with its weights, its test pipeline and its class names.

    Weights are loaded strictly, and no code of the checkpoint is run. Class names and
    palette come from the checkpoint, else from the data set of the config.

    Args:
        config: config of MMDetection or MMSegmentation, with any backbone; its path or the
            config itself.
        checkpoint: path or URL of the weights.
        device: where the model runs, ``'cuda:1'`` for one; by default the GPU if there is
            one.
        fold: use the backbone's form for inference (:func:`overlock_mm.fold`); by default
            where there is an OverLoCK that can be folded.
        tile: side in pixels of the tiles in which large images are predicted; by default
            images are predicted as a whole. Tiles are not resized: the ``Resize`` of the
            test pipeline is left out.
        overlap: pixels that neighbouring tiles share, at most half a tile. Defaults to an
            eighth of ``tile``.
        dtype: 'bfloat16' or 'float16' for half precision in backbone, neck and the heads
            of segmentors. Defaults to 'float32'.
        cfg_options: values to override, by key.
        trust: read a checkpoint that holds more than plain data, which can run code.

    Attributes:
        model (nn.Module): the model, in evaluation mode.
        cfg (mmengine.Config): its config.
        toolbox (str): 'mmdet' or 'mmseg'.
        classes (tuple[str, ...]): names of the classes.
        palette (list[tuple[int, int, int]]): their colours in RGB.
        device (torch.device): where the model is.
        steps (list): the transforms of the test pipeline after the loading of the image.

    Raises:
        UserError: if the config or an argument cannot be used.
        CheckpointError: if the weights cannot be loaded, or do not fit.

    Examples:
        >>> predictor = Predictor('my_config.py', 'iter_160000.pth')
        >>> result = predictor('street.jpg')
        >>> picture = predictor.draw('street.jpg', result)  # RGB, uint8
    """

    def __init__(
        self,
        config,
        checkpoint: str | Path,
        device: str | torch.device | None = None,
        fold: bool | None = None,
        *,
        tile: int | None = None,
        overlap: int | None = None,
        dtype: str | None = None,
        cfg_options: dict | None = None,
        trust: bool = False,
    ):
        _check_types(config, checkpoint, tile, overlap, cfg_options)
        is_path = isinstance(config, str | os.PathLike)
        self.cfg = load_config(config, cfg_options) if is_path else deepcopy(config)
        if not is_path:
            self.cfg.merge_from_dict(cfg_options or {})
        self.toolbox = toolbox_of(self.cfg)
        self.device = usable_device(device)
        dtype = usable_dtype(dtype, self.device)
        self.tiling = None if tile is None else Tiling.of(tile, overlap)
        if tile is None and overlap is not None:
            raise UserError(f'overlap={overlap} is for tiles, and no tile size is given')
        without_pretrained(self.cfg.get('model'))
        self.model = _built(build_model, self.cfg, 'the model')
        checkpoint = check_file(checkpoint, 'checkpoint')
        meta = _load_strictly(self.model, read_weights(checkpoint, trust=trust), checkpoint)
        self.classes, self.palette = self._names(meta)
        self.model.dataset_meta = dict(
            meta, classes=self.classes, palette=[list(color) for color in self.palette]
        )
        self.model.cfg = self.cfg  # as the toolboxes' own functions expect it
        self.model.to(self.device).eval()
        self._fold(fold)
        if dtype:
            autocast(self.model, dtype)
        self._loading, self.steps = self._pipeline()

    def __call__(self, images, batch_size: int = 1):
        """Predict one image or several.

        Args:
            images: a path or URL, or an array in RGB, ``(H, W, 3)``, with values of 0..255;
                or a list of these. A model of other channels takes them as they are.
            batch_size: images that go through the model at once. Those of different sizes
                go one after the other, so that results do not depend on it.

        Returns:
            The toolbox's data sample, on the CPU: of a segmentor with ``pred_sem_seg``,
            ``(1, H, W)``, of a detector with ``pred_instances``. For a list, a list.

        Raises:
            UserError: if an image cannot be read.
        """
        single = not isinstance(images, list | tuple)
        try:
            loaded = [self.load(image) for image in ([images] if single else images)]
        except UnreadableError as error:
            raise UserError(str(error)) from error
        results = self.predict(loaded, batch_size)
        return results[0] if single else results

    def load(self, image: str | Path | np.ndarray) -> dict:
        """Read an image as the test pipeline does; the first steps of it.

        Args:
            image: as in a call.

        Returns:
            The pipeline's dict, with the image under ``'img'``.

        Raises:
            UnreadableError: if there is no such image, or it cannot be read.
        """
        if isinstance(image, np.ndarray):
            return self._loaded_array(image)
        if isinstance(image, str | os.PathLike):
            return self._loaded_file(str(image))
        raise UserError(
            f'an image is the path of a file or a numpy array, not a {type(image).__name__}'
        )

    def _loaded_array(self, image: np.ndarray) -> dict:
        if image.ndim not in (2, 3) or 0 in image.shape:
            raise UserError(
                f'an image has the shape (H, W) or (H, W, C), this one {image.shape}'
            )
        if image.dtype not in _DTYPES:
            raise UserError(
                f'an image has the dtype {", ".join(map(str, _DTYPES))}, this one '
                f'{image.dtype}; convert it'
            )
        loader = self._loading[0]
        if str(getattr(loader, 'color_type', 'color')).startswith('color'):
            _check_values(image)
            if image.ndim == 2:  # as files in grey are read
                image = image[..., None].repeat(3, axis=2)
            if image.shape[2] != 3:
                raise UserError(
                    f'this model reads images in RGB, (H, W, 3), and this one is '
                    f'{image.shape}; convert it'
                )
        if image.ndim == 3 and image.shape[2] == 3:
            image = image[..., ::-1]  # BGR, as files are read
        if image.dtype == np.float64 or getattr(loader, 'to_float32', False):
            image = image.astype(np.float32)
        image = np.ascontiguousarray(image)
        return self._described(dict(img=image, img_path=''))

    def _loaded_file(self, path: str) -> dict:
        path = os.path.expanduser(path)
        if os.path.isdir(path):
            raise UnreadableError(f'{path} is a folder; give the images in it')
        if '://' not in path and not os.path.isfile(path):
            raise UnreadableError(f'{path} does not exist')
        data = dict(img_path=path, img_id=0)
        try:
            for step in self._loading:
                data = step(data)
            if data is None or min(data['img'].shape[:2]) == 0:
                raise ValueError('it is empty')
        except Exception as error:  # a decoder may raise anything
            raise UnreadableError(f'{path} cannot be read as an image') from error
        return self._described(data)

    def _described(self, data: dict) -> dict:
        shape = data['img'].shape[:2]
        return dict(
            data, img_shape=shape, ori_shape=shape, img_id=0, scale_factor=(1.0, 1.0)
        )

    def predict(self, loaded: Sequence[dict], batch_size: int = 1) -> list:
        """Predict images that :meth:`load` has read.

        Returns:
            One data sample for each, as from a call.
        """
        if not isinstance(batch_size, int) or batch_size < 1:
            raise UserError(f'batch_size={batch_size} must be a whole number from 1')
        if self.tiling is not None:
            return [self._predict_tiles(data, batch_size) for data in loaded]
        return self._predict_batches(loaded, batch_size)

    def _predict_batches(self, loaded: Sequence[dict], batch_size: int) -> list:
        batch, results = [], []
        for data in loaded:
            packed = self._packed(data)
            # padding to one size would change what is predicted
            other_size = batch and batch[0]['inputs'].shape != packed['inputs'].shape
            if len(batch) == batch_size or other_size:
                results += self._run(batch)
                batch = []
            batch.append(packed)
        return results + self._run(batch)

    def _packed(self, data: dict) -> dict:
        data = dict(data)
        for step in self.steps:
            try:
                data = step(data)
            except KeyError as error:
                raise UserError(
                    f'{type(step).__name__} of the test pipeline needs {error}, which an '
                    'image without labels does not have; leave the step out of '
                    'test_dataloader.dataset.pipeline'
                ) from error
        return data

    @torch.no_grad()
    def _run(self, batch: list[dict]) -> list:
        if not batch:
            return []
        return [sample.cpu() for sample in self.model.test_step(pseudo_collate(batch))]

    def _predict_tiles(self, data: dict, batch_size: int):
        """Predict an image tile by tile, with memory for a few tiles at a time."""
        image = data['img']

        def predicted(boxes):
            tiles = [
                self._described(dict(data, img=np.ascontiguousarray(image[y0:y1, x0:x1])))
                for y0, x0, y1, x1 in boxes
            ]
            return self._predict_batches(tiles, batch_size)

        arguments = self.tiling, image.shape[:2], predicted, batch_size
        if self.toolbox == 'mmseg':
            threshold = getattr(_last(self.model.decode_head), 'threshold', None)
            sample = join_labels(*arguments, threshold)
        else:
            sample = join_objects(*arguments)
        sample.set_metainfo(
            {k: data[k] for k in ('img_path', 'img_shape', 'ori_shape', 'scale_factor')}
        )
        return sample

    def draw(
        self,
        image: str | Path | np.ndarray | dict,
        result,
        *,
        score_thr: float = 0.3,
        opacity: float = 0.5,
        hidden: Sequence[str] = (),
        legend: bool | int = True,
    ) -> np.ndarray:
        """Draw a prediction over its image.

        Args:
            image: the image, as in a call, or as :meth:`load` returned it.
            result: what the call returned for it.
            score_thr: objects with a lower score are left out.
            opacity: of the colours of regions and masks, 0 to 1.
            hidden: names of classes that are not drawn.
            legend: list the classes that were found below the picture; a number: in so
                many lines.

        Returns:
            A picture in RGB, uint8. It has the size of the image, small ones are enlarged,
            and the legend is below it.
        """
        hidden = [hidden] if isinstance(hidden, str) else list(hidden)
        unknown = [name for name in hidden if name not in self.classes]
        if unknown:
            raise UserError(
                f'hidden={unknown} are not among the {len(self.classes)} classes of the '
                f'model, such as {", ".join(self.classes[:5])}'
            )
        for name, value in (('score_thr', score_thr), ('opacity', opacity)):
            if not 0 <= value <= 1:
                raise UserError(f'{name}={value} must be within 0..1')
        data = image if isinstance(image, dict) else self.load(image)
        shown = [name not in hidden for name in self.classes]
        options = dict(
            classes=self.classes,
            palette=self.palette,
            shown=shown,
            opacity=opacity,
            legend=bool(legend),
            legend_rows=None if legend is True else legend,
        )
        if 'pred_sem_seg' in result:
            labels = result.pred_sem_seg.data.squeeze(0).numpy()
            _check_size(labels.shape, data)
            return draw_regions(to_rgb(data['img']), labels, **options)
        objects = objects_of(result)
        _check_size(result.get('ori_shape', data['img'].shape[:2]), data)
        objects = objects[objects.scores >= score_thr]
        return draw_objects(to_rgb(data['img']), objects, **options)

    def _names(self, meta: dict) -> tuple[tuple[str, ...], list[tuple[int, int, int]]]:
        """Names and colours, as the checkpoint says, else the data set of the config."""
        count = _number_of_classes(self.model)
        scope = self.cfg.get('default_scope') or self.toolbox
        node = next(
            inner_datasets((self.cfg.get('test_dataloader') or {}).get('dataset')), None
        )
        dataset = DataSet('', '', plain(node), scope).metainfo if node else {}
        for source, found in (('the checkpoint', meta), ('the config', dataset)):
            names = found.get('classes')
            if not names or isinstance(names, str):
                continue
            if count is None or len(names) == count:
                names = tuple(str(name) for name in names)
                return names, _palette(found.get('palette'), len(names))
            say(
                f'{source} names {len(names)} classes, and the model predicts {count}: '
                'these names are not used'
            )
        if count is None:
            raise UserError(
                'neither the checkpoint nor test_dataloader of the config names classes; '
                'give the data set metainfo=dict(classes=(...))'
            )
        return tuple(f'class {i}' for i in range(count)), make_palette(count)

    def _test_dataset(self) -> dict:
        """The config of the (first) data set that a test is run on, without wrappers."""
        loader = self.cfg.get('test_dataloader') or {}
        return next(inner_datasets(loader.get('dataset')), {})

    def _fold(self, wanted: bool | None) -> None:
        if wanted is False:
            return
        if not any(isinstance(module, OverLoCK) for module in self.model.modules()):
            if wanted:
                raise UserError('fold=True: the model has no OverLoCK; leave it out')
            return
        try:
            fold(self.model)
        except ValueError as error:
            if wanted:
                raise UserError(f'the model cannot be folded: {error}') from error
            say(f'The backbone is used as it is, not folded: {error}')

    def _pipeline(self) -> tuple[list, list]:
        """The steps that read an image, and those that make the model's input of it."""
        node = next(
            inner_datasets((self.cfg.get('test_dataloader') or {}).get('dataset')), {}
        )
        pipeline = node.get('pipeline') or self.cfg.get('test_pipeline')
        if not pipeline:
            raise UserError(
                f'{self.cfg.filename} has no test_dataloader.dataset.pipeline and no '
                'test_pipeline, which say how an image is read; add one of them'
            )
        scope = self.cfg.get('default_scope') or self.toolbox
        steps = without_steps(pipeline, lambda step: loads_labels(step, scope))
        names = [getattr(class_of(s, TRANSFORMS, scope), '__name__', '') for s in steps]
        if not names or not names[0].startswith('Load') or not names[-1].startswith('Pack'):
            raise UserError(
                f'the test pipeline is {names}; it must begin with a step that loads an '
                'image and end with one that packs, such as PackSegInputs'
            )
        reading = 1
        while names[reading] in ('LoadImageFromFile', ChannelsLast.__name__):
            reading += 1
        kept = [
            step
            for step, name in zip(steps[reading:], names[reading:], strict=True)
            if self.tiling is None or 'Resize' not in name
        ]
        return tuple(
            _built(lambda part: Compose(part).transforms, part, 'the test pipeline')
            for part in (steps[:reading], kept)
        )


def _check_types(config, checkpoint, tile, overlap, cfg_options) -> None:
    if not isinstance(config, str | os.PathLike | Config):
        raise UserError(
            f'config must be a path or a Config of mmengine, not a {type(config).__name__}'
        )
    if not isinstance(checkpoint, str | os.PathLike):
        raise UserError(
            f'checkpoint must be a path or URL, not a {type(checkpoint).__name__}'
        )
    if not isinstance(cfg_options, dict | None):
        raise UserError(f'cfg_options={cfg_options!r} must be a dict of values by key')
    for name, value in (('tile', tile), ('overlap', overlap)):
        if not isinstance(value, int | None):
            raise UserError(f'{name}={value!r} must be a whole number of pixels')


def _check_values(image: np.ndarray) -> None:
    """Refuse arrays that a model of 8-bit images would take for another image."""
    low, high = image.min(), image.max()
    if not (low >= 0 and high <= 255):  # or it is not finite
        raise UserError(
            f'the values of the image are within {low}..{high}, and the model is for those '
            'of 8-bit files, 0..255; scale them'
        )
    if image.dtype.kind == 'f' and 0 < high <= 1:
        raise UserError(
            'the values of the image are within 0..1, and the model is for those of 8-bit '
            'files, 0..255; multiply them by 255'
        )


def _check_size(size, data: dict) -> None:
    if tuple(size) != tuple(data['img'].shape[:2]):
        raise UserError(
            f'the result is of an image of {size[1]}x{size[0]} pixels, and this one has '
            f'{data["img"].shape[1]}x{data["img"].shape[0]}; give the image that it is of'
        )


def _built(build: Callable, config, what: str):
    """Build a part of a config; registries raise many types of errors."""
    try:
        return build(config)
    except (TypeError, KeyError, ValueError, AttributeError, AssertionError) as error:
        raise UserError(
            f'{what} of the config cannot be built: {type(error).__name__}: '
            f'{" ".join(str(error).split())} (--debug shows where)'
        ) from error


def _load_strictly(model, content, checkpoint: str) -> dict:
    """Load a checkpoint that must fit; what it says of the classes."""
    if isinstance(getattr(model, 'backbone', None), OverLoCK):
        report, state = fit(model, content, checkpoint)
        model.load_state_dict(state, strict=False)
        if not any(name.startswith('backbone.') for name in unwrap(content, checkpoint)[1]):
            raise CheckpointError(
                f'{checkpoint} has a backbone alone, and predictions need the heads too; '
                'give the checkpoint of a trained detector or segmentor'
            )
        return report.dataset_meta
    _, state = unwrap(content, checkpoint)
    own = model.state_dict()
    counters = {k: v for k, v in own.items() if k.endswith('.num_batches_tracked')}
    state = {**counters, **state}
    problems = {
        'missing from it': [k for k in own if k not in state],
        'not in the model': [k for k in state if k not in own],
        'of another shape': [
            k for k, v in own.items() if k in state and state[k].shape != v.shape
        ],
    }
    listed = [f'{len(k)} keys are {what}: {shown(k)}' for what, k in problems.items() if k]
    if listed:
        raise CheckpointError(
            f'{checkpoint} does not fit the model of the config: {"; ".join(listed)}. Give '
            'the checkpoint that was trained with this config'
        )
    model.load_state_dict(state)
    return dataset_meta_of(content)


def _number_of_classes(model) -> int | None:
    """How many classes the heads of a model tell apart."""
    heads = [getattr(model, name, None) for name in ('decode_head', 'bbox_head')]
    heads.append(getattr(getattr(model, 'roi_head', None), 'bbox_head', None))
    for head in heads:
        if isinstance(count := getattr(_last(head), 'num_classes', None), int):
            return count
    return None


def _last(head):
    """The head of which predictions come; cascades have several."""
    return head[-1] if isinstance(head, torch.nn.ModuleList) else head


def _palette(given, count: int) -> list[tuple[int, int, int]]:
    if isinstance(given, str) or given is None or len(given) != count:
        return make_palette(count)  # 'random' is one of the toolbox's
    return [tuple(int(part) for part in color) for color in given]
