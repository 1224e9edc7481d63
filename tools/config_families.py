"""Swap the backbone of one stock config of every family, and write a table of what works.

Each model gets a very small OverLoCK, random weights, one loss and one prediction on the
CPU. It takes up to an hour on one core.
"""

import argparse
import importlib.util
from pathlib import Path

from _guard import installed

with installed():
    from overlock_mm.apis.swap import try_model
    from overlock_mm.config.swap import swap
    from overlock_mm.errors import UserError

PACKAGES = Path(importlib.util.find_spec('mmengine').origin).parents[1]
TOOLBOXES = dict(mmdet='MMDetection', mmseg='MMSegmentation')
ARCH = dict(
    depths=(1, 1, 1, 1),
    focus_depths=(1, 1),
    embed_dims=(16, 32, 64, 128),
    kernel_sizes=(7, 7, 5, 5),
    focus_heads=(2, 2),
)
MOST = 3  # configs of a family to try until one works
HEAD = """# Stock configs with OverLoCK

One config of every family of the toolboxes (the folders of their `configs`), with its
backbone swapped as `tools/swap_backbone.py` does it. *Works* means that the model was
built with a very small OverLoCK, and that one loss with its backward pass and one
prediction succeeded on the CPU.

```bash
make families
```

wrote this table, with {versions}.
"""


def configs_of(toolbox: str) -> dict[str, list[Path]]:
    """Configs of each family, the plainest first."""
    root = Path(importlib.util.find_spec(toolbox).origin).parent / '.mim' / 'configs'
    families = {}
    for folder in sorted(root.iterdir()):
        if folder.name in ('_base_', 'common') or not folder.is_dir():
            continue
        paths = [p for p in folder.glob('*.py') if '_tta' not in p.name]
        families[folder.name] = sorted(paths, key=_plainness)
    return families


def _plainness(path: Path):
    special = sum(w in path.name for w in ('caffe', 'amp', 'hourglass', '-dc5', 'ssd'))
    return 'r50' not in path.name and 'mln' not in path.name, special, len(path.name), path


def outcome(toolbox: str, path: Path) -> tuple[bool, str]:
    """Whether a config works with OverLoCK, and how, or why not."""
    try:
        try:
            cfg, _ = swap(path, ARCH, pretrained=False)
            how = 'works'
        except UserError as error:
            if 'keep_strides' not in str(error):
                raise
            cfg, _ = swap(path, ARCH, pretrained=False, keep_strides=True)
            how = 'works with `--keep-strides`'
        try_model(cfg)
        return True, how
    except UserError as error:
        text = ' '.join(str(error).replace(str(path), path.name).split())
        return False, text.replace(f'{PACKAGES}/', '')


def check(toolbox: str, family: str, paths: list[Path]) -> tuple[str, str, str]:
    """A row of the table: family, config and outcome."""
    first = None
    for path in paths[:MOST]:
        works, text = outcome(toolbox, path)
        if works:
            return family, path.name, text
        first = first or (family, path.name, text)
    return first or (family, '', 'has no config of a model')


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('toolbox', nargs='*', choices=[*TOOLBOXES, []])
    parser.add_argument('--only', nargs='+', help='names of families; print their rows')
    parser.add_argument('--out', type=Path, default='docs/families.md')
    args = parser.parse_args()
    text = ''
    for toolbox in args.toolbox or TOOLBOXES:
        families = configs_of(toolbox)
        if args.only:
            for family in args.only:
                print('|', ' | '.join(check(toolbox, family, families[family])), '|')
            continue
        rows = []
        for family in families:
            rows.append(check(toolbox, family, families[family]))
            print('|', ' | '.join(rows[-1]), '|', flush=True)
        works = sum(row[2].startswith('works') for row in rows)
        text += f'\n## {TOOLBOXES[toolbox]}\n\n{works} of {len(rows)} families work.\n\n'
        text += '| family | config | outcome |\n|---|---|---|\n'
        text += ''.join(f'| {" | ".join(row)} |\n' for row in rows)
    if not args.only:
        args.out.write_text(HEAD.format(versions=versions()) + text)
        print(args.out)


def versions() -> str:
    """Versions of the packages that the table depends on."""
    from importlib.metadata import distributions

    names = (
        'onedl-mmdetection',
        'mmdet',
        'onedl-mmsegmentation',
        'mmsegmentation',
        'torch',
    )
    found = {d.metadata['Name']: d.version for d in distributions()}
    return ', '.join(f'{name} {found[name]}' for name in names if name in found)


if __name__ == '__main__':
    main()
