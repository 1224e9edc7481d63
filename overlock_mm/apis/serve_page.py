"""The page of ``overlock serve``: elements, and what happens when they are used."""

from collections.abc import Callable
from functools import partial

from nicegui import events, ui

from ..errors import UserError
from .drawing import percent
from .serve import MEGABYTE, Service, too_large

ICON = (
    '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 32 32">'
    '<rect width="32" height="32" rx="7" fill="#00796b"/>'
    '<circle cx="16" cy="16" r="9" fill="none" stroke="#fff" stroke-width="3"/>'
    '<circle cx="16" cy="16" r="3.5" fill="#ffab91"/></svg>'
)
# By these a phone decides what to convert a photo to, and a browser what to offer.
_TYPES = (
    'image/jpeg,image/png,image/gif,image/webp,image/bmp,image/tiff,.tif,.tiff,.pgm,.ppm'
)
_STYLE = """
.nicegui-content { padding: 0; }
.drop { position: relative; border: 2px dashed #9aa5a3; border-radius: 12px; width: 100%; }
.drop input { cursor: pointer; }
.drop:hover, .drop:focus-within, .q-uploader--dnd .drop { border-color: #00796b; }
.drop-zone { width: 100%; max-height: none; background: none; box-shadow: none; }
.drop-zone .q-uploader__list { padding: 0; }
.drop-zone .q-uploader__header { display: none; }
.picture { display: block; margin: 0 auto; max-width: 100%; max-height: 78vh; }
.swatch { width: 16px; height: 16px; border-radius: 4px; border: 1px solid #8888; }
@media (max-width: 767px) { .picture { max-height: 55vh; } }
"""
# while an image is predicted
_INACTIVE = 'pointer-events-none opacity-50'
_REJECTED = (
    '(files) => emit(files.map((f) => [f.failedPropValidation, f.file.name, f.file.size]))'
)


