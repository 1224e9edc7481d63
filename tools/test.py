"""Evaluate a checkpoint of a detector or segmentor: `overlock test`."""

from _guard import installed

if __name__ == '__main__':
    with installed():
        from overlock_mm.cli import main
    main('test')
