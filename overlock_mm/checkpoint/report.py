"""The options of loading, and the report of what was loaded and what was not."""

from collections.abc import Sequence
from dataclasses import dataclass, field, fields

from torch import Tensor

from ..errors import CheckpointError
from .kinds import OPTION, Kind, shown


@dataclass(frozen=True)
class LoadOptions:
    """Allowed differences between a checkpoint and a model.

    Args:
        prefix: load only the keys of the file that start with this prefix, without it.
            By default a bare backbone takes ``'backbone.'`` from a whole model.
        strict: raise an error, and load nothing, if a key is missing or unexpected or has
            another shape. If False, load what fits.
        ignore_mismatched: prefixes of keys, such as ``'decode_head.conv_seg'``, that keep
            the model's values if the shape in the file is another.
        ignore_unexpected: prefixes of keys of the file that are skipped.
        trust: read files that hold more than weights and plain data, which can run code.

    Raises:
        CheckpointError: if an option has a value that it cannot have.
    """

    prefix: str | None = None
    strict: bool = True
    ignore_mismatched: Sequence[str] = ()
    ignore_unexpected: Sequence[str] = ()
    trust: bool = False

    def __post_init__(self):
        if not isinstance(self.prefix, str | None):
            raise CheckpointError(f'prefix={self.prefix!r} must be a string or None')
        for option in ('strict', 'trust'):
            if not isinstance(getattr(self, option), bool):
                raise CheckpointError(
                    f'{option}={getattr(self, option)!r} must be True or False'
                )
        for option in ('ignore_mismatched', 'ignore_unexpected'):
            given = getattr(self, option)
            prefixes = (given,) if isinstance(given, str) else given
            if not isinstance(prefixes, Sequence) or not all(
                isinstance(name, str) and name for name in prefixes
            ):
                raise CheckpointError(
                    f'{option}={given!r} must be a list of prefixes of keys, none of them '
                    "empty, for instance ['decode_head.']"
                )
            object.__setattr__(self, option, tuple(prefixes))

    @classmethod
    def take(cls, options: dict) -> 'LoadOptions':
        """Make options of the keys that are options, and remove these from a dict."""
        names = [f.name for f in fields(cls) if f.name in options]
        return cls(**{name: options.pop(name) for name in names})


