"""Testing with the inference-only form of the backbone."""

from mmengine.hooks import EMAHook, Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..checkpoint import unwrapped
from ..errors import UserError
from ..models.folded import fold


@HOOKS.register_module()
class FoldHook(Hook):
    """Fold the model (:func:`overlock_mm.fold`) once its weights are loaded, before a test.

    With an ``EMAHook`` the averaged weights are folded, as the test would use them.
    The model cannot be trained afterwards. In a config::

        custom_imports = dict(imports=['overlock_mm', 'overlock_mm.hooks'])
        custom_hooks = [dict(type='FoldHook')]
    """

    def before_test(self, runner: Runner) -> None:
        """Fold the model of the runner, in place.

        Raises:
            UserError: if there is no OverLoCK in the model.
        """
        for hook in runner.hooks:
            if isinstance(hook, EMAHook):
                # Swap now: parameters of a folded model have no counterpart to swap with.
                hook.before_test_epoch(runner)
                hook.before_test_epoch = hook.after_test_epoch = _do_nothing
        try:
            fold(unwrapped(runner.model))
        except ValueError as error:
            raise UserError(f'the model cannot be folded: {error}') from error


def _do_nothing(*args, **kwargs) -> None:
    pass
