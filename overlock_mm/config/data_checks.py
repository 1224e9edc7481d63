"""Checks of a config's data sets: paths, class names, annotations and label maps."""

import json
import mmap
import os
import time
import warnings
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path

from ..errors import UserError

# Files that are looked at in one data set, and the time that their pixels may take.
_SAMPLE = 32
_SECONDS = 5.0
# A COCO file above this size is not parsed: that takes long, and the run does it again.
_LARGE = 50 * 2**20


class Findings:
    """Results of the checks: errors, and warnings about what may be intended."""

    def __init__(self):
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self._coco: dict[str, dict | None] = {}

    def read_coco(self, path: str) -> dict | None:
        """Content of a COCO file, read once; None if it cannot be used."""
        if path not in self._coco:
            try:
                self._coco[path] = _read_coco(path)
            except (ValueError, OSError) as error:
                self._coco[path] = None
                self.errors.append(f'{path} is no COCO file: {error}. Fix or replace it')
        return self._coco[path]

    def raise_errors(self) -> None:
        """Raise :class:`UserError` with all errors, if there are any."""
        if len(self.errors) == 1:
            raise UserError(self.errors[0])
        if self.errors:
            lines = (f'\n  {i}. {error}' for i, error in enumerate(self.errors, 1))
            raise UserError(f'{len(self.errors)} problems with this run:{"".join(lines)}')


def plain(node):
    """A copy of a config as built-in types, so that no check can change the config.

    Where a config inherits from a toolbox, mmengine puts the scope of a module into its
    ``_scope_``; here it is a part of the type.
    """
    if hasattr(node, '_cfg_dict'):
        node = node._cfg_dict
    if isinstance(node, dict):  # items() resolves the objects of pure-Python configs
        node = {key: plain(value) for key, value in node.items()}
        scope = node.pop('_scope_', None)
        if scope and isinstance(node.get('type'), str) and '.' not in node['type']:
            node['type'] = f'{scope}.{node["type"]}'
        return node
    if isinstance(node, list):
        return [plain(value) for value in node]
    if type(node) is tuple:
        return tuple(plain(value) for value in node)
    return node


def nodes(node, key: str, skip: tuple[str, ...] = ()) -> Iterator[tuple[str, dict]]:
    """All dicts in a config with their keys, outermost first.

    Args:
        node: the config, or a part of it.
        key: the key of ``node``.
        skip: keys not to look into.
    """
    if isinstance(node, dict):
        yield key, node
        for name, value in node.items():
            if name not in skip:
                yield from nodes(value, f'{key}.{name}', skip)
    elif isinstance(node, list | tuple):
        for i, value in enumerate(node):
            yield from nodes(value, f'{key}[{i}]', skip)


def type_name(node: dict) -> str:
    """The name of the class that a config builds, without scope or module."""
    kind = node.get('type')
    return getattr(kind, '__name__', str(kind)).split('.')[-1]


def resolve(registry, kind, scope: str | None) -> type | None:
    """The class that ``kind`` stands for, or None if it is not registered."""
    if isinstance(kind, str):
        try:
            with registry.switch_scope_and_registry(scope) as local:
                kind = local.get(kind)
        except Exception:  # noqa: BLE001  what cannot be imported is not known here
            return None
    return kind if isinstance(kind, type) else None


def is_remote(node: dict) -> bool:
    """Whether a data set, transform or evaluator reads through a remote backend."""
    for name in ('backend_args', 'file_client_args'):
        backend = (node.get(name) or {}).get('backend', 'local')
        if backend not in ('local', 'disk'):
            return True
    return False


def join(root: str | None, path: str) -> str:
    """A path below ``root``; as it is, if it is absolute or a URL."""
    return path if '://' in path else os.path.join(root or '', path)


