"""Shared by the command lines: arguments, and errors as plain messages."""

import argparse
import ast
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager

from ..apis.messages import DEBUG, debugging, rank
from ..errors import CheckpointError, UserError


@contextmanager
def plain_errors() -> Iterator[None]:
    """Turn errors that the user can fix into one line on stderr and exit status 2.

    Every process says it, those above rank 0 with their rank. With ``--debug``, or
    ``OVERLOCK_MM_DEBUG=1`` in the environment, the traceback comes before the line.
    """
    try:
        yield
    except (UserError, CheckpointError) as error:
        if debugging():
            traceback.print_exc()
        where = f' (rank {rank()})' if rank() else ''
        sys.stderr.write(f'error{where}: {error}\n')
        sys.exit(2)
    except KeyboardInterrupt:
        sys.stderr.write('interrupted\n')
        sys.exit(130)  # the usual status of an interrupted command


class _Debug(argparse.Action):
    """Set the environment variable, which processes started from this one see too."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, nargs=0, **kwargs)

    def __call__(self, parser, namespace, values, option_string=None):
        os.environ[DEBUG] = '1'


def add_debug_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--debug``, which :func:`plain_errors` follows."""
    parser.add_argument(
        '--debug',
        action=_Debug,
        default=argparse.SUPPRESS,
        help=f'show where an error comes from, as {DEBUG}=1 in the environment does',
    )


def add_config_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--cfg-options``."""
    from mmengine.config import DictAction  # tools without configs do not need it

    class WithDicts(DictAction):
        """Also read values with dicts in them, which mmengine's takes for text."""

        def __call__(self, parser, namespace, values, option_string=None):
            for pair in values:
                if '=' not in pair:
                    parser.error(f'{option_string}: {pair} is not KEY=VALUE')
            super().__call__(parser, namespace, values, option_string)

        def _parse_iterable(self, text):
            if 'dict(' not in text and '{' not in text:
                return DictAction._parse_iterable(text)
            try:
                return _literal(ast.parse(text.strip(), mode='eval').body)
            except (SyntaxError, ValueError) as error:
                if 'dict(' not in text:
                    return DictAction._parse_iterable(text)
                raise UserError(
                    f'--cfg-options: {text} is not a value; write dicts as in a config, '
                    "and double quotes around KEY=[dict(type='NAME')]"
                ) from error

    parser.add_argument(
        '--cfg-options',
        nargs='+',
        action=WithDicts,
        metavar='KEY=VALUE',
        help='override keys of the config, e.g. train_dataloader.batch_size=4; dicts as in '
        "a config, in double quotes: custom_hooks=[dict(type='EMAHook')]",
    )


def _literal(node: ast.expr):
    """The value of an expression in which dicts may be written as ``dict(key=value)``.

    Raises:
        ValueError: if it holds anything but values.
    """
    if isinstance(node, ast.Call) and ast.unparse(node.func) == 'dict':
        if node.args or not all(keyword.arg for keyword in node.keywords):
            raise ValueError('a dict has names and values alone')
        return {keyword.arg: _literal(keyword.value) for keyword in node.keywords}
    if isinstance(node, ast.Dict):
        keys = map(ast.literal_eval, node.keys)
        return dict(zip(keys, map(_literal, node.values), strict=True))
    if isinstance(node, ast.List | ast.Tuple):
        kind = list if isinstance(node, ast.List) else tuple
        return kind(map(_literal, node.elts))
    if isinstance(node, ast.Name | ast.Attribute):  # text without the quotes
        return ast.unparse(node)
    return ast.literal_eval(node)


def add_dtype_option(parser: argparse.ArgumentParser) -> None:
    """Add ``--dtype``."""
    parser.add_argument(
        '--dtype',
        choices=['float32', 'bfloat16', 'float16'],
        default='float32',
        help='precision of backbone, neck and the heads of segmentors (default: float32); '
        'bfloat16 is faster on CPUs that have it',
    )


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options that training and testing have in common."""
    parser.add_argument(
        '--work-dir',
        help='where logs and results go; default: work_dirs/ and the name of the config',
    )
    add_config_options(parser)
    parser.add_argument(
        '--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how distributed processes were started',
    )
    parser.add_argument(
        '--local-rank', '--local_rank', type=_local_rank, help=argparse.SUPPRESS
    )
    parser.add_argument(
        '--skip-checks',
        action='store_true',
        help='do not check the data set and classes before the run',
    )


def _local_rank(value: str) -> str:
    """Keep what an older launcher gives as an argument where mmengine looks for it."""
    os.environ.setdefault('LOCAL_RANK', value)
    return value
