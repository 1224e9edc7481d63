"""Top-1 and top-5 accuracy of a classifier on a folder of images."""

import argparse
import os
import sys

# an image that cannot be read is an error: by its default timm counts another instead
os.environ.setdefault('TIMM_DATASET_MAX_RETRIES', '1')

try:
    import timm
    import torch
    from timm.data import create_dataset, create_transform, resolve_data_config
    from torch.utils.data import DataLoader, Subset
    from tqdm import tqdm

    import overlock_mm.timm
    from overlock_mm import cli
    from overlock_mm.checkpoint import fit, form_of, read_weights, unwrap
except ModuleNotFoundError as error:
    sys.stderr.write(
        f'error: {error.name.partition(".")[0]} is not installed; in the folder of '
        "overlock_mm run: pip install -e '.[onedl]'\n"
    )
    sys.exit(2)


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        'folder',
        help='folder with one folder of images a class, in the order of the classes, or '
        'the folder that has this one as val',
    )
    parser.add_argument(
        '--model', choices=timm.list_models('overlock*'), default='overlock_t'
    )
    parser.add_argument(
        '--checkpoint',
        help='file or URL of a classifier, in training or deploy form; of several sets of '
        'weights the moving average; default: the released weights, downloaded',
    )
    parser.add_argument(
        '--trust', action='store_true', help='read the file even if it runs code'
    )
    parser.add_argument('--batch-size', type=_positive, default=64)
    parser.add_argument('--workers', type=int, default=4)
    parser.add_argument(
        '--subset',
        type=_positive,
        metavar='N',
        help='evaluate N images, spread evenly over the classes in order',
    )
    parser.add_argument('--device', default='cuda' if torch.cuda.is_available() else 'cpu')
    parser.add_argument(
        '--fold',
        action='store_true',
        help='evaluate the inference-only form (overlock_mm.fold): the same predictions '
        'up to rounding, faster',
    )
    return parser.parse_args()


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f'{value} must be at least 1')
    return value


def main():
    args = parse_args()
    device = usable_device(args.device)
    dataset = image_folder(args.folder)
    checkpoint = args.checkpoint or timm.get_pretrained_cfg(args.model).url
    cli.check_file(checkpoint, 'checkpoint')
    model = build_model(args.model, checkpoint, args.trust)
    classes = len(dataset.reader.class_to_idx)
    if classes != model.num_classes:
        raise cli.UserError(
            f'{args.folder} has {classes} classes with images, the model has '
            f'{model.num_classes}: their order would not agree; give a folder with every '
            'class, or the --checkpoint of a model of these classes'
        )
    if args.fold:
        overlock_mm.fold(model)
    config = resolve_data_config(model=model)
    dataset.transform = create_transform(**config)
    total = min(args.subset or len(dataset), len(dataset))
    loader = DataLoader(
        Subset(dataset, [i * len(dataset) // total for i in range(total)]),
        batch_size=args.batch_size,
        num_workers=args.workers,
        pin_memory=device.type == 'cuda',
    )
    try:
        top1, top5 = evaluate(model.to(device), loader, device, total)
    except RuntimeError as error:
        if 'consecutive samples' not in str(error):
            raise
        raise cli.UserError(  # timm has said which one
            f'an image of {args.folder} cannot be read; repair or remove it'
        ) from error
    print(
        f'{args.model}: top-1 {100 * top1 / total:.3f} ({top1} of {total}), top-5 '
        f'{100 * top5 / total:.3f} ({top5} of {total}); crop ratio {config["crop_pct"]}, '
        f'{config["interpolation"]}, {"x".join(map(str, config["input_size"][1:]))}'
    )


def usable_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise cli.UserError(f'--device {name} cannot be used here: {reason}') from error


def image_folder(folder: str):
    """The data set of ``folder``, whose subfolders are the classes."""
    if not os.path.isdir(folder):
        raise cli.UserError(
            f'{folder} is not a folder; give one that has a folder of images a class'
        )
    try:
        dataset = create_dataset('', folder)
    except RuntimeError as error:  # timm's reader: no images at all
        raise cli.UserError(
            f'{folder} has no images; give a folder that has a folder of images a class'
        ) from error
    for i in range(len(dataset)):
        name = dataset.filename(i)
        if name.count(os.sep) != 1:
            raise cli.UserError(
                f'{folder} has an image {name}, which is not in a folder of its class; '
                'give the folder that has the folders of the classes'
            )
    return dataset


def build_model(name: str, checkpoint: str, trust: bool):
    """The model in evaluation mode, of the form and classes of its file."""
    content = read_weights(checkpoint, trust=trust)
    _, state = unwrap(content, checkpoint)
    if 'head.4.weight' not in state:
        raise cli.UserError(f'{checkpoint} has no head.4.weight, so it is no classifier')
    classes, deploy = len(state['head.4.weight']), form_of(state).deploy
    aux_head = 'aux_head.2.weight' in state
    model = timm.create_model(name, num_classes=classes, deploy=deploy, aux_head=aux_head)
    _, state = fit(model, content, checkpoint)
    model.load_state_dict(state)
    return model.eval()


@torch.inference_mode()
def evaluate(model, loader, device, total: int) -> tuple[int, int]:
    """How many images have their class first, and among the first five."""
    top1 = top5 = 0
    with tqdm(total=total, unit='image', disable=None, leave=False) as bar:
        for images, classes in loader:
            logits = model(images.to(device))
            best = logits.topk(min(5, logits.shape[1])).indices.cpu()
            right = best == classes[:, None]
            top1 += right[:, 0].sum().item()
            top5 += right.sum().item()
            bar.update(len(images))
    return top1, top5


if __name__ == '__main__':
    with cli.plain_errors():
        main()