@dataclass
class DataSet:
    """An innermost data set of a data loader."""

    key: str
    loader: str
    cfg: dict
    scope: str | None
    wrappers: list[dict] = field(default_factory=list)
    unexpected: str | None = None  # an argument that the class does not take
    images: int | None = None  # how many there are, if that is known

    @cached_property
    def cls(self) -> type | None:
        from mmengine.registry import DATASETS

        return resolve(DATASETS, self.cfg.get('type'), self.scope)

    def is_a(self, *names: str) -> bool:
        """Whether the class has one of these names, or a base class with it."""
        bases = {c.__name__ for c in self.cls.__mro__} if self.cls else set()
        return bool(bases & set(names))

    @cached_property
    def built(self):
        """The data set as it is before it reads data; None if that cannot be made."""
        from mmengine.dataset import BaseDataset

        if not self.cls or not issubclass(self.cls, BaseDataset) or self.bad_names:
            return None
        arguments = {k: v for k, v in self.cfg.items() if k != 'type'}
        try:
            # without the pipeline: transforms may read files when they are made
            return self.cls(**{**arguments, 'pipeline': [], 'lazy_init': True})
        except TypeError as error:
            for name in arguments:
                if f"unexpected keyword argument '{name}'" in str(error):
                    self.unexpected = name
        except Exception:  # noqa: BLE001  a class may do anything; the config is used then
            pass
        return None

    @cached_property
    def given_names(self):
        """The class names that the config gives, or None."""
        names = (self.cfg.get('metainfo') or {}).get('classes')
        if isinstance(names, str) and os.path.isfile(names):
            return Path(names).read_text().splitlines()
        if isinstance(names, str) and '://' in names:
            return None
        return names

    @cached_property
    def bad_names(self) -> str | None:
        """Error in ``metainfo``, or None."""
        key, metainfo = f'{self.key}.metainfo', self.cfg.get('metainfo') or {}
        names = self.given_names
        if isinstance(names, str):
            return (
                f'{key}.classes is the string {names!r}, and no such file exists. Write a '
                f"tuple: classes=('{names}',), with a comma for a single class too"
            )
        if names is None and 'CLASSES' in metainfo:
            return f'{key}.CLASSES has no effect. Name the key classes'
        own = (getattr(self.cls, 'METAINFO', None) or {}).get('classes')
        if self.is_a('BaseSegDataset', 'BaseCDDataset') and names and own:
            unknown = [name for name in names if name not in own]
            if unknown:
                return (
                    f'{key}.classes has {_near(unknown, own)}, not among the classes of '
                    f'{type_name(self.cfg)}. Fix the names, or use type=BaseSegDataset'
                )
        return None

    @cached_property
    def metainfo(self) -> dict:
        if self.built is not None:
            return self.built.metainfo
        if self.bad_names or self.unexpected:
            return {}
        own = getattr(self.cls, 'METAINFO', None) or {}
        given = {'classes': self.given_names} if self.given_names else {}
        return {**own, **given}

    @property
    def classes(self) -> list[str] | None:
        """Names of the classes; None if they are not known before data is read."""
        names = self.metainfo.get('classes')
        return list(names) if isinstance(names, list | tuple) else None

    @property
    def numbers(self) -> dict[str, int | None]:
        """Numbers of classes that a head must have; None where that is not known."""
        things, stuff = (self.metainfo.get(f'{k}_classes') for k in ('thing', 'stuff'))
        count = len(self.classes if things is None else things)
        stuff = None if stuff is None else len(stuff)
        return dict(num_classes=count, num_things_classes=count, num_stuff_classes=stuff)

    def describe_classes(self) -> str:
        source = '' if self.given_names else f' of {type_name(self.cfg)}'
        return f'{len(self.classes)} classes{source}'

    @cached_property
    def pipeline(self) -> list[dict]:
        """All transforms, those of wrappers and those inside others too."""
        parts = [self.cfg, *self.wrappers]
        found = [
            node for part in parts for _, node in nodes(part.get('pipeline'), 'pipeline')
        ]
        return [node for node in found if 'type' in node]

    @cached_property
    def paths(self) -> dict[str, str]:
        """Local files and folders that are read, by their keys in the config."""
        if is_remote(self.cfg):
            return {}
        if self.built is not None:
            root, ann_file, prefixes = None, self.built.ann_file, self.built.data_prefix
        else:
            root, ann_file = self.cfg.get('data_root'), self.cfg.get('ann_file')
            prefixes = self.cfg.get('data_prefix') or {}
        remote = [type_name(t) for t in self.pipeline if is_remote(t)]
        remote_images = any(not name.startswith('LoadAnn') for name in remote)
        remote_labels = any(name.startswith('LoadAnn') for name in remote)
        paths = {'ann_file': ann_file}
        for name, prefix in prefixes.items():
            if not (remote_images if name.startswith('img') else remote_labels):
                paths[f'data_prefix.{name}'] = prefix
        paths = {k: join(root, p) for k, p in paths.items() if p and isinstance(p, str)}
        return {k: p for k, p in paths.items() if '://' not in p}

    @property
    def is_readable(self) -> bool:
        """Whether there is something local to read, and all of it exists."""
        return bool(self.paths) and all(map(os.path.exists, self.paths.values()))

    def loads_as(self, name: str) -> bool:
        """Whether the data is read by the method of the toolbox's class ``name``."""
        method = getattr(self.cls, 'load_data_list', None)
        return getattr(method, '__qualname__', '') == f'{name}.load_data_list'


