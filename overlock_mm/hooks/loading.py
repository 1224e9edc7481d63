"""Safe and strict loading of `load_from` and `resume`, with any tool of the toolboxes."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import CheckpointLoader, Runner

from ..checkpoint import LoadOptions, fit, read_weights, unwrapped
from ..errors import CheckpointError, CheckpointNotFoundError
from ..models import OverLoCK


@HOOKS.register_module()
class StrictLoadingHook(Hook):
    """Have ``load_from`` and ``resume`` of a config load as ``load_checkpoint`` does.

    mmengine loads what fits, only logs the rest, and unpickles anything. With this hook
    a model whose backbone is an :class:`OverLoCK` gets a report, and an error if the file
    does not fit it. In a config::

        custom_imports = dict(imports=['overlock_mm', 'overlock_mm.hooks'])
        default_hooks = dict(loading=dict(type='StrictLoadingHook'))

    It works with mmengine's ``Runner`` and ``FlexibleRunner``. No hook is called before
    ``FlexibleRunner`` reads a file. So this one replaces mmengine's loaders of local files
    and of http(s) URLs when it is built: from then on they do not run code from a file,
    whatever the model. (Of several hooks in a process, the one that was built last reads.)
    Limits: other storage (``s3:``, ``petrel:``, ...) is read as mmengine does, and the
    DeepSpeed, FSDP and ColossalAI strategies of ``FlexibleRunner`` have checkpoints of
    their own, which they load without calling hooks.

    Args:
        prefix: load only the keys of the file that start with this prefix, without it.
            A run that is resumed has the same model; of all options, only ``trust``
            applies to it.
        strict: raise an error if the file does not fit. If False, load what fits.
        ignore_mismatched: prefixes of keys that may have another shape in the file.
        ignore_unexpected: prefixes of keys of the file that are skipped.
        trust: read files that hold more than weights and plain data, which can run code.

    Raises:
        CheckpointError: if an option has a value that it cannot have.
    """

    priority = 'VERY_HIGH'  # other hooks copy what this one has checked

    def __init__(
        self,
        prefix: str | None = None,
        strict: bool = True,
        ignore_mismatched: Sequence[str] = (),
        ignore_unexpected: Sequence[str] = (),
        trust: bool = False,
    ):
        self.options = LoadOptions(
            prefix, strict, ignore_mismatched, ignore_unexpected, trust
        )
        self._source = 'the checkpoint'
        prefixes = ['', 'http://', 'https://']
        CheckpointLoader.register_scheme(prefixes, self.load_from_file, force=True)

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict) -> None:
        """Replace the state dict in a checkpoint by what the model can load of it.

        Raises:
            CheckpointError: if the file does not fit the model, or cannot be resumed.
        """
        model = unwrapped(runner.model)
        if not isinstance(getattr(model, 'backbone', None), OverLoCK):
            if any(isinstance(module, OverLoCK) for module in model.modules()):
                print_log(
                    f'{type(model).__name__} has an OverLoCK that is not its backbone: '
                    'mmengine loads what fits of load_from and ignores the rest',
                    logger='current',
                    level=logging.WARNING,
                )
            return
        resuming = bool(runner._resume)
        with _naming_options():
            options = LoadOptions() if resuming else self.options
            report, state = fit(model, checkpoint, self._source, options)
            if not report.key:
                checkpoint.clear()
            if resuming:
                self._check_resumable(checkpoint)
        checkpoint['state_dict'] = state
        # mmengine loads the same, but not into wrappers that it does not know
        model.load_state_dict(state, strict=False)

    def _check_resumable(self, checkpoint):
        meta = checkpoint.get('meta')
        if not isinstance(meta, dict) or not (
            {'epoch', 'iter'} <= set(meta) and 'message_hub' in checkpoint
        ):
            raise CheckpointError(
                f'{self._source} has no state of a training by mmengine, so it cannot be '
                'resumed; use it as load_from, without resume'
            )
        if not self.options.trust:
            # the text of a config in MMDetection 2.x, which mmengine would execute
            meta.pop('config', None)

    def load_from_file(self, filename: str, map_location: str = 'cpu'):
        """Read a file or URL, as mmengine's loaders do, but safely."""
        url = urlparse(str(filename))
        if url.scheme in ('http', 'https'):
            # where mmengine and torch.hub keep downloads, which may have no network
            kept = Path(torch.hub.get_dir(), 'checkpoints', Path(url.path).name)
            filename = str(kept) if kept.is_file() else filename
        self._source = filename
        with _naming_options():
            return read_weights(filename, map_location, self.options.trust)


@contextmanager
def _naming_options() -> Iterator[None]:
    """Say in errors where a config has the options of loading."""
    try:
        yield
    except CheckpointNotFoundError:
        raise
    except CheckpointError as error:
        raise CheckpointError(
            f'{error} (in a config, the options of loading are in default_hooks.loading)'
        ) from error
