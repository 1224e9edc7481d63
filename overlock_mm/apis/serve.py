"""Predicting images on a page in the browser."""

import asyncio
import os
import secrets
import socket
import tempfile
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

import cv2
import numpy as np
import uvicorn
from fastapi import FastAPI, Request, Response
from mmengine.structures import InstanceData, PixelData
from nicegui import ui
from PIL import Image
from starlette.formparsers import MultiPartParser
from starlette.responses import PlainTextResponse

from ..errors import UserError
from .drawing import decoded, to_rgb
from .infer import ResultWriter
from .inference import Predictor, UnreadableError
from .messages import say

MEGABYTE = 2**20
_MOST_PIXELS = 25_000_000
# Memory for the scores of all classes at all pixels, which a segmentor needs at once.
_SCORES = 4 * 2**30
# Images and results that are kept for the pages that are open.
_KEPT = 2**30
_MOST_WAITING = 16
# Longer side of the picture in the page; downloads have the size of the image.
_SHOWN = 1600
# Seconds for which a page may lose its connection and keep its result.
_AWAY = 30
_MEDIA = {'.jpg': 'image/jpeg', '.png': 'image/png', '.json': 'application/json'}


def serve(
    config: str | Path,
    checkpoint: str | Path,
    *,
    device: str | None = None,
    host: str = '127.0.0.1',
    port: int = 7860,
    max_mb: float = 32,
    max_pixels: int | None = None,
    tile: int | None = None,
    score_thr: float = 0.3,
    cfg_options: dict | None = None,
    trust: bool = False,
) -> None:
    """Serve a page that predicts images, until the process is interrupted.

    Args:
        config: config of MMDetection or MMSegmentation.
        checkpoint: path or URL of the weights.
        device: see :class:`Predictor`.
        host: address to serve on; ``'0.0.0.0'`` is all of this machine's.
        port: port to serve on; 0 takes a free one.
        max_mb: size of the largest file that is taken, in units of 2**20 bytes.
        max_pixels: size of the largest image that is taken. Defaults to 25 million, or as
            many as need 4 GiB for the scores of all classes.
        tile: see :class:`Predictor`.
        score_thr: lowest score of the objects that are shown at first.
        cfg_options: values to override, by key.
        trust: read a checkpoint that can run code.

    Raises:
        UserError: if an argument cannot be used, or the port is in use.
        CheckpointError: if the weights cannot be loaded, or do not fit.
    """
    if not 0 <= score_thr <= 1:
        raise UserError(f'--score-thr {score_thr} must be within 0..1')
    if max_mb <= 0:
        raise UserError(f'--max-mb {max_mb} must be larger than 0')
    if max_pixels is not None and max_pixels < 1:
        raise UserError(f'--max-pixels {max_pixels} must be at least 1')
    listening = _listen(host, port)  # before the model, which takes long
    # NiceGUI looks at all objects, torch's among them
    warnings.filterwarnings('ignore', '.*reduce_op', FutureWarning)
    with listening:
        predictor = Predictor(
            config, checkpoint, device, tile=tile, cfg_options=cfg_options, trust=trust
        )
        service = Service(
            predictor,
            max_bytes=int(max_mb * MEGABYTE),
            max_pixels=max_pixels,
            score_thr=score_thr,
        )
        server = uvicorn.Server(
            uvicorn.Config(
                web_app(service),
                log_level='error',
                access_log=False,
                timeout_graceful_shutdown=2,
                ws_max_size=MEGABYTE,
            )
        )
        port = listening.getsockname()[1]
        say(f'Serving {service.title} on {_address(host, port)} (Ctrl-C stops it)')
        try:
            server.run(sockets=[listening])
        except KeyboardInterrupt:
            if service.is_predicting:  # Python would wait for its thread
                os._exit(130)
            raise


def _listen(host: str, port: int) -> socket.socket:
    try:
        family = socket.AF_INET6 if ':' in host else socket.AF_INET
        return socket.create_server((host, port), family=family)
    except OverflowError as error:
        raise UserError(f'--port {port} must be within 0..65535') from error
    except OSError as error:
        reason = error.strerror.partition(' (')[0]
        raise UserError(
            f'cannot serve on {host}, port {port}: {reason}; give another --port (0 takes '
            'a free one) or --host'
        ) from error


def _address(host: str, port: int) -> str:
    if host in ('', '0.0.0.0', '::'):
        return f'http://localhost:{port} and every other address of this machine'
    return f'http://[{host}]:{port}' if ':' in host else f'http://{host}:{port}'


