"""What several test files share."""

import hashlib
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from parity.fill import parity_image, parity_probe, parity_value
from torch import nn

from overlock_mm import OverLoCK
from overlock_mm.timm import OverLoCKClassifier

ROOT = Path(__file__).resolve().parent.parent
TINY = dict(
    depths=(1, 1, 1, 1),
    focus_depths=(2, 2),
    embed_dims=(8, 16, 32, 32),
    kernel_sizes=(7, 7, 5, 5),
    focus_heads=(2, 2),
)
CASES = Path(__file__).parent / 'parity'
MANIFEST = json.loads((CASES / 'manifest.json').read_text())
SEGMENTATION = ROOT / 'configs/segmentation/upernet_overlock_xt_demo.py'
DETECTION = ROOT / 'configs/detection/cascade_mask_rcnn_overlock_xt_demo.py'
CHANNELS = list(OverLoCK.channels_of(TINY))


def tiny(**kwargs):
    torch.manual_seed(0)
    return randomised(OverLoCK(TINY, **kwargs))


def randomised(model):
    """Statistics and weights as after some training, so that nothing is an identity."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                noise = torch.randn(tensor.shape, generator=generator)
                if name.endswith('running_var'):
                    tensor.copy_(noise.abs() + 0.5)
                else:
                    tensor.add_(0.1 * noise)
    return model


def image(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(2))


def compiled(module):
    """The module as one graph, without the code generation, which takes long."""
    torch.compiler.reset()  # else sizes that differ from those of other tests are dynamic
    return torch.compile(module, fullgraph=True, backend='aot_eager')


def relative_error(out, expected):
    return ((out - expected).norm() / expected.norm()).item()


def build(task, arch, deploy=False, **kwargs):
    if task == 'cls':
        return OverLoCKClassifier(arch, deploy=deploy, **kwargs)
    return OverLoCK(arch, context_skip=task == 'det', deploy=deploy, **kwargs)


def filled(model, dtype=torch.float64):
    """Give every entry the value that its name stands for."""
    model = model.to(dtype)  # first: the values are exact in float64 only
    state = {
        k: torch.from_numpy(np.asarray(parity_value(k, v.shape)))
        for k, v in model.state_dict().items()
    }
    model.load_state_dict(state)
    return model


def probed(tensor, count=4096):
    flat = tensor.detach().double().flatten().numpy()
    return flat[parity_probe(flat.size, count)]


def run_case(path, dtype):
    task, arch, size, mode = path.stem.split('_')
    with torch.device('meta'):  # without drawing weights that filled() replaces
        model = build(task, arch, deploy=mode == 'deploy')
    model = filled(model.to_empty(device='cpu'), dtype).train(mode == 'train')
    image = torch.from_numpy(
        parity_image((int(size.split('x')[0]), 3, *map(int, size.split('x')[1:])))
    ).to(dtype)
    return model, image, np.load(path)


def as_tuple(outputs):
    return outputs if isinstance(outputs, tuple) else (outputs,)


def check_outputs(outputs, case, tolerance, name='out'):
    outputs = as_tuple(outputs)
    assert len(outputs) == sum(k.endswith('.shape') and k.startswith(name) for k in case)
    for i, out in enumerate(outputs):
        assert out.shape == tuple(case[f'{name}{i}.shape'])
        expected = torch.from_numpy(case[f'{name}{i}.values'])
        assert relative_error(torch.from_numpy(probed(out)), expected) < tolerance
        assert out.abs().mean().item() == pytest.approx(
            case[f'{name}{i}.absmean'].item(), rel=tolerance
        )


def check_training_step(model, outputs, case, tolerance):
    """Outputs, loss, running statistics and, with a backward pass, gradients."""
    check_outputs(outputs, case, tolerance)
    loss = 0
    for i, out in enumerate(as_tuple(outputs)):
        weights = np.random.RandomState(100 + i).standard_normal(out.shape)
        loss = loss + (out * torch.from_numpy(weights).to(out)).sum() / out.numel() ** 0.5
    assert loss.item() == pytest.approx(case['loss'].item(), rel=tolerance)
    buffers = dict(model.named_buffers())
    for name, value in zip(case['buf.names'], case['buf.absmean'], strict=True):
        mean = buffers[name].abs().mean().item()
        assert mean == pytest.approx(value, rel=tolerance), name
    loss.backward()
    params = dict(model.named_parameters())
    assert set(case['grad.names']) == set(params)
    # a bias in front of a batch norm has no gradient but rounding errors
    noise, slack = (1e-12, 1) if loss.dtype == torch.float64 else (1e-5, 5)
    noise *= case['grad.norms'].max()
    for name, norm, values in zip(
        case['grad.names'], case['grad.norms'], case['grad.values'], strict=True
    ):
        grad = params[name].grad
        assert grad.norm().item() == pytest.approx(norm, rel=tolerance, abs=noise), name
        ours = probed(grad, 8)
        error = np.linalg.norm(ours - values[: ours.size])
        limit = slack * tolerance * np.linalg.norm(values[: ours.size]) + noise
        assert error <= limit, name


def listing(entries):
    lines = sorted(
        f'{name} ({", ".join(map(str, shape))}{"," * (len(shape) == 1)})'
        for name, shape in entries.items()
    )
    return len(lines), hashlib.sha256('\n'.join(lines).encode()).hexdigest()


def classifier_state(model):
    """The entries of an ImageNet file: the backbone without dense norms, and two heads."""
    state = {
        k: v
        for k, v in model.state_dict().items()
        if not k.startswith(('extra_norm.', 'h_proj.'))
    }
    return {**state, 'head.0.weight': torch.ones(4), 'aux_head.2.bias': torch.ones(2)}


class Segmentor(nn.Module):
    def __init__(self, classes=3, **kwargs):
        super().__init__()
        self.backbone = tiny(**kwargs)
        self.decode_head = nn.Conv2d(40, classes, 1)


def changed(model):
    """The same model with other values."""
    with torch.no_grad():
        for value in model.state_dict().values():
            value.add_(1)
    return model


def tool(name):
    """The command line of a tool, to extend with its arguments; it runs on the CPU."""
    hidden = ['env', 'CUDA_VISIBLE_DEVICES=']
    return [*hidden, sys.executable, str(ROOT / 'tools' / name)]


def run(command, cwd, status=0):
    result = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    assert result.returncode == status, result.stdout[-3000:] + result.stderr[-3000:]
    return result
