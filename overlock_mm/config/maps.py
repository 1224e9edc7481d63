"""The maps of a backbone, and the necks and heads of a model that read them."""

import copy
from collections.abc import Iterator
from typing import NamedTuple

import torch
from mmengine.registry import MODELS

from ..errors import UserError

# What makes other convolutions of a backbone than usual, with as many channels.
CHANGED_CONVS = ('dcn', 'stage_with_dcn', 'plugins')
# Backbones that cut the image into one grid of tokens, and necks of MMSegmentation that
# make a pyramid of it, with the option that gives the scales and its default.
_ONE_GRID = ('VisionTransformer', 'BEiT', 'MAE', 'ViT')
_GRID_NECKS = dict(
    Feature2Pyramid=('rescales', (4, 2, 1, 0.5)), MultiLevelNeck=('scales', (0.5, 1, 2, 4))
)
_HEADS = ('decode_head', 'auxiliary_head', 'panoptic_head', 'track_head', 'bbox_head')


class Map(NamedTuple):
    """A map that a backbone returns."""

    channels: int
    stride: int


def kind(node: dict) -> str:
    """The name of the class of a config, without its scope or module."""
    given = node.get('type')
    name = given if isinstance(given, str) else getattr(given, '__name__', str(given))
    return name.rpartition('.')[2]


def maps_of(backbone: dict) -> list[Map]:
    """Channels and strides of the maps of a backbone, found by running it without values.

    Args:
        backbone: its config.

    Raises:
        UserError: if it cannot be built or run alone, or does not return maps.
    """
    left_out = ('init_cfg', 'pretrained', *CHANGED_CONVS)
    cfg = {k: v for k, v in backbone.items() if k not in left_out}
    side = cfg.get('img_size') or 256  # some transformers take no other
    side = side if isinstance(side, int) else side[0]
    image = torch.zeros(2, cfg.get('in_channels', 3), side, side, device='meta')
    # Some backbones look at values while they are built, and some only run in training.
    for device, training in (('meta', False), ('cpu', False), ('cpu', True)):
        try:
            with torch.no_grad():
                with torch.device(device):
                    module = MODELS.build(copy.deepcopy(cfg))
                if hasattr(module, 'out_strides'):  # ours, which say what they return
                    return list(map(Map, module.out_channels, module.out_strides))
                module.to('meta').train(training)
                maps = module(image)
            break
        except Exception as error:  # it is not our code: anything may go wrong
            last = error
    else:
        raise UserError(
            f'the backbone {kind(backbone)} cannot be built and run alone: '
            f'{type(last).__name__}: {last}'
        ) from last
    listed = isinstance(maps, list | tuple)
    if not listed or not all(isinstance(m, torch.Tensor) and m.ndim == 4 for m in maps):
        raise UserError(f'the backbone {kind(backbone)} does not return a tuple of maps')
    return [Map(m.shape[1], round(side / m.shape[2])) for m in maps]


