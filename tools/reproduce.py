"""Evaluate or train what was published, and compare: `overlock reproduce`."""

from _guard import installed

if __name__ == '__main__':
    with installed():
        from overlock_mm.cli import main
    main('reproduce')
