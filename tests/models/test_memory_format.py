"""The memory format of the maps: what is behind the backbone may not check it."""

import pytest
import torch
from helpers import image, tiny
from mmcv.ops import roi_align

from overlock_mm import fold

FORMS = {
    'train': lambda: tiny(context_skip=True).train(),
    'recomputed': lambda: tiny(with_cp=True).train(),
    'eval': lambda: tiny().eval(),
    'some maps': lambda: tiny(out_indices=(1, 2)).eval(),
    'folded': lambda: fold(tiny(context_skip=True)),
}


@pytest.mark.parametrize('form', FORMS)
def test_maps_have_the_memory_format_of_the_images(form):
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = FORMS[form]().to(memory_format=memory_format)
        for out in model(image(2, 3, 96, 64).contiguous(memory_format=memory_format)):
            assert out.is_contiguous(memory_format=memory_format), out.stride()


def test_roi_align_of_mmcv_reads_the_maps_right():
    """It reads channels_last memory as if it were contiguous; see docs/training.md."""
    rois = torch.tensor([[0.0, 0, 0, 30, 20], [0, 10, 5, 60, 50]])
    for out, stride in zip(tiny().eval()(image(1, 3, 64, 96)), (4, 8, 16, 32), strict=True):
        # by hand: one sample in the middle of the one bin of each box
        x, y = (rois[:, [1, 2]] + rois[:, [3, 4]]).div(2 * stride).sub(0.5).unbind(1)
        w, h = out.shape[-1], out.shape[-2]
        grid = torch.stack(((2 * x + 1) / w - 1, (2 * y + 1) / h - 1), dim=-1)
        expected = torch.nn.functional.grid_sample(
            out, grid[None, :, None], padding_mode='border', align_corners=False
        )[0, :, :, 0].t()
        actual = roi_align(out, rois, 1, 1 / stride, 1, 'avg', True)
        torch.testing.assert_close(actual[:, :, 0, 0], expected, rtol=1e-4, atol=1e-5)