def find_datasets(config: dict, loader: str) -> Iterator[DataSet]:
    """The innermost data sets of a data loader, below any wrappers."""

    def search(node, key, wrappers):
        if isinstance(node, list | tuple):
            for i, item in enumerate(node):
                yield from search(item, f'{key}[{i}]', wrappers)
        elif isinstance(node, dict):
            inner = [n for n in ('dataset', 'datasets') if node.get(n) is not None]
            for name in inner:
                yield from search(node[name], f'{key}.{name}', [*wrappers, node])
            if not inner:
                yield DataSet(key, loader, node, config.get('default_scope'), wrappers)

    part = config.get(loader)
    if isinstance(part, dict):
        yield from search(part.get('dataset'), f'{loader}.dataset', [])


def check_paths(config, datasets: list[DataSet], evaluators, found: Findings) -> None:
    """Files and folders must exist."""
    wanted = {}
    for dataset in datasets:
        for name, path in dataset.paths.items():
            wanted.setdefault(path, f'{dataset.key}.{name}')
    for key, node in evaluators:
        path = node.get('ann_file')
        if isinstance(path, str) and '://' not in path and not is_remote(node):
            wanted.setdefault(path, f'{key}.ann_file')
    missing = [path for path in wanted if not os.path.exists(path)]
    if not missing:
        return
    others = f', nor do {", ".join(missing[1:])}' if missing[1:] else ''
    source = config.get('data_source')
    fix = f'Get {source}, or link it there' if source else 'Fix the paths in the config'
    found.errors.append(
        f'{missing[0]} does not exist ({wanted[missing[0]]}){others}. {fix}'
    )


def check_class_names(dataset: DataSet, found: Findings) -> None:
    """Class names must be a list of names that the data set's class can use."""
    key, kind = dataset.key, type_name(dataset.cfg)
    if dataset.bad_names:
        found.errors.append(dataset.bad_names)
    elif dataset.built is None and dataset.unexpected:
        name = dataset.unexpected
        fix = 'Write metainfo=dict(classes=...)' if name == 'classes' else 'Remove it'
        found.errors.append(f'{key}.{name} is not an argument of {kind}. {fix}')
    elif (
        dataset.built is not None
        and dataset.classes is None
        and dataset.loads_as('BaseSegDataset')
        and not dataset.loader.startswith('train')
    ):
        found.errors.append(
            f'{key} has no class names, which the evaluation needs. Set '
            'metainfo=dict(classes=(...)) in it'
        )


