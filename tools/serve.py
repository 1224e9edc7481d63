"""Predict images on a page in the browser: `overlock serve`."""

from _guard import installed

if __name__ == '__main__':
    with installed():
        from overlock_mm.cli import main
    main('serve')
