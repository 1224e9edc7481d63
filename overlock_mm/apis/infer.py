"""Predicting files: images, folders, videos."""

import glob
import json
import os
import traceback
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image
from tqdm import tqdm

from ..datasets.survey.images import SUFFIXES, files_below
from ..errors import UserError
from .drawing import decoded
from .inference import Predictor, UnreadableError
from .messages import debugging
from .tiling import objects_of

VIDEOS = ('.mp4', '.avi', '.mov', '.mkv', '.webm', '.m4v', '.mpg', '.mpeg')
# What can be saved, and by which toolbox.
KINDS = dict(
    pictures='the predictions drawn over the images',
    png='label maps: PNG files with the index of the class as value and the palette '
    '(segmentors)',
    json='predictions.json: objects, or the share of each class, by image',
    coco='coco.json: images, categories and scored annotations, which pycocotools reads '
    '(detectors)',
)
_USUAL = dict(mmseg=('pictures', 'png'), mmdet=('pictures', 'coco'))
_IMPOSSIBLE = dict(mmseg='coco', mmdet='png')
_VIDEO_LEGEND = 2  # lines: all frames have the same size


class Summary(NamedTuple):
    """What became of the inputs."""

    images: int  # that were predicted, frames of videos included
    failed: tuple[str, ...]  # what could not be read or predicted, with the reason
    left_out: Counter  # files in folders that are no images or videos, by suffix
    out: Path

    def __str__(self):
        text = f'Predicted {self.images} images; the results are in {self.out}.'
        if self.left_out:
            listed = ', '.join(f'{n} of {s}' for s, n in self.left_out.most_common(5))
            text += f' Other files in the folders were left out: {listed}.'
        if self.failed:
            text += f' {len(self.failed)} failed:'
            text += ''.join(f'\n  {reason}' for reason in self.failed)
        return text


def infer(
    config: str | Path,
    checkpoint: str | Path,
    inputs: Sequence[str | Path],
    out: str | Path = 'predictions',
    *,
    device: str | None = None,
    batch_size: int = 1,
    score_thr: float = 0.3,
    fold: bool | None = None,
    tile: int | None = None,
    overlap: int | None = None,
    dtype: str | None = None,
    save: Sequence[str] | None = None,
    cfg_options: dict | None = None,
    trust: bool = False,
    force: bool = False,
) -> Summary:
    """Predict images, folders of images and videos, and save what was asked for.

    Results keep the folders that the images are in: ``a/1.jpg`` and ``b/1.jpg`` give
    ``pictures/a/1.png`` and ``pictures/b/1.png``. Files that cannot be read are left out
    and named in the summary.

    Args:
        config: config of MMDetection or MMSegmentation.
        checkpoint: path or URL of the weights.
        inputs: paths of images or videos, patterns such as ``'photos/*.jpg'``, and
            folders, in which images and videos are looked for at any depth.
        out: folder for the results.
        device: see :class:`Predictor`.
        batch_size: images, frames or tiles that go through the model at once.
        score_thr: objects with a lower score are neither drawn nor saved.
        fold: see :class:`Predictor`.
        tile: see :class:`Predictor`.
        overlap: see :class:`Predictor`.
        dtype: see :class:`Predictor`.
        save: some of 'pictures', 'png', 'json' and 'coco', see ``KINDS``. By default
            pictures and label maps of a segmentor, pictures and coco of a detector.
        cfg_options: values to override, by key.
        trust: read a checkpoint that can run code.
        force: write into a folder that has files.

    Returns:
        What was done.

    Raises:
        UserError: if an argument cannot be used, or there is nothing to predict.
        CheckpointError: if the weights cannot be loaded, or do not fit.
    """
    for kind in save or ():
        if kind not in KINDS:
            raise UserError(f'--save {kind} is not known; use some of {", ".join(KINDS)}')
    if batch_size < 1:
        raise UserError(f'--batch {batch_size} must be at least 1')
    if not 0 <= score_thr <= 1:
        raise UserError(f'--score-thr {score_thr} must be within 0..1')
    out = _checked_folder(out, force)
    files, failed, left_out = find_inputs(inputs, out)
    predictor = Predictor(
        config,
        checkpoint,
        device,
        fold,
        tile=tile,
        overlap=overlap,
        dtype=dtype,
        cfg_options=cfg_options,
        trust=trust,
    )
    kinds = _checked_kinds(save, predictor.toolbox)
    writer = ResultWriter(predictor, out, kinds, score_thr)
    names = output_names(files)
    images = [path for path in files if not _is_video(path)]
    videos = [path for path in files if _is_video(path)]
    try:
        with tqdm(total=len(images), unit=' images', disable=not images) as bar:
            for part in _parts(images, batch_size):
                loaded = []
                for path in part:
                    try:
                        loaded.append((path, predictor.load(path)))
                    except UnreadableError as error:
                        failed.append(str(error))
                for path, data, result in _predicted(predictor, loaded, batch_size, failed):
                    writer.write(names[path], path, data, result)
                bar.update(len(part))
        for path in videos:
            try:
                _predict_video(predictor, writer, path, names[path], batch_size, failed)
            except UnreadableError as error:
                failed.append(str(error))
    finally:  # an interrupted run keeps what it has
        writer.close()
    return Summary(writer.count, tuple(failed), left_out, out)


