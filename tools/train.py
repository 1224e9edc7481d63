"""Train a detector or segmentor from a config: `overlock train`."""

from _guard import installed

if __name__ == '__main__':
    with installed():
        from overlock_mm.cli import main
    main('train')
