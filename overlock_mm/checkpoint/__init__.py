"""Checkpoints: read safely, recognised, matched with a model, loaded with a report."""

from .download import RELEASE, cannot_download, download
from .files import plain_data_allowed, read_weights, write_weights
from .forms import Form, form_of, unwrap, unwrapped
from .matching import LoadReport, fit, load_checkpoint

__all__ = [
    'RELEASE',
    'Form',
    'LoadReport',
    'cannot_download',
    'download',
    'fit',
    'form_of',
    'load_checkpoint',
    'plain_data_allowed',
    'read_weights',
    'unwrap',
    'unwrapped',
    'write_weights',
]
