"""ContMix, the dynamic convolution of the Focus-Net."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import contmix
from ..ops.flops import uncounted
from ..ops.modes import is_compiling
from .layers import AdaptiveAvgPool2d, conv_bn, is_plain, resize

REGIONS = 7  # side of the grid of regions


class ContMix(nn.Module):
    """Context-mixing dynamic convolution.

    Every position compares its query with the keys of a 7 x 7 grid of regions of the
    context. From these affinities it makes its own kernels, a small one (5 x 5) and a
    large one (K x K) for every head, and mixes the values around it with them: the first
    half of the channels with the small kernels, the second half with the large ones. See
    section 3.3 of https://arxiv.org/abs/2502.20087.

    ``weight_proj``, from affinities to kernels, may be replaced by any affine module
    (a LoRA wrapper, for instance).

    Args:
        dim: channels C of the feature map and of the values, a multiple of
            ``2 * num_heads``.
        context_dim: channels Cc of the context.
        kernel_size: large kernel size K, odd.
        num_heads: heads of each of the two kernels.
        small_kernel_size: small kernel size, odd and at most K.

    Raises:
        ValueError: if the heads do not divide the channels, or a kernel size is not odd.

    Examples:
        >>> mix = ContMix(dim=64, context_dim=32, kernel_size=7, num_heads=4)
        >>> x, context = torch.rand(2, 64, 20, 30), torch.rand(2, 32, 20, 30)
        >>> mix(x, context, value=x).shape
        torch.Size([2, 64, 20, 30])
    """

    def __init__(
        self,
        dim: int,
        context_dim: int,
        kernel_size: int,
        num_heads: int,
        small_kernel_size: int = 5,
    ):
        super().__init__()
        if num_heads < 1 or dim < 1 or dim % (2 * num_heads):
            raise ValueError(
                f'dim={dim} must be a multiple of 2 * {num_heads} heads: each half of the '
                'channels is divided into the heads'
            )
        if not (kernel_size % 2 and small_kernel_size % 2):
            raise ValueError(
                f'kernel sizes {small_kernel_size} and {kernel_size} must be odd'
            )
        if not 1 <= small_kernel_size <= kernel_size:
            raise ValueError(
                f'small_kernel_size={small_kernel_size} must be within 1..{kernel_size}, '
                'the large kernel size'
            )
        self.dim, self.context_dim = dim, context_dim
        self.kernel_sizes = (small_kernel_size, kernel_size)
        self.num_heads = num_heads
        self.query_scale = (dim // num_heads) ** -0.5
        self.weight_query = conv_bn(dim, dim // 2)
        self.weight_key = nn.Sequential(
            AdaptiveAvgPool2d(REGIONS), *conv_bn(context_dim, dim // 2)
        )
        self.weight_proj = nn.Conv2d(REGIONS**2, sum(k * k for k in self.kernel_sizes), 1)
        self.rpb1, self.rpb2 = (
            nn.Parameter(torch.zeros(num_heads, 2 * k - 1, 2 * k - 1))
            for k in self.kernel_sizes
        )
        self._known_affine = None

    def forward(self, x: Tensor, context: Tensor, value: Tensor) -> Tensor:
        """Mix the values.

        Args:
            x: feature map, from which the queries are made, ``(N, C, H, W)``.
            context: context, from which the keys are made, ``(N, Cc, H, W)``.
            value: values, ``(N, C, H, W)``.

        Returns:
            ``(N, C, H, W)``, in the dtype of ``value``.

        Raises:
            TypeError: if ``weight_proj`` was replaced by a module that is not affine.
        """
        size = value.shape[-2:]
        x, context, value = (self.enlarged(t, size) for t in (x, context, value))
        query = self.weight_query(x)
        if self.query_scale != 1:  # else it was merged into the weights
            query = query * self.query_scale
        key = self.weight_key(context).flatten(2)
        out = contmix(
            query.unflatten(1, (self.num_heads, -1)),
            key.unflatten(1, (self.num_heads, -1)),
            value,
            *self.projection(),
            (self.rpb1, self.rpb2),
            self.kernel_sizes,
        )
        return F.adaptive_avg_pool2d(out, size) if self._is_small(size) else out

    def enlarged(self, x: Tensor, size: Sequence[int]) -> Tensor:
        """Resize ``x`` if a map of this size is smaller than the large kernel.

        The short side gets the kernel size, the long side grows in proportion.
        """
        if not self._is_small(size):
            return x
        large, short = self.kernel_sizes[1], min(size)
        return resize(x, [large if s == short else int(large / short * s) for s in size])

    def _is_small(self, size: Sequence[int]) -> bool:
        return min(size) < self.kernel_sizes[1]

    def projection(self) -> tuple[Tensor, Tensor]:
        """Weight ``(taps, 49)`` and bias ``(taps,)`` of ``weight_proj``.

        The op needs them because it applies the projection to the keys. They are read
        from a plain convolution. Any other module, or one with hooks, is called on unit
        vectors, so that nothing that was put in its place is passed over.
        """
        proj = self.weight_proj
        if is_plain(proj, nn.Conv2d) and proj.bias is not None:
            return proj.weight.flatten(1), proj.bias
        if self._known_affine != id(proj) and not is_compiling():
            self._check_affine(proj)
            self._known_affine = id(proj)
        return self._probe(proj)

    def _probe(self, proj: nn.Module, scale: float = 1.0) -> tuple[Tensor, Tensor]:
        like, regions = self.rpb1, REGIONS**2
        vectors = torch.zeros(regions, regions + 1, dtype=like.dtype, device=like.device)
        vectors.fill_diagonal_(scale)  # the last column stays zero: it gives the bias
        with torch.autocast(like.device.type, enabled=False), uncounted():
            out = proj(vectors[None, :, None])[0, :, 0]
        return out[:, :regions] - out[:, regions:], out[:, regions]

    @torch.no_grad()
    def _check_affine(self, proj: nn.Module) -> None:
        modes = [(module, module.training) for module in proj.modules()]
        proj.eval()  # without dropout
        (once, _), (twice, _) = self._probe(proj), self._probe(proj, scale=-2.0)
        for module, mode in modes:
            module.training = mode
        tolerance = 1e-2 * once.abs().max().item()
        if not torch.allclose(-2 * once, twice, rtol=1e-2, atol=tolerance):
            raise TypeError(
                f'weight_proj was replaced by a {type(proj).__name__} that is not affine; '
                'ContMix needs an affine projection (a 1x1 convolution, with LoRA or the '
                'like beside it)'
            )