def _predicted(predictor, loaded: list, batch_size: int, failed: list[str]) -> Iterator:
    """Paths, images and results; what the model refuses is added to ``failed``."""
    try:
        results = predictor.predict([data for _, data in loaded], batch_size)
    except UserError:
        raise
    except Exception as error:  # a model may raise anything on an image of odd sides
        if len(loaded) > 1:  # find out which
            for item in loaded:
                yield from _predicted(predictor, [item], 1, failed)
            return
        if debugging():
            traceback.print_exc()
        path, data = loaded[0]
        height, width = data['img'].shape[:2]
        reason = (str(error).splitlines() or [''])[0]
        failed.append(
            f'{path} ({width}x{height} pixels) cannot be predicted: '
            f'{type(error).__name__}: {reason}'
        )
        return
    for (path, data), result in zip(loaded, results, strict=True):
        yield path, data, result


def find_inputs(
    inputs: Sequence[str | Path], out: Path
) -> tuple[list[str], list[str], Counter]:
    """The image and video files that are meant.

    Args:
        inputs: files, patterns and folders.
        out: folder of the results, which are not inputs.

    Returns:
        Paths, each once; for each input that leads to none, the reason; and how many
        other files the folders have, by suffix.

    Raises:
        UserError: if there is no file at all, or ``out`` is one of the folders.
    """
    files, problems, others = {}, [], Counter()
    results = os.path.realpath(out)
    for given in map(str, inputs):
        path = os.path.expanduser(given)
        if os.path.isdir(path):
            if os.path.realpath(path) == results:
                raise UserError(
                    f'{given} is the folder of the images and of the results; give another '
                    'one with --out'
                )
            found, reason = _files_below(path, results, others)
        elif os.path.isfile(path):
            found, reason = [path], ''
        else:
            matches = sorted(glob.glob(path, recursive=True))
            found = [p for p in matches if os.path.isfile(p) and not _is_in(p, results)]
            reason = f'{given} does not exist, and no file matches it as a pattern'
        found = [os.path.normpath(name) for name in found]
        if not found:
            problems.append(reason)
        files.update(dict.fromkeys(found))
    if not files:
        raise UserError(f'nothing to predict: {"; ".join(problems) or "no input is given"}')
    return list(files), problems, others


def _files_below(folder: str, results: str, others: Counter) -> tuple[list[str], str]:
    """Images and videos below a folder, and what to say if there are none."""
    found, there = [], Counter()
    for path in sorted(files_below(Path(folder))):
        if _is_in(path, results):
            continue
        if path.suffix.lower() in (*SUFFIXES, *VIDEOS):
            found.append(str(path))
        else:
            there[path.suffix or path.name] += 1
    others.update(there)
    listed = ', '.join(f'{n} of {s}' for s, n in there.most_common(3)) or 'no files'
    return found, f'{folder} has no images or videos; there are {listed}'


def _is_in(path: str | Path, folder: str) -> bool:
    return os.path.realpath(path).startswith(folder + os.sep)


def output_names(paths: Sequence[str]) -> dict[str, str]:
    """A name for the results of each file: its path below the folder of all, no suffix.

    Files that differ in their suffix alone keep it.
    """
    absolute = {path: os.path.abspath(path) for path in paths}
    top = os.path.commonpath([os.path.dirname(path) for path in absolute.values()])
    stems = {p: os.path.splitext(os.path.relpath(a, top))[0] for p, a in absolute.items()}
    taken = {}
    for path, stem in stems.items():
        taken.setdefault(stem.lower(), []).append(path)
    return {
        path: stem
        if len(taken[stem.lower()]) == 1
        else os.path.relpath(absolute[path], top)
        for path, stem in stems.items()
    }