def check_coco(dataset: DataSet, found: Findings) -> None:
    """A COCO file must hold images, the classes of the config and what the run reads."""
    if not dataset.is_readable or not dataset.loads_as('CocoDataset'):
        return
    if dataset.classes is None:
        return
    path, key = dataset.paths.get('ann_file'), dataset.key
    coco = path and found.read_coco(path)
    if not coco:
        return
    if not _check_categories(dataset, path, coco, found) or coco['images'] is None:
        return
    images, annotations = coco['images'], coco['annotations']
    for part, required in (
        (images, ('id', 'file_name', 'height', 'width')),
        (annotations, ('id', 'image_id', 'category_id', 'bbox', 'area')),
    ):
        for name in required:
            lacking = [
                item
                for item in part
                if item.get(name) is None or (name == 'bbox' and len(item[name]) != 4)
            ]
            if lacking:
                kind = 'images' if part is images else 'annotations'
                found.errors.append(
                    f'{path} ({key}.ann_file): {len(lacking)} of {len(part)} {kind} have '
                    f'no {name!r}, the first with id {lacking[0].get("id")}. Add it'
                )
                return
    repeated = [i for i, n in Counter(a['id'] for a in annotations).items() if n > 1]
    if repeated:
        found.errors.append(
            f'{path} ({key}.ann_file): ids of annotations are not unique: '
            f'{_listed(repeated)}. Give each annotation its own id'
        )
    known = {category.get('id') for category in coco['categories']}
    unknown = Counter(
        a['category_id'] for a in annotations if a['category_id'] not in known
    )
    if unknown:
        found.errors.append(
            f'{path} ({key}.ann_file): {sum(unknown.values())} of {len(annotations)} '
            f'annotations have category_id {_listed(sorted(unknown, key=str))}, and would '
            f'be left out: the categories have ids {_listed(sorted(known, key=str))}. Fix '
            'the ids'
        )
    of_classes = annotations_of(coco, dataset.classes)
    kept = _kept_images(dataset, images, of_classes)
    if not kept:
        why = (
            f'filter_cfg={dataset.cfg["filter_cfg"]} leaves none of the {len(images)} in '
            f'{path} ({len(of_classes)} of {len(annotations)} annotations are of its '
            'classes)'
            if images
            else f'{path} lists none'
        )
        found.errors.append(f'{key} has 0 images; {why}. Fix ann_file or filter_cfg')
    if not dataset.cfg.get('indices'):
        dataset.images = len(kept)
    if any(t.get('with_mask') for t in dataset.pipeline):
        # what the data set leaves out by itself needs no mask
        used = [a for a in of_classes if a['area'] > 0 and min(a['bbox'][2:]) >= 1]
        used = [a for a in used if not a.get('ignore')]
        check_masks(used, path, f'{key}.ann_file', 'with_mask=True', found)
    folder = dataset.paths.get('data_prefix.img')
    if folder:
        files = [os.path.join(folder, image['file_name']) for image in _sample(images)]
        _check_files(files, f'{key}.data_prefix.img', f'file_name in {path}', found)


def annotations_of(coco: dict, classes: list[str]) -> list[dict]:
    """The annotations of a COCO file that are of these classes."""
    ids = {c.get('id') for c in coco['categories'] if c.get('name') in classes}
    return [a for a in coco['annotations'] if a.get('category_id') in ids]


def _check_categories(dataset: DataSet, path: str, coco: dict, found: Findings) -> bool:
    """Whether a COCO file has all classes."""
    names = [category.get('name') for category in coco['categories']]
    missing = [name for name in dataset.classes if name not in names]
    if missing and dataset.given_names is None:
        found.errors.append(
            f'{dataset.key} has no metainfo.classes, and {len(missing)} of the '
            f'{dataset.describe_classes()} are not categories of {path}. Set '
            f'metainfo=dict(classes=({_listed(names)}))'
        )
    elif missing:
        found.errors.append(
            f'{dataset.key}.metainfo.classes has {_near(missing, names)}, which {path} has '
            'no category of. Fix the names'
        )
    order = [name for name in names if name in dataset.classes]
    if not missing and order != dataset.classes:
        found.warnings.append(
            f'{dataset.key}: classes are in another order than the categories of {path}. '
            'The order in the file counts, so pictures would name classes wrongly; write '
            f'metainfo=dict(classes=({_listed(order, 100)}))'
        )
    return not missing


def _kept_images(
    dataset: DataSet, images: list[dict], of_classes: list[dict]
) -> list[dict]:
    """The images that ``filter_cfg`` leaves."""
    filters = dataset.cfg.get('filter_cfg')
    if not filters or dataset.cfg.get('test_mode'):
        return images
    if filters.get('filter_empty_gt'):
        with_objects = {annotation['image_id'] for annotation in of_classes}
        images = [image for image in images if image['id'] in with_objects]
    smallest = filters.get('min_size', 0)
    return [i for i in images if min(i['width'], i['height']) >= smallest]


