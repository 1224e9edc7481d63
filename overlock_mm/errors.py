"""The exceptions that a user may see."""


class UserError(Exception):
    """Something that the user can fix; the message says what is wrong and how to fix it."""


class CheckpointError(RuntimeError):
    """A checkpoint cannot be found, read or matched; the message says how to go on."""


class CheckpointNotFoundError(CheckpointError, FileNotFoundError):
    """There is no file at the given path."""
