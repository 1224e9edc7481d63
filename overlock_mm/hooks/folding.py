"""Testing with the inference-only form of the backbone."""

from mmengine.hooks import Hook
from mmengine.registry import HOOKS
from mmengine.runner import Runner

from ..checkpoint import unwrapped
from ..models import fold


@HOOKS.register_module()
class FoldHook(Hook):
    """Fold the model (:func:`overlock_mm.fold`) before a test, with its weights loaded."""

    def before_test(self, runner: Runner) -> None:
        fold(unwrapped(runner.model))
