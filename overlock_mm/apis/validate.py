"""Top-1 and top-5 accuracy of a classifier on a folder of images."""

import os
from typing import NamedTuple

import timm
import torch
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_data_config
from torch import nn
from torch.utils.data import DataLoader, Dataset, Subset
from tqdm import tqdm

from .. import timm as _registered  # noqa: F401  registers the models with timm
from ..checkpoint import fit, form_of, read_weights, unwrap
from ..errors import UserError
from ..models import fold as fold_backbone
from .devices import usable_device


class Accuracy(NamedTuple):
    """Count images whose class is the first (top-1) or among the first five (top-5)."""

    model: str
    top1: int
    top5: int
    total: int
    crop_ratio: float
    interpolation: str
    size: tuple[int, int]

    def __str__(self) -> str:
        first, five = (100 * hits / self.total for hits in (self.top1, self.top5))
        return (
            f'{self.model}: top-1 {first:.3f} ({self.top1} of {self.total}), top-5 '
            f'{five:.3f} ({self.top5} of {self.total}); crop ratio {self.crop_ratio}, '
            f'{self.interpolation}, {"x".join(map(str, self.size))}'
        )


def validate(
    folder: str,
    model: str = 'overlock_t',
    checkpoint: str | None = None,
    trust: bool = False,
    batch_size: int = 64,
    workers: int = 4,
    subset: int | None = None,
    device: str | None = None,
    fold: bool = False,
) -> Accuracy:
    """Evaluate a classifier.

    Args:
        folder: a folder with one folder of images for each class, in the order of the
            classes, or the folder that has this one as ``val``.
        model: name of a timm model of this package.
        checkpoint: file or URL of its weights, in training or deploy form. Of several
            sets of weights in a file the moving average is taken. By default the released
            weights, which are downloaded.
        trust: read the file even if that runs code in it.
        batch_size: images in a batch.
        workers: processes that load images.
        subset: evaluate so many images, spread evenly over the classes in order.
        device: by default cuda where there is one, else cpu.
        fold: evaluate the inference-only form, see :func:`overlock_mm.fold`.

    Returns:
        Accuracy: the counts, and how images were prepared.

    Raises:
        UserError: if the folder, an image in it or the device cannot be used, or if the
            folder has another number of classes than the model.
        CheckpointError: if the weights cannot be read, or do not fit the model.
    """
    device = usable_device(device)
    images = ImageFolder(folder)
    net = build_classifier(model, checkpoint or timm.get_pretrained_cfg(model).url, trust)
    if images.num_classes != net.num_classes:
        raise UserError(
            f'{folder} has {images.num_classes} classes with images, the model has '
            f'{net.num_classes}: their order would not agree; give a folder with every '
            'class, or the checkpoint of a model of these classes'
        )
    if fold:
        fold_backbone(net)
    config = resolve_data_config(model=net)
    images.transform = create_transform(**config)
    total = min(subset or len(images), len(images))
    loader = DataLoader(
        Subset(images, [i * len(images) // total for i in range(total)]),
        batch_size=batch_size,
        num_workers=workers,
        pin_memory=device.type == 'cuda',
    )
    try:
        top1, top5 = evaluate(net.to(device), loader, device)
    except UserError as error:
        # raised in a worker process, it is the last line of a traceback
        line = str(error).strip().splitlines()[-1]
        raise UserError(line.rpartition(f'{UserError.__name__}: ')[2]) from error
    size = tuple(config['input_size'][1:])
    how = config['crop_pct'], config['interpolation'], size
    return Accuracy(model, top1, top5, total, *how)


class ImageFolder(Dataset):
    """Images in one folder for each class, as timm reads them.

    timm's own data set replaces an image that it cannot read by another one. Here that is
    an error.
    """

    def __init__(self, folder: str) -> None:
        self.transform = None
        layout = 'give a folder that has one folder of images for each class'
        if not os.path.isdir(folder):
            raise UserError(f'{folder} is not a folder; {layout}')
        try:
            self.reader = create_dataset('', folder).reader  # it looks for val
        except RuntimeError as error:  # no images at all
            raise UserError(f'{folder} has no images; {layout}') from error
        for name in map(self.reader.filename, range(len(self))):
            if name.count(os.sep) != 1:
                raise UserError(
                    f'{folder} has an image {name}, which is not in a folder of its class; '
                    f'{layout}'
                )

    @property
    def num_classes(self) -> int:
        return len(self.reader.class_to_idx)

    def __len__(self) -> int:
        return len(self.reader)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        file, label = self.reader[index]
        try:
            image = Image.open(file).convert('RGB')
        except OSError as error:
            path = self.reader.filename(index, absolute=True)
            raise UserError(f'image {path} cannot be read; repair or remove it') from error
        return self.transform(image), label


def build_classifier(name: str, checkpoint: str, trust: bool = False) -> nn.Module:
    """The model in evaluation mode, with the form and the classes of its checkpoint.

    Args:
        name: name of a timm model of this package.
        checkpoint: file or URL of its weights.
        trust: read the file even if that runs code in it.
    """
    content = read_weights(checkpoint, trust=trust)
    _, state = unwrap(content, checkpoint)
    if 'head.4.weight' not in state:
        raise UserError(f'{checkpoint} has no head.4.weight, so it is no classifier')
    model = timm.create_model(
        name,
        num_classes=len(state['head.4.weight']),
        deploy=form_of(state).deploy,
        aux_head='aux_head.2.weight' in state,
    )
    _, state = fit(model, content, checkpoint)
    model.load_state_dict(state)
    return model.eval()


@torch.inference_mode()
def evaluate(model: nn.Module, loader: DataLoader, device: torch.device) -> tuple[int, int]:
    """Count the images whose class is first, and those where it is among the first five."""
    top1 = top5 = 0
    total = len(loader.dataset)
    with tqdm(total=total, unit='image', disable=None, leave=False) as bar:
        for images, labels in loader:
            logits = model(images.to(device))
            best = logits.topk(min(5, logits.shape[1])).indices.cpu()
            right = best == labels[:, None]
            top1 += right[:, 0].sum().item()
            top5 += right.sum().item()
            bar.update(len(images))
    return top1, top5