def _is_video(path: str) -> bool:
    return os.path.splitext(path)[1].lower() in VIDEOS


def _parts(items: list, size: int) -> Iterator[list]:
    for i in range(0, len(items), max(size, 1)):
        yield items[i : i + max(size, 1)]


def _checked_folder(out: str | Path, force: bool) -> Path:
    out = Path(out).expanduser()
    if out.exists() and not out.is_dir():
        raise UserError(f'{out} is a file; give a folder for the results')
    if out.is_dir() and any(out.iterdir()) and not force:
        raise UserError(
            f'{out} has files already; give another folder with --out, or --force to write '
            'into it'
        )
    parent = next(p for p in (out, *out.absolute().parents) if p.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK):
        raise UserError(f'{out} cannot be written to; give another folder with --out')
    return out


def _checked_kinds(save: Sequence[str] | None, toolbox: str) -> tuple[str, ...]:
    kinds = tuple(dict.fromkeys(save or _USUAL[toolbox]))
    if _IMPOSSIBLE[toolbox] in kinds:
        kind, what = (
            ('coco', 'a segmentor predicts no objects; use png or json')
            if toolbox == 'mmseg'
            else ('png', 'a detector predicts no label map; use coco or json')
        )
        raise UserError(f'--save {kind}: {what}')
    return kinds


class ResultWriter:
    """Saves results as they come, and at the end what lists them all."""

    def __init__(
        self, predictor: Predictor, out: Path, kinds: tuple[str, ...], score_thr: float
    ):
        self.predictor, self.out, self.kinds = predictor, out, kinds
        self.score_thr = score_thr
        self.count = 0
        self.entries: list[dict] = []
        self.images: list[dict] = []
        self.annotations: list[dict] = []

    def write(
        self, name: str, path: str, data: dict, result, video: '_Video | None' = None
    ) -> None:
        """Save the prediction of an image, or of a frame of a video."""
        self.count += 1
        height, width = data['img'].shape[:2]
        if 'pictures' in self.kinds:
            drawn = self.predictor.draw(
                data,
                result,
                score_thr=self.score_thr,
                legend=True if video is None else _VIDEO_LEGEND,
            )
            if video is None:
                _save(drawn, self.out / 'pictures' / f'{name}.png')
            else:
                video.write(drawn)
        if 'png' in self.kinds:
            self._save_label_map(result, self.out / 'label_maps' / f'{name}.png')
        entry = dict(file=path, name=name, width=width, height=height)
        if self.predictor.toolbox == 'mmseg':
            if 'json' in self.kinds:
                self.entries.append(dict(entry, classes=self._shares(result)))
            return
        if not {'json', 'coco'} & set(self.kinds):
            return
        objects = self._objects(result)
        names = self.predictor.classes
        if 'json' in self.kinds:
            listed = [dict({'class': names[o['category_id'] - 1]}, **o) for o in objects]
            self.entries.append(dict(entry, objects=listed))
        self.images.append(dict(id=self.count, file_name=path, width=width, height=height))
        for number, found in enumerate(objects, len(self.annotations) + 1):
            self.annotations.append(dict(found, id=number, image_id=self.count, iscrowd=0))

    def _save_label_map(self, result, path: Path) -> None:
        labels = result.pred_sem_seg.data.squeeze(0).numpy()
        if len(self.predictor.classes) > 256:
            image = Image.fromarray(labels.astype(np.uint16))
        else:
            image = Image.fromarray(labels.astype(np.uint8), mode='P')
            image.putpalette([part for color in self.predictor.palette for part in color])
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)

    def _shares(self, result) -> dict[str, float]:
        labels = result.pred_sem_seg.data.numpy().astype(np.int64).ravel()
        counts = np.bincount(labels, minlength=len(self.predictor.classes))
        shares = {
            name: round(count / labels.size, 6)
            for name, count in zip(self.predictor.classes, counts.tolist(), strict=False)
            if count
        }
        return dict(sorted(shares.items(), key=lambda item: -item[1]))

    def _objects(self, result) -> list[dict]:
        from pycocotools import mask as coco_mask

        found = objects_of(result)
        objects = []
        for i in np.flatnonzero(found.scores.numpy() >= self.score_thr):
            x0, y0, x1, y1 = found.bboxes[i].tolist()
            entry = dict(
                category_id=int(found.labels[i]) + 1,
                score=round(float(found.scores[i]), 5),
                bbox=[round(v, 2) for v in (x0, y0, x1 - x0, y1 - y0)],
                area=round((x1 - x0) * (y1 - y0), 2),
            )
            if 'masks' in found:
                mask = found.masks[i]
                if not isinstance(mask, dict):
                    mask = coco_mask.encode(np.asfortranarray(decoded(mask), np.uint8))
                entry['area'] = float(coco_mask.area(mask))
                entry['segmentation'] = dict(
                    size=list(mask['size']), counts=mask['counts'].decode()
                )
            objects.append(entry)
        return objects

    def close(self) -> None:
        """Write the files that list everything, if there is anything."""
        if not self.count:
            return
        names, palette = self.predictor.classes, self.predictor.palette
        if 'json' in self.kinds:
            content = dict(classes=names, palette=palette, images=self.entries)
            _write_json(content, self.out / 'predictions.json')
        if 'coco' in self.kinds:
            categories = [dict(id=i, name=name) for i, name in enumerate(names, 1)]
            content = dict(
                images=self.images, categories=categories, annotations=self.annotations
            )
            _write_json(content, self.out / 'coco.json')
        if 'png' in self.kinds:
            _write_json(dict(enumerate(names)), self.out / 'label_maps/classes.json')


