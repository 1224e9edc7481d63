"""Convert a released checkpoint, or back: `overlock convert`."""

from _guard import installed

if __name__ == '__main__':
    with installed():
        from overlock_mm.cli import main
    main('convert')