def check_masks(annotations, path: str, key: str, reader: str, found: Findings) -> None:
    """Annotations must have masks where something reads them."""
    without = [a for a in annotations if not a.get('segmentation')]
    if without:
        found.errors.append(
            f'{path} ({key}): {len(without)} of {len(annotations)} annotations have no '
            f"'segmentation' (the first: id {without[0].get('id')}), which {reader} reads. "
            "Add masks, or use boxes only: no mask_head, with_mask=False, metric='bbox'"
        )


def _check_files(files: list[str], key: str, other: str, found: Findings) -> None:
    missing = [path for path in files if not os.path.exists(path)]
    if missing:
        found.errors.append(
            f'{missing[0]} does not exist ({len(missing)} of {len(files)} sampled files '
            f'are missing). Fix {key}, or {other}'
        )


def check_segmentation(
    dataset: DataSet, ranges: dict[str, tuple[int, int]], found: Findings
) -> None:
    """A data set of label maps must have images, and labels that the heads know.

    Args:
        dataset: the data set.
        ranges: by the key of what reads the labels, the number of classes and the label
            that is ignored.
        found: what is found goes here.
    """
    if not dataset.is_readable or not dataset.loads_as('BaseSegDataset'):
        return
    if dataset.built is None or 'data_prefix.img_path' not in dataset.paths:
        return
    infos = dataset.built.load_data_list()
    if not dataset.cfg.get('indices'):
        dataset.images = len(infos)
    folder, suffix = dataset.paths['data_prefix.img_path'], dataset.built.img_suffix
    if not infos:
        ann_file = dataset.paths.get('ann_file')
        files = (Path(name).suffix for _, _, names in os.walk(folder) for name in names)
        there = ', '.join(f'{n} of {s}' for s, n in Counter(files).most_common(3))
        found.errors.append(
            f'{dataset.key} has 0 images: {ann_file} is empty. List the names there'
            if ann_file and os.path.isfile(ann_file)
            else f'{dataset.key} has 0 images: no file in {folder} ends in img_suffix='
            f'{suffix!r}; there are {there or "none"}. Set img_suffix or data_prefix'
        )
        return
    sample = _sample(infos)
    images = [info['img_path'] for info in sample]
    _check_files(images, f'{dataset.key}.data_prefix', f'img_suffix={suffix!r}', found)
    loader = _label_loader(dataset)
    if loader is not None and 'seg_map_path' not in dataset.built.data_prefix:
        found.errors.append(
            f'{dataset.key}.data_prefix has no seg_map_path, and the pipeline has '
            'LoadAnnotations. Add the folder of the label maps'
        )
        return
    if loader is None or 'data_prefix.seg_map_path' not in dataset.paths:
        return
    maps = [info['seg_map_path'] for info in sample]
    suffix = f'seg_map_suffix={dataset.built.seg_map_suffix!r}'
    _check_files(maps, f'{dataset.key}.data_prefix', suffix, found)
    sample = [info for info in sample if os.path.exists(info['seg_map_path'])]
    labels = _read_labels(dataset, loader, sample, found)
    if labels:
        _check_labels(dataset, labels, ranges, found)


def _label_loader(dataset: DataSet):
    """The transform that loads label maps.

    None if there is none, or if transforms that are not the toolbox's may change labels.
    """
    from mmengine.registry import TRANSFORMS

    loader = None
    for node in dataset.pipeline:
        cls = resolve(TRANSFORMS, node['type'], dataset.scope)
        module = getattr(cls, '__module__', '').split('.')[0]
        if module not in ('mmcv', 'mmseg', 'mmdet', 'mmengine'):
            return None
        if cls.__module__.startswith('mmseg') and cls.__name__ == 'LoadAnnotations':
            with warnings.catch_warnings():  # of deprecation; it comes again in the run
                warnings.simplefilter('ignore')
                loader = cls(**{k: v for k, v in node.items() if k != 'type'})
    return loader


