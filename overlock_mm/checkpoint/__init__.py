"""Checkpoints: read safely, recognised, matched with a model, loaded with a report."""

from .downloading import RELEASE, cannot_download, download
from .files import plain_data_allowed, read_weights, write_weights
from .kinds import Kind, form_of, unwrap, unwrapped
from .matching import check_form, fit, load_checkpoint
from .report import LoadOptions, LoadReport, dataset_meta_of

__all__ = [
    'RELEASE',
    'Kind',
    'LoadOptions',
    'LoadReport',
    'cannot_download',
    'check_form',
    'dataset_meta_of',
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