@dataclass
class LoadReport:
    """The keys of a file and of a model, by what became of them."""

    source: str
    key: str  # under which the file has its weights
    file: Kind
    model: Kind
    loaded: list[str] = field(default_factory=list)
    adapted: dict[int, list[str]] = field(default_factory=dict)  # by channels of the image
    # keys that only the file or only the model has, by the reason why that is right
    skipped: dict[str, list[str]] = field(default_factory=dict)
    kept: dict[str, list[str]] = field(default_factory=dict)
    ignored: dict[str, Tensor] = field(default_factory=dict)  # tensors of the file
    ignored_because: str = 'of ignore_mismatched'
    unexpected: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    dataset_meta: dict = field(default_factory=dict)  # of the file of a whole model

    @property
    def complete(self) -> bool:
        """Whether every key was loaded, or is left out for a good reason."""
        return not (self.unexpected or self.missing or self.mismatched)

    def __str__(self) -> str:
        rows = [('loaded', self.loaded)]
        rows += [
            (f'of them adapted from 3 to {n} channels', k) for n, k in self.adapted.items()
        ]
        rows += [(f'only in the file, skipped: {w}', k) for w, k in self.skipped.items()]
        rows += [(f'only in the model, kept: {w}', k) for w, k in self.kept.items()]
        rows += [
            (f'with another shape, because {self.ignored_because}', list(self.ignored)),
            ('UNEXPECTED, not in the model', self.unexpected),
            ('MISSING from the file', self.missing),
            ('with ANOTHER SHAPE', self.mismatched),
        ]
        key = f', under {self.key!r}' if self.key else ''
        lines = [
            f'Weights of {self.source}{key}',
            f'  file:  {self.file}',
            f'  model: {self.model}',
        ]
        for what, names in rows:
            if names or what == 'loaded':
                listed = '' if what == 'loaded' else f': {shown(names)}'
                noun = 'key ' if len(names) == 1 else 'keys'
                lines.append(f'  {len(names):5d} {noun} {what}{listed}')
        if self.dataset_meta:
            classes = self.dataset_meta.get('classes')
            what = f'{len(classes)} class names' if classes else 'no class names'
            lines.append(f'  dataset_meta of the file: {what}')
        return '\n'.join(lines)

    def complaint(self, at: str, bare: bool) -> str:
        """Describe what does not fit, and what to do about it.

        Args:
            at: prefix of the backbone's keys in the model.
            bare: whether the file has a backbone alone, for a model around one.
        """
        return (
            f'{self.source} does not fit this model; nothing was loaded. '
            f'{self._problems()}. The file is {self.file}; the model is {self.model}. '
            f'{self._advice(at, bare)}'
        )

    def _problems(self) -> str:
        problems = (
            (self.missing, 'is missing from the file', 'are missing from the file'),
            (self.unexpected, 'is not in the model', 'are not in the model'),
            (self.mismatched, 'has another shape', 'have another shape'),
        )
        texts = [
            f'1 key {one}: {names[0]}'
            if len(names) == 1
            else f'{len(names)} keys {many}: {shown(names)}'
            for names, one, many in problems
            if names
        ]
        return '; '.join(texts) or 'None of its keys is in the model'

    def _advice(self, at, bare) -> str:
        """The options with which file and model fit, if there are any."""
        file, model = self.file, self.model
        if not file.arch:
            return 'Give a file of OverLoCK, or prefix= if its keys have a prefix.'
        heads = [name for name in self.missing if at and not name.startswith(at)]
        if bare and heads:
            return (
                'The file is of a backbone alone. Load it with '
                'init_cfg=dict(type="Pretrained", checkpoint=...) of the backbone.'
            )
        if heads and any(not name.startswith(at) for name in self.unexpected):
            return (
                'The file is of a model with other heads. To load its backbone alone, use '
                'init_cfg=dict(type="Pretrained", checkpoint=..., prefix="backbone.") of '
                f'the backbone{OPTION[file.layout]}.'
            )
        changes = []
        if file.arch != model.arch and not file.partial:
            changes.append(f'arch={file.arch!r}')
        if file.layout != model.layout and file.layout != 'classification':
            changes.append(f'{OPTION[file.layout].strip(" ()")}, for a {file.layout} file')
        if file.deploy and not model.deploy:
            changes.append('deploy=True, because merged branches cannot be separated')
        heads = {name.split()[0].rpartition('.')[0] for name in self.mismatched if at}
        heads = sorted(name for name in heads if not name.startswith(at))
        if heads:
            changes.append(f"ignore_mismatched={heads}, to keep the model's values there")
        if not changes:
            return 'To load what fits and keep the rest as it is, use strict=False.'
        return f'To make them fit, use {"; and ".join(changes)}.'


def dataset_meta_of(content) -> dict:
    """Classes that a checkpoint's model predicts, as the checkpoint says.

    Args:
        content: what ``read_weights`` returns.

    Returns:
        A dict with ``classes``, ``palette`` and what else there is, as the toolboxes set
        it as ``model.dataset_meta``. Older files have ``CLASSES`` and ``PALETTE`` instead.
        Empty if there is nothing.
    """
    meta = content.get('meta') if isinstance(content, dict) else None
    meta = meta if isinstance(meta, dict) else {}
    old = {k.lower(): meta[k] for k in ('CLASSES', 'PALETTE') if meta.get(k) is not None}
    new = meta.get('dataset_meta')
    new = dict(new) if isinstance(new, dict) else {}
    return {**old, **{str(k).lower(): v for k, v in new.items()}}