def _read_labels(dataset, loader, sample, found: Findings) -> dict[int, list[str]] | None:
    """The label maps that hold each label, after loading as the run loads them."""
    import cv2

    files, stop = {}, time.monotonic() + _SECONDS
    for info in sample:
        path = info['seg_map_path']
        try:
            labels = loader(dict(info, seg_fields=[]))['gt_seg_map']
        except AssertionError:  # its own check
            found.errors.append(
                f'{dataset.key}: LoadAnnotations has reduce_zero_label='
                f'{loader.reduce_zero_label}, the data set '
                f'reduce_zero_label={dataset.built.reduce_zero_label}. Set both alike'
            )
            return None
        except Exception as error:  # noqa: BLE001  decoders raise what they like
            found.errors.append(f'{path} cannot be read ({error}). Replace the file')
            return None
        if labels.ndim != 2:
            found.errors.append(
                f'{path} has {labels.shape[-1]} channels, and a label map has one: the '
                'index of the class at each pixel. Convert the colours to indices'
            )
            return None
        counts = cv2.calcHist([labels], [0], None, [256], [0, 256]).ravel()
        for label in counts.nonzero()[0].tolist():
            files.setdefault(label, []).append(path)
        if time.monotonic() > stop:
            break
    return files


def _check_labels(dataset, files: dict[int, list[str]], ranges, found: Findings) -> None:
    by_range = {}
    for key, numbers in ranges.items():
        by_range.setdefault(numbers, []).append(key)
    for (count, ignored), keys in by_range.items():
        wrong = [label for label in files if label >= count and label != ignored]
        if wrong:
            one, training = min(wrong), dataset.loader.startswith('train')
            if len(wrong) > 1:
                fixes = ['add the classes that are missing']
            elif training:
                fixes = [
                    f'to ignore {one} set ignore_index={one} in heads and evaluators and '
                    f'seg_pad_val={one} in data_preprocessor and transforms'
                ]
            else:
                fixes = [f'to ignore {one} set ignore_index={one} there']
            if wrong == [count] and 0 in files and not dataset.built.reduce_zero_label:
                fixes.append('if 0 is no class, set reduce_zero_label=True')
            (found.errors if training else found.warnings).append(
                f'{files[one][0]} has label {_listed(sorted(wrong))}. Allowed by '
                f'{" and ".join(keys)}: 0 to {count - 1}, and ignore_index={ignored}. Fix '
                f'the label maps of {dataset.key}, or {", or ".join(fixes)}'
            )
        elif count > 1 and len(files) == 2 and 0 in files and ignored in files:
            found.warnings.append(
                f'{dataset.key}: the label maps looked at hold 0 and {ignored} only, and '
                f'ignore_index={ignored} in {" and ".join(keys)}. If {ignored} marks a '
                'class, write its index there'
            )


def _read_coco(path: str) -> dict:
    """Categories, images and annotations; of a large file only the categories."""
    if os.path.getsize(path) > _LARGE:
        return dict(categories=_large_categories(path), images=None, annotations=None)
    with open(path, 'rb') as file:
        data = json.load(file)
    if not isinstance(data, dict):
        raise ValueError('it holds no dict')
    parts = {}
    for name in ('categories', 'images', 'annotations'):
        # unlabelled sets have no annotations
        parts[name] = data.get(name, [] if name == 'annotations' else None)
        if not isinstance(parts[name], list):
            raise ValueError(f'it has no list of {name}')
    return parts


def _large_categories(path: str) -> list[dict]:
    """The categories of a COCO file, found without parsing what else is in it."""
    with (
        open(path, 'rb') as file,
        mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data,
    ):
        at = data.rfind(b'"categories"')  # most writers put them last: this is fast
        at = data.find(b'[', at) if at >= 0 else len(data)
        text = data[at : at + 2**24].decode(errors='replace')
    categories = json.JSONDecoder().raw_decode(text)[0]
    if not all(isinstance(c, dict) and 'name' in c for c in categories):
        raise ValueError('its categories have no names')
    return categories


def _sample(items: list) -> list:
    """Up to ``_SAMPLE`` items, spread evenly."""
    count = min(_SAMPLE, len(items))
    return [items[i * len(items) // count] for i in range(count)]


def _listed(values, most: int = 8) -> str:
    values = [repr(value) for value in values]
    return ', '.join(values[:most]) + ', ...' * (len(values) > most)


def _near(names: list[str], known: list[str]) -> str:
    """Names, each with the known one that it is nearest to."""
    texts = []
    for name in names[:4]:
        near = get_close_matches(str(name), [str(k) for k in known], 1)
        texts.append(f'{name!r} (nearest: {near[0]!r})' if near else repr(name))
    return ', '.join(texts) + (f' and {len(names) - 4} more' if len(names) > 4 else '')
