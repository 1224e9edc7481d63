"""Strict loading of `load_from` and `resume`, with any tool of the toolboxes."""

import logging
from collections.abc import Sequence
from functools import partial

from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..checkpoint import fit, read_weights, unwrapped
from ..errors import CheckpointError
from ..models import OverLoCK


@HOOKS.register_module()
class StrictLoadingHook(Hook):
    """Have ``load_from`` and ``resume`` of a config load as ``load_checkpoint`` does.

    mmengine loads what fits, only logs the rest, and unpickles anything. With this hook
    a model with an :class:`OverLoCK` gets a report, and an error if the file does not
    fit it; other models load as in mmengine. In a config::

        custom_imports = dict(imports=['overlock_mm.hooks'])
        default_hooks = dict(loading=dict(type='StrictLoadingHook'))

    Args:
        prefix: as all of them an option of :func:`overlock_mm.load_checkpoint`. What is
            resumed has the same model, so for it only ``trust`` counts.
        strict: fail if the file does not fit.
        ignore_mismatched: begins of names of entries that may have other shapes.
        ignore_unexpected: begins of names of entries of the file to pass over.
        trust: read files that hold more than weights and plain data.
    """

    priority = 'VERY_HIGH'

    def __init__(
        self,
        prefix: str | None = None,
        strict: bool = True,
        ignore_mismatched: Sequence[str] = (),
        ignore_unexpected: Sequence[str] = (),
        trust: bool = False,
    ):
        self.trust = trust
        self.options = dict(
            prefix=prefix,
            strict=strict,
            ignore_mismatched=ignore_mismatched,
            ignore_unexpected=ignore_unexpected,
        )

    def before_run(self, runner: Runner) -> None:
        """Take the place of the runner's own loading, which no hook comes before."""
        model = unwrapped(runner.model)
        if isinstance(getattr(model, 'backbone', None), OverLoCK):
            runner.load_checkpoint = partial(self._load, runner, model)
        elif any(isinstance(module, OverLoCK) for module in model.modules()):
            print_log(
                f'{type(model).__name__} has an OverLoCK that is not its backbone: '
                'mmengine loads load_from by itself, and only what fits',
                logger='current',
                level=logging.WARNING,
            )

    def _load(
        self,
        runner,
        model,
        filename: str,
        map_location='cpu',
        strict=None,
        revise_keys=None,
    ) -> dict:
        """What ``Runner.load_checkpoint`` does; the last two are for mmengine's own."""
        resuming = runner._resume
        try:
            checkpoint = read_weights(filename, map_location, self.trust)
            options = {} if resuming else self.options
            report, state = fit(model, checkpoint, filename, **options)
        except CheckpointError as error:
            raise CheckpointError(
                f'{error} (such options go into default_hooks.loading of the config)'
            ) from error
        checkpoint = dict(checkpoint) if report.key else {}
        meta = checkpoint.get('meta') or {}
        if resuming and not (
            {'epoch', 'iter'} <= set(meta) and 'message_hub' in checkpoint
        ):
            raise CheckpointError(
                f'{filename} holds no state of a training by mmengine, so it cannot be '
                'resumed; give it as load_from'
            )
        checkpoint['state_dict'] = state
        runner.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        model.load_state_dict(checkpoint['state_dict'], strict=False)
        runner._has_loaded = True
        return checkpoint