class Page:
    """One open page: a place for images, the picture, and what can be changed in it."""

    def __init__(self, service: Service):
        self.service, self.session = service, service.open()
        self.names, self.palette = service.predictor.classes, service.predictor.palette
        self.is_detector = service.predictor.toolbox == 'mmdet'
        self.client = ui.context.client
        self.client.on_delete(lambda: service.close(self.session))

    def build(self) -> None:
        ui.colors(primary='#00796b')
        ui.add_css(_STYLE)
        with ui.column().classes('w-full max-w-6xl mx-auto p-4 gap-4'):
            self._title()
            self._drop_zone()
            self._status()
            with ui.row().classes('w-full gap-6 flex-col md:flex-row') as self.outcome:
                with ui.element('div').classes('w-full md:w-0 md:grow min-w-0'):
                    self.picture = ui.element('img').classes('picture rounded')
                    self.picture.props['alt'] = 'the image with what was found'
                with ui.column().classes('w-full md:w-72 gap-4'):
                    self._controls()
            self.outcome.visible = False

    def _title(self) -> None:
        predictor = self.service.predictor
        kind = 'detector' if self.is_detector else 'segmentor'
        with ui.column().classes('gap-0'):
            ui.label(self.service.title).classes('text-xl font-medium break-all').props(
                'role=heading aria-level=1'
            )
            ui.label(
                f'{type(predictor.model).__name__}, a {kind} of {len(self.names)} '
                f'{"class" if len(self.names) == 1 else "classes"}, on {predictor.device}'
            ).classes('text-sm opacity-70')

    def _drop_zone(self) -> None:
        service = self.service
        self.upload = ui.upload(
            auto_upload=True, max_file_size=service.max_bytes, on_upload=self._uploaded
        )
        self.upload.classes('drop-zone').props(f'accept="{_TYPES}" flat')
        self.upload.on('rejected', self._rejected, js_handler=_REJECTED)
        self.upload.on('failed', self._failed, js_handler='(info) => emit(info.xhr.status)')
        # else the same file could not be chosen again
        reset = f'getElement({self.upload.id}).$refs.qRef.reset()'
        forget = f'() => setTimeout(() => {reset})'  # when the request is over
        self.upload.on('uploaded', js_handler=forget).on('failed', js_handler=forget)
        with self.upload.add_slot('header'):
            ui.element('div')
        with (
            self.upload.add_slot('list'),
            ui.column().classes('drop flex items-center gap-1 p-6') as self.zone,
        ):
            ui.icon('image_search', size='2.2rem', color='primary')
            ui.label('Drop an image here, or choose one').classes('text-base text-center')
            ui.label(
                f'up to {service.max_bytes / MEGABYTE:g} MB and '
                f'{service.max_pixels / 1e6:.3g} million pixels'
            ).classes('text-sm opacity-70')
            ui.element('q-uploader-add-trigger')  # the file input, over all of it

    def _status(self) -> None:
        with ui.row().classes('items-center gap-3').props('role=status') as self.busy:
            ui.spinner(size='1.6rem')
            self.progress = ui.label()
        self.busy.visible = False
        with ui.row().classes(
            'w-full items-center gap-3 p-3 rounded no-wrap bg-red-100 text-red-900'
        ) as self.problem:
            ui.icon('error_outline', size='1.6rem')
            self.reason = ui.label().classes('break-words min-w-0').props('role=alert')
        self.problem.visible = False

    def _controls(self) -> None:
        session = self.session
        self._slider('Opacity', session.opacity, lambda e: self._see(opacity=e.value))
        if self.is_detector:
            self._slider(
                'Lowest score', session.score_thr, lambda e: self._see(score_thr=e.value)
            )
        with ui.column().classes('w-full gap-1'):
            with ui.row().classes('w-full items-center justify-between no-wrap'):
                ui.label('Objects' if self.is_detector else 'Share of the image').classes(
                    'font-medium'
                )
                with ui.row().classes('gap-0 no-wrap'):
                    for text, hidden in (('Show all', ()), ('Hide all', self.names)):
                        ui.button(text, on_click=partial(self._hide_only, hidden)).props(
                            'flat no-caps padding="xs sm" size=0.8rem'
                        )
            self.rows = ui.column().classes('w-full gap-0 max-h-80 overflow-y-auto no-wrap')
        with ui.column().classes('w-full gap-2'):
            self.downloads = [
                ui.button(text, icon='download')
                .props('outline no-caps download')
                .classes('w-full')
                for text in (
                    'Picture (PNG)',
                    'Objects shown (COCO)' if self.is_detector else 'Label map (PNG)',
                )
            ]

    def _slider(self, text: str, value: float, on_change: Callable) -> None:
        with ui.column().classes('w-full gap-0'):
            with ui.row().classes('w-full justify-between'):
                ui.label(text).classes('font-medium')
                shown = ui.label().classes('tabular-nums')
            slider = ui.slider(min=0, max=1, step=0.01, value=value, on_change=on_change)
            slider.props(f'aria-label="{text}"')
            shown.bind_text_from(slider, 'value', '{:.2f}'.format)

    async def _uploaded(self, event: events.UploadEventArguments) -> None:
        if self.busy.visible:
            self._complain('Wait until the image before is predicted')
            return
        self.upload.classes(add=_INACTIVE)
        self.problem.visible = False
        before = self.service.waiting
        self.progress.text = f'Waiting for {before} other image{"s"[: before > 1]} ...'
        self.busy.visible = True
        name = event.file.name or 'the file'
        start = partial(self.progress.set_text, 'Predicting ...')
        try:
            content = await event.file.read()
            await self.service.predict(self.session, name, content, start)
            if self.session.prediction is not None:
                self._show()
        except UserError as error:
            self._complain(str(error))
        finally:
            self.busy.visible = False
            self.upload.classes(remove=_INACTIVE)

    def _rejected(self, event: events.GenericEventArguments) -> None:
        reason, name, size = event.args[0]
        if reason == 'max-file-size':
            self._complain(too_large(name, size, self.service.max_bytes))
        else:
            self._complain(
                f'{name} is not of a kind that is read here: JPEG, PNG, WebP, TIFF, BMP, '
                'GIF, PPM and PGM are'
            )

    def _failed(self, event: events.GenericEventArguments) -> None:
        is_large = event.args == 413
        self._complain(
            'The file is too large'
            if is_large
            else 'The upload failed; load this page again'
        )

    def _complain(self, reason: str) -> None:
        self.outcome.visible = False  # of an earlier image
        self.reason.text = f'{reason}.'
        self.problem.visible = True

    def _show(self) -> None:
        self.outcome.visible = True
        self.zone.classes(remove='p-6', add='flex-row justify-center p-2 gap-x-4')
        self._refresh()

    def _see(self, **changes) -> None:
        for name, value in changes.items():
            setattr(self.session, name, value)
        self._refresh(rows='score_thr' in changes)

    def _hide_only(self, names) -> None:
        self.session.hidden = set(names)
        self._refresh()

    def _toggle(self, name: str, event: events.ValueChangeEventArguments) -> None:
        (self.session.hidden.discard if event.value else self.session.hidden.add)(name)
        self._refresh(rows=False)

    def _refresh(self, rows: bool = True) -> None:
        """Show what was chosen; the model does not run."""
        session = self.session
        if session.prediction is None:
            if self.outcome.visible:
                self._complain('This result is no longer kept; give the image again')
            return
        session.version += 1
        self.picture.props['src'] = session.url('shown.jpg')
        for button, file in zip(self.downloads, self.service.files(), strict=True):
            button.props['href'] = session.url(file)
        if rows:
            self._list_classes()

    def _list_classes(self) -> None:
        self.rows.clear()
        amounts = self.service.amounts(self.session)
        with self.rows:
            for index, amount in amounts:
                self._row(index, amount)
            if not amounts:
                text = 'none found'
                if self.is_detector and self.session.prediction.result.pred_instances:
                    text = f'none with a score of {self.session.score_thr:.2f} or more'
                ui.label(text).classes('opacity-70')

    def _row(self, index: int, amount: float) -> None:
        name, color = self.names[index], 'rgb({}, {}, {})'.format(*self.palette[index])
        text = str(amount) if self.is_detector else percent(amount)
        with ui.row().classes('w-full items-center gap-2 no-wrap min-h-8'):
            ui.element('div').classes('swatch shrink-0').style(f'background: {color}')
            ui.checkbox(
                name,
                value=name not in self.session.hidden,
                on_change=partial(self._toggle, name),
            ).props('dense').classes('grow min-w-0 break-words')
            ui.label(text).classes('tabular-nums pr-1')
