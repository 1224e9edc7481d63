"""Unpickling of plain data and of nothing else, so that a file cannot run code.

Only names on a fixed list are looked up, and only calls on a second list are made, with
checked arguments. On the lists is what mmengine's runner, hooks, schedulers and optimizer
wrappers write, and what released files hold. The module takes the place of ``pickle`` in
``torch.load(pickle_module=...)``, which every version of torch has.
"""

import argparse
import collections
import datetime
import importlib
import pickle
import types
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections import OrderedDict, defaultdict

import numpy as np
import torch

from ..openmmlab import Config, ConfigDict, HistoryBuffer


class Refused(Exception):
    """A file holds something that is not read without trust; the message names it."""


class Unpickler(pickle._Unpickler):
    """Python's own unpickler in Python; the one in C has no control of its calls."""

    dispatch = dict(pickle._Unpickler.dispatch)

    def find_class(self, module: str, name: str):
        """The object of a name, if it is on the list."""
        module, name = NAME_MAPPING.get((module, name), (module, name))
        module = IMPORT_MAPPING.get(module, module)
        full = f'{module}.{name}'
        if full in _NAMES:
            return _NAMES[full]
        if module == 'torch':
            found = getattr(torch, name, None)
            if isinstance(found, torch.dtype | torch.memory_format):
                return found
        if module.startswith(_SCHEDULERS):
            return _of_scheduler(module, name)
        raise Refused(full)

    def load_reduce(self):
        args, function = self.stack.pop(), self.stack.pop()
        if function is _GETATTR:
            owner, name = args
            if not isinstance(owner, type) or not isinstance(name, str):
                raise Refused('builtins.getattr')
            result = self.find_class(owner.__module__, f'{owner.__qualname__}.{name}')
        elif id(function) in _CALLS and isinstance(args, tuple):
            result = _CALLS[id(function)](*args)
        else:
            raise Refused(f'a call of {_name(function)}')
        self.append(result)

    def load_newobj(self):
        args, kind = self.stack.pop(), self.stack.pop()
        if args != () or not any(kind is allowed for allowed in _INSTANCES):
            raise Refused(f'an instance of {_name(kind)}')
        self.append(kind.__new__(kind))

    def load_build(self):
        state, instance = self.stack.pop(), self.stack[-1]
        for kind, set_state in _STATES.items():
            if type(instance) is kind or kind is np.dtype and isinstance(instance, kind):
                return set_state(instance, state)
        raise Refused(f'a state of {_name(instance)}')

    def refuse(self):
        raise Refused('an instruction that torch.save does not write')

    dispatch[pickle.REDUCE[0]] = load_reduce
    dispatch[pickle.NEWOBJ[0]] = load_newobj
    dispatch[pickle.BUILD[0]] = load_build
    for _code in 'INST', 'OBJ', 'NEWOBJ_EX', 'EXT1', 'EXT2', 'EXT4':
        dispatch[getattr(pickle, _code)[0]] = refuse


def load(file, **kwargs):
    """As ``pickle.load``."""
    return Unpickler(file, **kwargs).load()


def _fills(code: str, place, *kinds: type):
    """Let an instruction fill containers alone: it calls methods of what it fills."""
    fill = pickle._Unpickler.dispatch[getattr(pickle, code)[0]]

    def checked(unpickler):
        target = place(unpickler)
        if type(target) not in kinds:
            raise Refused(f'an addition to {_name(target)}')
        fill(unpickler)

    Unpickler.dispatch[getattr(pickle, code)[0]] = checked


_MAPPINGS = dict, OrderedDict, defaultdict, collections.Counter
_fills('APPEND', lambda u: u.stack[-2], list, collections.deque)
_fills('APPENDS', lambda u: u.metastack[-1][-1], list, collections.deque)
_fills('SETITEM', lambda u: u.stack[-3], *_MAPPINGS)
_fills('SETITEMS', lambda u: u.metastack[-1][-1], *_MAPPINGS)
_fills('ADDITEMS', lambda u: u.metastack[-1][-1], set)


def _name(item) -> str:
    """The name of a function or class, or of the class of something else."""
    named = item if hasattr(item, '__qualname__') else type(item)
    return f'{named.__module__}.{named.__qualname__}'


def _of_scheduler(module: str, name: str):
    """A function or class that a module of schedulers defines; it is not called here."""
    try:
        found = importlib.import_module(module)
        for part in name.split('.'):
            found = None if part.startswith('__') else getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise Refused(f'{module}.{name}') from error
    if not isinstance(found, types.FunctionType | type) or found.__module__ != module:
        raise Refused(f'{module}.{name}')
    return found