class Reader:
    """A neck or a head that reads maps of the backbone.

    Args:
        node: its config, with ``in_channels``.
        key: where it is in the model.
        model: the config that has both it and the backbone.
    """

    def __init__(self, node: dict, key: str, model: dict):
        self.node, self.key, self.model = node, key, model

    def indices(self, count: int) -> list[int]:
        """Which of ``count`` maps it reads."""
        first = [0] if 'c1_in_channels' in self.node else []
        return first + self._indices_of_channels(count)

    def _indices_of_channels(self, count: int) -> list[int]:
        """The maps that ``in_channels`` is about, one for each of its numbers."""
        index = self.node.get('in_index')
        if index is None:
            return list(range(count)) if self._takes_many() else [count - 1]
        return [i % count for i in (index if isinstance(index, list | tuple) else [index])]

    def _takes_many(self) -> bool:
        return isinstance(self.node['in_channels'], list | tuple)

    def check(self, maps: list[Map]) -> None:
        """Raise :class:`UserError` if its channels are not those of the maps it reads."""
        given = self.node['in_channels']
        expected = [maps[i].channels for i in self._indices_of_channels(len(maps))]
        if list(given if self._takes_many() else [given]) not in (expected, expected[::-1]):
            raise UserError(
                f'{self.key}.in_channels is {given}, and the maps that it reads have '
                f'{expected} channels: what it reads is not clear. Change this config by '
                'hand'
            )

    def adapt(self, old: list[Map], new: dict[int, Map]) -> list[str]:
        """Give it the channels of the new maps.

        Args:
            old: maps of the old backbone.
            new: new maps by the index of the old ones; the backbone returns them in this
                order.

        Returns:
            What was changed, a line each.
        """
        node, before, many = self.node, self.node['in_channels'], self._takes_many()
        chosen = self._indices_of_channels(len(old))
        channels = [new[i].channels for i in chosen]
        if many and list(before) != [old[i].channels for i in chosen]:
            channels.reverse()  # from the deepest map on, as YOLOv3's neck
        node['in_channels'] = type(before)(channels) if many else channels[0]
        notes = [f'{self.key}.in_channels: {before} -> {node["in_channels"]}']
        if 'c1_in_channels' in node:
            node['c1_in_channels'] = new[0].channels
            notes.append(f'{self.key}.c1_in_channels: {new[0].channels}')
        places = [list(new).index(i) for i in chosen]
        if node.get('in_index') is not None and places != chosen:
            listed = isinstance(node['in_index'], list | tuple)
            node['in_index'] = places if listed else places[0]
            notes.append(f'{self.key}.in_index: {node["in_index"]}')
        return notes + self._adapt_what_follows()

    def _adapt_what_follows(self) -> list[str]:
        """Change the channels of maps that a neck passes on as they are."""
        new, notes = self.node['in_channels'], []
        if kind(self.node) == 'SSDNeck':
            head = self.model['bbox_head']
            for part, key in ((self.node, 'out_channels'), (head, 'in_channels')):
                part[key] = (*new, *part[key][len(new) :])
            notes.append(f'bbox_head.in_channels: {head["in_channels"]}')
        elif kind(self.node) == 'JPU':
            for head in heads(self.model):
                index = head.node.get('in_index')
                if isinstance(index, int) and 0 <= index < len(new) - 1:
                    head.node['in_channels'] = new[index]
                    notes.append(f'{head.key}.in_channels: {new[index]}')
        return notes


def readers(model: dict) -> list[Reader]:
    """All that reads the backbone: the first neck, or the heads if there is no neck."""
    neck = model.get('neck')
    if not neck:
        return heads(model)
    first, key = (neck, 'neck') if isinstance(neck, dict) else (neck[0], 'neck[0]')
    return [Reader(first, key, model)] if 'in_channels' in first else []


def heads(model: dict) -> list[Reader]:
    """The heads of a model that have input channels, also those inside of other heads."""
    found = []
    for name in _HEADS:
        for key, node in _nested(model.get(name), name):
            outermost = key == name or key.startswith(f'{name}[') and '.' not in key
            if 'in_channels' in node and ('in_index' in node or outermost):
                found.append(Reader(node, key, model))
    return found


def _nested(node, key: str) -> Iterator[tuple[str, dict]]:
    if isinstance(node, dict):
        yield key, node
        for name, value in node.items():
            yield from _nested(value, f'{key}.{name}')
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from _nested(value, f'{key}[{i}]')


def without_grid_neck(model: dict, maps: list[Map]) -> list[Map] | None:
    """Remove a neck that makes a pyramid from one grid of tokens.

    Args:
        model: the config that has the backbone, changed in place.
        maps: maps of the backbone.

    Returns:
        The maps that the neck made; None, and no change, if there is no such neck.
    """
    neck = model.get('neck')
    name = kind(neck) if isinstance(neck, dict) else None
    if name not in _GRID_NECKS or len({m.stride for m in maps}) > 1:
        return None
    option, default = _GRID_NECKS[name]
    scales = neck.get(option, default)
    channels = neck.get('out_channels', maps[0].channels)
    model['neck'] = None
    return [Map(channels, round(m.stride / s)) for m, s in zip(maps, scales, strict=False)]


def is_one_grid(backbone: dict, maps: list[Map]) -> bool:
    """Whether all maps are of one size, as those of plain vision transformers."""
    return kind(backbone) in _ONE_GRID or len(maps) > 1 and len(set(maps)) == 1
