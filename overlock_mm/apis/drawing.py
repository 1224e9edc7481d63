"""Drawing predictions over images, readable at any size of the image."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

# A picture whose longer side is shorter than this is enlarged by a whole factor.
_SMALLEST = 480
_MOST_IN_LEGEND = 40


class _Style(NamedTuple):
    """Sizes in pixels that suit a picture."""

    line: int
    font: ImageFont.FreeTypeFont
    gap: int

    @classmethod
    def of(cls, picture: np.ndarray) -> '_Style':
        height, width = picture.shape[:2]
        size = max(11, round((height * width) ** 0.5 / 42))
        return cls(max(1, round((height + width) / 900)), _font(size), max(2, size // 4))


@lru_cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    import matplotlib

    path = Path(matplotlib.get_data_path(), 'fonts/ttf/DejaVuSans.ttf')
    return ImageFont.truetype(str(path), size)


def to_rgb(image: np.ndarray) -> np.ndarray:
    """A picture of any image that a pipeline has read.

    Args:
        image: ``(H, W)`` or ``(H, W, C)`` of any dtype; three channels are in BGR.

    Returns:
        ``(H, W, 3)`` in uint8 and RGB. Values of other dtypes are scaled from the 2nd to
        the 98th percentile; of more channels the first three are red, green and blue.
    """
    image = image[..., None] if image.ndim == 2 else image
    is_bgr = image.shape[2] == 3
    image = image[..., :3] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)
    if image.dtype != np.uint8:
        values = image.astype(np.float32)
        finite = values[np.isfinite(values)]
        is_8_bit = finite.size and finite.min() >= 0 and 1 < finite.max() <= 255
        low, high = (0, 255) if is_8_bit else _range(finite)
        values = np.nan_to_num((values - low) / max(high - low, 1e-6))
        image = (values.clip(0, 1) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(image[..., ::-1] if is_bgr else image)


def _range(values: np.ndarray) -> tuple[float, float]:
    if not values.size:
        return 0.0, 1.0
    step = max(1, values.size // 1_000_000)
    return tuple(np.percentile(values[::step], (2, 98)).tolist())


def draw_regions(
    image: np.ndarray,
    labels: np.ndarray,
    *,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    shown: Sequence[bool] | None = None,
    opacity: float = 0.5,
    legend: bool = True,
    legend_rows: int | None = None,
) -> np.ndarray:
    """Draw a label map over its image.

    Args:
        image: ``(H, W, 3)``, RGB, uint8.
        labels: indices of classes, ``(H, W)``; others than those of ``classes`` are not
            drawn.
        classes: names of the classes.
        palette: their colours in RGB.
        shown: for each class whether it is drawn; by default all are.
        opacity: of the colours, 0 to 1.
        legend: add a strip with the classes below the picture, by their share of it.
        legend_rows: height of the strip in lines; by default as many as are needed.

    Returns:
        The picture, RGB, uint8.
    """
    picture, factor = _enlarged(image)
    labels = labels.astype(np.int32)
    shown = np.ones(len(classes), bool) if shown is None else np.asarray(shown, bool)
    known = (labels >= 0) & (labels < len(classes))
    visible = known & shown[np.where(known, labels, 0)]
    labels = np.where(visible, labels, len(classes))
    counts = np.bincount(labels.ravel(), minlength=len(classes) + 1)[:-1]

    colors = np.zeros((len(classes) + 1, 3), np.uint8)
    colors[:-1] = palette
    labels = np.repeat(np.repeat(labels, factor, axis=0), factor, axis=1)
    tinted = cv2.addWeighted(colors[labels], opacity, picture, 1 - opacity, 0)
    is_none = labels == len(classes)
    tinted[is_none] = picture[is_none]
    style = _Style.of(picture)
    tinted[_edges(labels, style.line)] = (255, 255, 255)
    if not legend:
        return tinted
    order = [i for i in np.argsort(-counts, kind='stable') if counts[i]]
    total = labels.size / factor**2
    entries = [(palette[i], f'{classes[i]} {percent(counts[i] / total)}') for i in order]
    return _with_legend(tinted, entries, style, legend_rows)


def percent(share: float) -> str:
    """A share of a picture as text."""
    return '<1%' if share < 0.01 else f'{share:.0%}'


def _edges(labels: np.ndarray, width: int) -> np.ndarray:
    """Where regions meet, in lines of this width."""
    edges = np.zeros(labels.shape, np.uint8)
    edges[:, 1:] |= labels[:, 1:] != labels[:, :-1]
    edges[1:] |= labels[1:] != labels[:-1]
    if width > 1:
        edges = cv2.dilate(edges, np.ones((width, width), np.uint8))
    return edges.astype(bool)


def draw_objects(
    image: np.ndarray,
    objects,
    *,
    classes: Sequence[str],
    palette: Sequence[Sequence[int]],
    shown: Sequence[bool] | None = None,
    opacity: float = 0.5,
    legend: bool = True,
    legend_rows: int | None = None,
) -> np.ndarray:
    """Draw boxes, masks, names and scores over an image.

    Args:
        image: ``(H, W, 3)``, RGB, uint8.
        objects: ``InstanceData`` with ``bboxes``, ``labels``, ``scores`` and, if there are
            any, ``masks``: an array ``(n, H, W)`` or a list of COCO's run-length codes.
        classes: names of the classes.
        palette: their colours in RGB.
        shown: for each class whether it is drawn; by default all are.
        opacity: of the masks, 0 to 1.
        legend: add a strip with the numbers of objects of each class.
        legend_rows: height of the strip in lines; by default as many as are needed.

    Returns:
        The picture, RGB, uint8.
    """
    picture, factor = _enlarged(image)
    style = _Style.of(picture)
    boxes, labels = objects.bboxes.numpy() * factor, objects.labels.tolist()
    scores = objects.scores.tolist()
    order = [i for i, label in enumerate(labels) if shown is None or shown[label]]
    # small ones last, so that nothing covers them
    areas = (boxes[:, 2:] - boxes[:, :2]).prod(axis=1)
    order.sort(key=lambda i: -areas[i])
    if 'masks' in objects:
        for i in order:
            mask, color = decoded(objects.masks[i]), palette[labels[i]]
            _draw_mask(picture, mask, color, opacity, factor, style)
    drawn = Image.fromarray(picture)
    draw = ImageDraw.Draw(drawn)
    for i in order:
        color = tuple(palette[labels[i]])
        draw.rectangle(boxes[i].tolist(), outline=color, width=style.line)
    for i in order:
        text = f'{classes[labels[i]]} {scores[i]:.2f}'
        _draw_label(draw, drawn.size, boxes[i], text, tuple(palette[labels[i]]), style)
    picture = np.asarray(drawn)
    if not legend:
        return picture
    counts = {i: labels.count(i) for i in sorted({labels[i] for i in order})}
    counts = sorted(counts.items(), key=lambda item: -item[1])
    entries = [(palette[i], f'{classes[i]} {count}') for i, count in counts]
    return _with_legend(picture, entries, style, legend_rows)


def decoded(mask) -> np.ndarray:
    """A mask as an array ``(H, W)`` of bool, from an array or COCO's run-length code."""
    if isinstance(mask, dict):
        from pycocotools import mask as coco_mask

        return coco_mask.decode(mask).astype(bool)
    return np.asarray(mask, bool)


