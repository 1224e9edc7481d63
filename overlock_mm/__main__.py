"""``python -m overlock_mm``, the same as ``overlock``."""

from .cli import main

if __name__ == '__main__':
    main()