class Prediction(NamedTuple):
    """An image with its result.

    Attributes:
        name: of the file that was uploaded.
        image: what :meth:`Predictor.draw` takes.
        result: the data sample, without what is not drawn or saved.
        shown: image and result at the size that the page shows.
    """

    name: str
    image: dict
    result: object
    shown: tuple[dict, object]

    @property
    def labels(self) -> np.ndarray | None:
        """The label map of a segmentor, ``(H, W)``."""
        if 'pred_sem_seg' not in self.result:
            return None
        return self.result.pred_sem_seg.data[0].numpy()

    @property
    def nbytes(self) -> int:
        labels = self.labels
        return self.image['img'].nbytes + (0 if labels is None else labels.nbytes)


@dataclass
class Session:
    """What one open page has: its prediction, and what is to be seen of it."""

    score_thr: float
    opacity: float = 0.5
    hidden: set[str] = field(default_factory=set)
    prediction: Prediction | None = None
    version: int = 0  # of what is to be seen
    token: str = field(default_factory=partial(secrets.token_urlsafe, 16))
    drawing: threading.Lock = field(default_factory=threading.Lock)

    def url(self, file: str) -> str:
        return f'results/{self.token}/{self.version}/{file}'


class Service:
    """Predicts uploads, one at a time, and keeps the results of the pages that are open.

    Args:
        predictor: the model.
        max_bytes: size of the largest file that is taken.
        max_pixels: size of the largest image that is taken, see :func:`serve`.
        score_thr: lowest score of the objects that are shown at first.
        most_kept: bytes of images and results that are kept; the oldest go first.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        max_bytes: int,
        max_pixels: int | None = None,
        score_thr: float = 0.3,
        most_kept: int = _KEPT,
    ):
        self.predictor = predictor
        self.max_bytes, self.score_thr = max_bytes, score_thr
        self.max_pixels = max_pixels or _default_pixels(predictor)
        self.most_kept = most_kept
        self.sessions: dict[str, Session] = {}
        self.title = Path(predictor.cfg.filename or type(predictor.model).__name__).stem
        self.waiting = 0
        self.is_predicting = False
        self._turn = asyncio.Lock()
        self._worker = ThreadPoolExecutor(1)

    def open(self) -> Session:
        """A session for a page that opens."""
        session = Session(self.score_thr)
        self.sessions[session.token] = session
        return session

    def close(self, session: Session) -> None:
        """Forget a session."""
        self.sessions.pop(session.token, None)

    async def predict(
        self, session: Session, name: str, content: bytes, on_start: Callable = bool
    ) -> None:
        """Predict an upload when its turn has come, and keep the result in its session.

        Args:
            session: which page it is for.
            name: name of the file, for messages and downloads.
            content: the file.
            on_start: called without arguments when its turn has come.

        Raises:
            UserError: if the file is no image, is too large, the model fails on it, or too
                many images are waiting.
        """
        if self.waiting >= _MOST_WAITING:
            raise UserError(
                f'{self.waiting} images are waiting already; try again in a few minutes'
            )
        loop = asyncio.get_running_loop()
        self.waiting += 1
        try:
            async with self._turn:
                if session.token not in self.sessions:
                    return  # nobody waits for it any more
                on_start()
                session.prediction = None  # first, so that memory holds one
                session.prediction = await loop.run_in_executor(
                    self._worker, self._predict, name, content
                )
                self._forget_old(session)
        finally:
            self.waiting -= 1

    def _predict(self, name: str, content: bytes) -> Prediction:
        data = self._read(name, content)
        self.is_predicting = True
        try:
            (result,) = self.predictor.predict([data])
            # in 8 bits and BGR, whatever the model reads
            image = dict(img=np.ascontiguousarray(to_rgb(data['img'])[..., ::-1]))
            return Prediction(name, image, *_compact(image, result))
        except UserError:
            raise
        except Exception as error:  # a model may raise anything, and the page goes on
            height, width = data['img'].shape[:2]
            reason = f'{type(error).__name__}: {error}'.splitlines()[0]
            say(f'an image of {width} x {height} could not be predicted: {reason}')
            raise UserError(
                f'the model cannot predict this image of {width} x {height} pixels '
                f'({reason})'
            ) from error
        finally:
            self.is_predicting = False

    def _read(self, name: str, content: bytes) -> dict:
        if len(content) > self.max_bytes:
            raise UserError(too_large(name, len(content), self.max_bytes))
        # the pipeline reads files; this one is removed at once
        suffix = Path(name).suffix[:8].lower()
        with tempfile.NamedTemporaryFile(prefix='overlock_serve_', suffix=suffix) as file:
            file.write(content)
            file.flush()
            size = _size_of(file.name)
            if size is None:
                raise UserError(f'{name} is not an image that can be read')
            if size[0] * size[1] > self.max_pixels:
                raise UserError(
                    f'{name} has {size[0]} x {size[1]} pixels, '
                    f'{size[0] * size[1] / 1e6:.1f} million; at most '
                    f'{self.max_pixels / 1e6:g} million can be predicted here. Make it '
                    'smaller'
                )
            try:
                return self.predictor.load(file.name)
            except UnreadableError as error:
                raise UserError(f'{name} cannot be read; it may be damaged') from error

    def _forget_old(self, latest: Session) -> None:
        """Drop the oldest results while all of them take too much memory."""
        self.sessions[latest.token] = self.sessions.pop(latest.token, latest)
        kept = [s for s in self.sessions.values() if s.prediction and s is not latest]
        total = latest.prediction.nbytes + sum(s.prediction.nbytes for s in kept)
        for session in kept:
            if total <= self.most_kept:
                break
            total -= session.prediction.nbytes
            session.prediction = None

    def amounts(self, session: Session) -> list[tuple[int, float]]:
        """Classes that were found, by index, with their share or their number of objects.

        Objects below the session's threshold are not counted. The largest comes first.
        """
        prediction = session.prediction
        count = len(self.predictor.classes)
        if (labels := prediction.labels) is not None:
            # ignored pixels, if any, are of no class
            found = np.bincount(labels[(labels >= 0) & (labels < count)], minlength=count)
            found = found / labels.size
        else:
            objects = prediction.result.pred_instances
            labels = objects.labels[objects.scores >= session.score_thr].numpy()
            found = np.bincount(labels, minlength=count)
        order = np.argsort(-found, kind='stable')
        return [(int(i), found[i].item()) for i in order if found[i]]

    def file(self, session: Session, name: str) -> bytes:
        """The content of a file that a page shows or offers.

        Args:
            session: of the page.
            name: 'shown.jpg', 'picture.png', 'label_map.png' or 'coco.json'.

        Raises:
            KeyError: if there is no such file.
        """
        prediction = session.prediction
        if prediction is None or name not in self.files() and name != 'shown.jpg':
            raise KeyError(name)
        if name == 'shown.jpg':
            picture = self._draw(session, *prediction.shown, legend=False)
            return _encoded(picture, 'JPEG', quality=90, subsampling=0)
        if name == 'picture.png':
            picture = self._draw(session, prediction.image, prediction.result)
            return _encoded(picture, 'PNG', compress_level=3)
        result = prediction.result
        if name == 'coco.json':  # what is to be seen
            objects = result.pred_instances
            classes = self.predictor.classes
            seen = [classes[i] not in session.hidden for i in objects.labels.tolist()]
            result = type(result)(pred_instances=objects[np.array(seen, bool)])
        kind = 'png' if name == 'label_map.png' else 'coco'
        with tempfile.TemporaryDirectory(prefix='overlock_serve_') as folder:
            writer = ResultWriter(self.predictor, Path(folder), (kind,), session.score_thr)
            writer.write('image', prediction.name, prediction.image, result)
            writer.close()
            written = 'label_maps/image.png' if kind == 'png' else 'coco.json'
            return Path(folder, written).read_bytes()

    def files(self) -> tuple[str, str]:
        """Names of the files that can be downloaded."""
        is_detector = self.predictor.toolbox == 'mmdet'
        return 'picture.png', 'coco.json' if is_detector else 'label_map.png'

    def _draw(self, session: Session, image, result, legend: bool = True) -> np.ndarray:
        return self.predictor.draw(
            image,
            result,
            score_thr=session.score_thr,
            opacity=session.opacity,
            hidden=sorted(session.hidden),
            legend=legend,
        )


def _default_pixels(predictor: Predictor) -> int:
    if predictor.toolbox == 'mmdet' or predictor.tiling is not None:
        return _MOST_PIXELS
    return min(_MOST_PIXELS, _SCORES // (4 * len(predictor.classes)))


def too_large(name: str, size: int, limit: int) -> str:
    """Why a file is not taken."""
    return (
        f'{name} has {size / MEGABYTE:.1f} MB, and at most {limit / MEGABYTE:g} MB can '
        'be uploaded. Make it smaller'
    )


def _size_of(path: str) -> tuple[int, int] | None:
    """Width and height of an image file as stored, None if it is none.

    Only the header is read.
    """
    limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None  # ours is checked
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')
            with Image.open(path) as file:
                return file.size
    except Exception:  # noqa: BLE001  decoders raise what they like
        pass
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    try:
        import tifffile

        with tifffile.TiffFile(path) as file:  # more channels than Pillow reads
            return file.pages[0].imagewidth, file.pages[0].imagelength
    except Exception:  # noqa: BLE001
        return None


def _compact(image: dict, result) -> tuple[object, tuple[dict, object]]:
    """A result in little memory, and it with its image at the size of the page."""
    height, width = image['img'].shape[:2]
    factor = min(1.0, _SHOWN / max(height, width))
    size = max(1, round(width * factor)), max(1, round(height * factor))
    small = image
    if factor < 1:
        small = dict(img=cv2.resize(image['img'], size, interpolation=cv2.INTER_AREA))
    sample = type(result)
    if 'pred_sem_seg' in result:
        labels = result.pred_sem_seg.data.short()
        kept = sample(pred_sem_seg=PixelData(data=labels))
        if factor == 1:
            return kept, (small, kept)
        resized = cv2.resize(labels[0].numpy(), size, interpolation=cv2.INTER_NEAREST)
        labels = labels.new_tensor(resized)[None]
        return kept, (small, sample(pred_sem_seg=PixelData(data=labels)))
    if 'pred_instances' not in result:
        raise UserError(
            f'the model predicts {", ".join(result.keys())}, and here regions and objects '
            'can be shown; use overlock serve with another model'
        )
    found = result.pred_instances
    fields = dict(labels=found.labels, scores=found.scores)
    objects = InstanceData(bboxes=found.bboxes, **fields)
    shown = InstanceData(bboxes=found.bboxes * factor, **fields)
    if 'masks' in found:
        masks = [decoded(mask) for mask in found.masks]
        objects.masks = [_run_lengths(mask) for mask in masks]
        shown.masks = [
            _run_lengths(
                cv2.resize(mask.view(np.uint8), size, interpolation=cv2.INTER_NEAREST)
            )
            for mask in masks
        ]
    return sample(pred_instances=objects), (small, sample(pred_instances=shown))


def _run_lengths(mask: np.ndarray) -> dict:
    from pycocotools import mask as coco_mask

    return coco_mask.encode(np.asfortranarray(mask, np.uint8))


def _encoded(picture: np.ndarray, kind: str, **options) -> bytes:
    content = BytesIO()
    Image.fromarray(picture).save(content, kind, **options)
    return content.getvalue()


class _LimitedBody:
    """Refuses requests whose body is too large, while they are received."""

    def __init__(self, app, limit: int):
        self.app, self.limit = app, limit

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            return await self.app(scope, receive, send)
        received = 0

        async def limited_receive():
            nonlocal received
            message = await receive()
            before, received = received, received + len(message.get('body', b''))
            if received <= self.limit:
                return message
            if before <= self.limit:
                refusal = PlainTextResponse('The file is too large', 413)
                await refusal(scope, receive, send)
            return dict(type='http.disconnect')

        async def limited_send(message):
            if received <= self.limit:
                await send(message)

        try:
            await self.app(scope, limited_receive, limited_send)
        except Exception:
            if received <= self.limit:
                raise


def web_app(service: Service):
    """The page and its files as an ASGI application.

    Args:
        service: what predicts. There can be one in a process.
    """
    # uploads stay in memory; their number is that of the pages that are open
    MultiPartParser.spool_max_size = service.max_bytes + MEGABYTE
    web = FastAPI(openapi_url=None)

    # not a coroutine: drawing runs in a thread
    @web.get('/results/{token}/{version}/{name}')
    def result(token: str, version: int, name: str) -> Response:
        session = service.sessions.get(token)
        if session is None:
            return PlainTextResponse('This result is no longer there', 404)
        prediction = session.prediction  # it may be dropped meanwhile
        with session.drawing:
            if name == 'shown.jpg' and version != session.version:
                return PlainTextResponse('There is a newer one', 410)
            try:
                content = service.file(session, name)
            except KeyError:
                return PlainTextResponse('This result is no longer there', 404)
        headers = {'Cache-Control': 'no-store'}
        if name != 'shown.jpg':
            stem, suffix = Path(prediction.name).stem, Path(name).suffix
            file = quote(f'{stem}_{Path(name).stem}{suffix}')
            headers['Content-Disposition'] = f"attachment; filename*=UTF-8''{file}"
        return Response(content, media_type=_MEDIA[Path(name).suffix], headers=headers)

    from .serve_page import ICON, Page

    def page(request: Request):
        if request.url.path != '/':  # NiceGUI gives it all paths that nobody serves
            return PlainTextResponse('Not found', 404)
        return Page(service).build()

    ui.run_with(
        web,
        root=page,
        title=f'{service.title} - overlock_mm',
        favicon=ICON,
        dark=None,
        reconnect_timeout=_AWAY,
        show_welcome_message=False,
    )
    return _LimitedBody(web, service.max_bytes + MEGABYTE)
