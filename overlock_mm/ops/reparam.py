"""Re-parameterisation: the dilated branches of a large kernel as one convolution."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from ..archs import DILATED_BRANCHES


def batch_norm_affine(
    weight: Tensor, bias: Tensor, mean: Tensor, var: Tensor, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Return scale and shift of a batch norm in evaluation mode, ``(C,)`` in float64."""
    scale = weight.double() / (var.double() + eps).sqrt()
    return scale, bias.double() - mean.double() * scale


def branch_names(kernel_size: int) -> dict[str, tuple[str, int, int]]:
    """Return the branches of a large kernel: convolution -> (batch norm, k, dilation)."""
    names = {'lk_origin': ('origin_bn', kernel_size, 1)}
    for k, r in DILATED_BRANCHES[kernel_size]:
        names[f'dil_conv_k{k}_{r}'] = (f'dil_bn_k{k}_{r}', k, r)
    return names


def merge_branches(
    state: Mapping[str, Tensor], kernel_size: int, eps: float = 1e-5
) -> tuple[Tensor, Tensor]:
    """Merge the branches of a ``DilatedReparamBlock`` and their batch norms.

    Args:
        state: state dict of the block in training form, with keys such as
            ``lk_origin.weight``.
        kernel_size: size K of the large kernel.
        eps: epsilon of the batch norms.

    Returns:
        Kernel ``(C, 1, K, K)`` and bias ``(C,)`` of the merged convolution, in float64.

    Raises:
        KeyError: if a tensor is missing.
    """
    branches = []
    for conv, (bn, _, dilation) in branch_names(kernel_size).items():
        norm = ('weight', 'bias', 'running_mean', 'running_var')
        scale, shift = batch_norm_affine(*(state[f'{bn}.{n}'] for n in norm), eps)
        kernel = state[f'{conv}.weight'].double() * scale.view(-1, 1, 1, 1)
        branches.append((kernel, shift, dilation))
    return sum_branches(branches)


def sum_branches(branches: Sequence[tuple[Tensor, Tensor, int]]) -> tuple[Tensor, Tensor]:
    """Sum parallel depth-wise convolutions into one.

    Args:
        branches: kernel ``(C, 1, k, k)``, bias ``(C,)`` and dilation of each; the first
            is the largest and has dilation 1.

    Returns:
        Kernel and bias of the sum, in the shapes of the first.
    """
    (total, bias, _), *others = branches
    total, size = total.clone(), total.shape[-1]
    for kernel, shift, dilation in others:
        reach = dilation * (kernel.shape[-1] - 1) // 2
        edge = size // 2 - reach
        span = slice(edge, edge + 2 * reach + 1, dilation)
        total[:, :, span, span] += kernel
        bias = bias + shift
    return total, bias