def _draw_mask(picture, mask, color, opacity, factor, style: _Style) -> None:
    rows, columns = np.flatnonzero(mask.any(axis=1)), np.flatnonzero(mask.any(axis=0))
    if not len(rows):
        return
    # only the part that has the mask is worked on
    top, left = rows[0], columns[0]
    part = mask[top : rows[-1] + 1, left : columns[-1] + 1]
    part = np.repeat(np.repeat(part, factor, axis=0), factor, axis=1)
    top, left = top * factor, left * factor
    area = picture[top : top + part.shape[0], left : left + part.shape[1]]
    tint = np.full_like(area, color)
    area[part] = cv2.addWeighted(tint, opacity, area, 1 - opacity, 0)[part]
    outlines, _ = cv2.findContours(
        part.astype(np.uint8), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE
    )
    outlined = np.ascontiguousarray(area)
    cv2.drawContours(outlined, outlines, -1, tuple(map(int, color)), style.line)
    area[:] = outlined


def _draw_label(draw, size, box, text: str, color, style: _Style) -> None:
    """Write a text above a box, or inside where there is no room."""
    left, top, right, bottom = draw.textbbox((0, 0), text, font=style.font)
    width, height = right + 2 * style.gap, bottom + style.gap
    x = min(max(box[0], 0), max(size[0] - width, 0))
    y = box[1] - height
    y = max(box[1], 0) if y < 0 else y
    y = min(y, max(size[1] - height, 0))
    draw.rectangle((x, y, x + width, y + height), fill=color)
    draw.text((x + style.gap, y), text, fill=_readable_on(color), font=style.font)


def _readable_on(color: Sequence[int]) -> tuple[int, int, int]:
    """Black or white, by the brightness of what is behind (ITU-R BT.601)."""
    red, green, blue = color
    return (0,) * 3 if 0.299 * red + 0.587 * green + 0.114 * blue > 140 else (255,) * 3


def _enlarged(image: np.ndarray) -> tuple[np.ndarray, int]:
    """A copy of the image, a small one enlarged, and by which factor."""
    factor = max(1, -(-_SMALLEST // max(image.shape[:2])))
    if factor == 1:
        return image.copy(), 1
    height, width = image.shape[:2]
    size = width * factor, height * factor
    return cv2.resize(image, size, interpolation=cv2.INTER_CUBIC), factor


def _with_legend(picture, entries, style: _Style, rows: int | None) -> np.ndarray:
    """The picture, with colours and texts on white below it."""
    width = picture.shape[1]
    line = round(style.font.size * 1.5)
    swatch, gap = style.font.size, style.gap * 2
    if len(entries) > _MOST_IN_LEGEND:
        more = len(entries) - _MOST_IN_LEGEND
        entries = [*entries[:_MOST_IN_LEGEND], ((255, 255, 255), f'and {more} more')]
    entries = entries or [((255, 255, 255), 'nothing found')]
    places, x, y = [], gap, 0
    for _, text in entries:
        taken = swatch + gap // 2 + round(style.font.getlength(text)) + 2 * gap
        if x > gap and x + taken > width:
            x, y = gap, y + 1
        places.append((x, y))
        x += taken
    rows = y + 1 if rows is None else rows
    strip = Image.new('RGB', (width, rows * line + gap), (255, 255, 255))
    draw = ImageDraw.Draw(strip)
    for (color, text), (x, y) in zip(entries, places, strict=True):
        if y >= rows:
            break
        top = y * line + gap // 2
        box = (x, top + line // 8, x + swatch, top + line // 8 + swatch)
        draw.rectangle(box, fill=tuple(color))
        place = (x + swatch + gap // 2, top)
        draw.text(place, text, fill=(0, 0, 0), font=style.font)
    return np.concatenate((picture, np.asarray(strip)))