def _save(picture: np.ndarray, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(picture).save(path)


def _write_json(content: dict, path: Path) -> None:
    """Write a dict, with a line for each item of its lists of dicts."""
    parts = []
    for key, value in content.items():
        if value and isinstance(value, list) and isinstance(value[0], dict):
            text = '[\n' + ',\n'.join(map(_json, value)) + '\n]'
        else:
            text = _json(value)
        parts.append(f'{_json(str(key))}: {text}')
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text('{\n' + ',\n'.join(parts) + '\n}\n', encoding='utf-8')


def _json(value) -> str:
    return json.dumps(value, ensure_ascii=False)


def _predict_video(
    predictor,
    writer: ResultWriter,
    path: str,
    name: str,
    batch_size: int,
    failed: list[str],
) -> None:
    """Predict the frames of a video; pictures become a video, too."""
    reader = cv2.VideoCapture(path)
    total = int(reader.get(cv2.CAP_PROP_FRAME_COUNT))
    rate = reader.get(cv2.CAP_PROP_FPS) or 25.0
    number = 0
    video = _Video(writer.out / 'pictures' / f'{name}.mp4', rate)
    try:
        with tqdm(desc=name, total=max(total, 0) or None, unit=' images') as bar:
            for frames in _frames(reader, batch_size):
                numbers = range(number + 1, number + 1 + len(frames))
                loaded = [
                    (f'{path}#{i}', predictor.load(frame))
                    for i, frame in zip(numbers, frames, strict=True)
                ]
                for frame, data, result in _predicted(
                    predictor, loaded, batch_size, failed
                ):
                    place = f'{name}/{int(frame.rpartition("#")[2]):06d}'
                    writer.write(place, frame, data, result, video)
                number += len(frames)
                bar.update(len(frames))
    finally:
        reader.release()
        video.close()
    if number == 0:
        raise UnreadableError(f'{path} cannot be read as a video')


def _frames(reader, count: int) -> Iterator[list[np.ndarray]]:
    """The frames of a video in RGB, some at a time."""
    frames = []
    while True:
        is_there, frame = reader.read()
        if is_there:
            frames.append(frame[..., ::-1])
        if frames and (len(frames) == count or not is_there):
            yield frames
            frames = []
        if not is_there:
            return


class _Video:
    """Writes drawn frames, which all have the size of the first one."""

    def __init__(self, path: Path, rate: float):
        self.path, self.rate = path, rate
        self.file, self.size = None, (0, 0)

    def write(self, picture: np.ndarray) -> None:
        if self.file is None:
            # encoders want even sides
            height, width = (side + side % 2 for side in picture.shape[:2])
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self.size = width, height
            codec = cv2.VideoWriter_fourcc(*'mp4v')
            self.file = cv2.VideoWriter(str(self.path), codec, self.rate, self.size)
            if not self.file.isOpened():
                raise UserError(
                    f'{self.path} cannot be written: this OpenCV has no encoder for MP4; '
                    'leave pictures out of --save'
                )
        frame = np.zeros((*self.size[::-1], 3), np.uint8)
        frame[: picture.shape[0], : picture.shape[1]] = picture
        self.file.write(np.ascontiguousarray(frame[..., ::-1]))

    def close(self) -> None:
        if self.file is not None:
            self.file.release()
