"""mmengine's Runner, with weights that must fit.

Kept apart from the package's own imports: ``mmengine.runner`` needs OpenCV.
"""

from collections.abc import Callable, Sequence

from mmengine.registry import RUNNERS
from mmengine.runner import Runner
from torch import nn

from .checkpoint import fit
from .models import OverLoCK
from .weights_file import CheckpointError, read_weights


@RUNNERS.register_module()
class StrictRunner(Runner):
    """A Runner that loads as :func:`overlock_mm.load_checkpoint` does, and resumes so.

    mmengine loads what fits and only logs the rest. Here ``load_from`` and ``resume``
    of a config print a report, and raise if the checkpoint of a model with an
    :class:`OverLoCK` does not fit it; the options of ``load_checkpoint`` are the
    config's ``load_options``. Other models load as in mmengine.

    The command lines of MMDetection and MMSegmentation take this runner where the
    config says ``runner_type='StrictRunner'`` and imports ``overlock_mm.runner``.
    """

    def load_checkpoint(
        self,
        filename: str,
        map_location: str | Callable = 'cpu',
        strict: bool = False,
        revise_keys: Sequence[tuple[str, str]] = ((r'^module.', ''),),
    ) -> dict:
        """Load a checkpoint into the model.

        Args:
            filename: path or URL.
            map_location: where its tensors go first.
            strict: only for models without an OverLoCK, as is ``revise_keys``.
            revise_keys: patterns in names, and what replaces them.

        Returns:
            What the file holds, with a ``state_dict`` of the model's names.

        Raises:
            CheckpointError: if it does not fit, or cannot be had or read.
        """
        model = self.model
        # of distributed training, of augmented testing
        while not hasattr(model, 'backbone') and isinstance(
            getattr(model, 'module', None), nn.Module
        ):
            model = model.module
        if not isinstance(getattr(model, 'backbone', None), OverLoCK):
            return super().load_checkpoint(
                filename, map_location, strict, list(revise_keys)
            )
        options = dict(self.cfg.get('load_options') or {})
        trust = options.pop('trust', False)
        if self._resume:  # whose model is the same
            options = {}
        try:
            checkpoint = read_weights(filename, map_location, trust)
            report, state = fit(model, checkpoint, filename, **options)
        except CheckpointError as error:
            raise CheckpointError(
                f'{error} (such options go into load_options=dict(...) of the config)'
            ) from error
        checkpoint = dict(checkpoint) if report.key else {}
        if self._resume and 'meta' not in checkpoint:
            raise CheckpointError(
                f'{filename} holds weights alone, and no state of a training to resume; '
                'give it as load_from'
            )
        checkpoint['state_dict'] = state
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        model.load_state_dict(checkpoint['state_dict'], strict=False)
        self._has_loaded = True
        return checkpoint