# Schedulers keep functions, for instance to anneal, in their state.
_SCHEDULERS = ('mmengine.optim.scheduler.', 'torch.optim.lr_scheduler')
# Stands for getattr, by which functions inside of classes are saved.
_GETATTR = object()
# Booleans, numbers, text, bytes, dates, durations and Python objects.
_DTYPE_KINDS = 'biufcUSmMO'


def _dtype(code, *_):
    # a copy: the state that follows must not change numpy's own dtypes
    dtype = np.dtype(code, False, True) if isinstance(code, str) else None
    if dtype is None or dtype.kind not in _DTYPE_KINDS or dtype.fields:
        raise Refused(f'numpy.dtype({code!r})')
    return dtype


def _set_dtype(dtype, state):
    # with other values than these, numpy would take bytes for pointers
    _, _, subarray, names, fields, size, _, flags, *_ = state
    plain = subarray is None and names is None and fields is None
    if not plain or flags != dtype.flags or size not in (-1, dtype.itemsize):
        raise Refused(f'a numpy.dtype with the state {state!r}')
    dtype.__setstate__(state)


def _array(kind, *_):
    if kind is not np.ndarray:
        raise Refused(f'an array of type {_name(kind)}')
    return np.ndarray((0,), 'b')


def _scalar(dtype, value):
    if not isinstance(dtype, np.dtype) or dtype.hasobject or type(value) is not bytes:
        raise Refused('a numpy scalar of Python objects')
    return _multiarray.scalar(dtype, value)


def _encode(text, encoding):
    if encoding not in ('latin1', 'latin-1'):  # as torch.save writes bytes
        raise Refused(f'_codecs.encode with {encoding!r}')
    return text.encode('latin1')


def _default_dict(factory=None):
    if factory is not None and factory not in (list, dict, set, int, float, OrderedDict):
        raise Refused(f'collections.defaultdict of {_name(factory)}')
    return defaultdict(factory)


def _update(instance, state):
    if type(state) is not dict or not all(type(name) is str for name in state):
        raise Refused(f'a {_name(instance)} with a state that is not a dict of attributes')
    instance.__dict__.update(state)


def _set_history(buffer, state):
    # its own __setstate__ would also change the statistics of all other buffers
    buffer._set_default_statistics()
    state.pop('statistics_methods', None)
    _update(buffer, state)


# numpy 1.26 has a numpy._core, too, and little in it
_multiarray = (np.core if np.__version__.startswith('1.') else np._core).multiarray
# What is called as it is.
_PLAIN_CALLS = [
    *(OrderedDict, collections.Counter, collections.deque, set, frozenset),
    *(slice, range, complex, bytes, bytearray),
    *(datetime.date, datetime.datetime, datetime.timedelta, datetime.timezone),
    *(types.SimpleNamespace, ConfigDict, torch.Size, torch.device),
    *(torch._utils._rebuild_tensor_v2, torch._utils._rebuild_parameter),
]
if hasattr(torch._utils, '_rebuild_tensor_v3'):
    _PLAIN_CALLS.append(torch._utils._rebuild_tensor_v3)
_CALLS = {id(item): item for item in _PLAIN_CALLS}
_CALLS |= {
    id(_encode): _encode,
    id(defaultdict): _default_dict,
    id(np.dtype): _dtype,
    id(_multiarray._reconstruct): _array,
    id(_multiarray.scalar): _scalar,
}
_INSTANCES = argparse.Namespace, HistoryBuffer, Config
_STATES = {
    OrderedDict: _update,
    argparse.Namespace: _update,
    types.SimpleNamespace: _update,
    HistoryBuffer: _set_history,
    Config: Config.__setstate__,
    np.ndarray: np.ndarray.__setstate__,
    np.dtype: _set_dtype,
}
_NAMES = {
    _name(item): item
    for item in (
        *_PLAIN_CALLS,
        *_INSTANCES,
        *(list, dict, tuple, str, int, float, bool, defaultdict, np.dtype, np.ndarray),
        *(getattr(HistoryBuffer, name) for name in ('mean', 'max', 'min', 'current')),
        torch.storage.UntypedStorage,
    )
}
_NAMES |= {
    'builtins.getattr': _GETATTR,
    '_codecs.encode': _encode,
    **{
        f'numpy.{core}.multiarray.{name}': getattr(_multiarray, name)
        for core in ('core', '_core')
        for name in ('_reconstruct', 'scalar')
    },
}
