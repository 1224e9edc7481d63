"""Write a config for your own images and labels: `overlock init`."""

from _guard import installed

if __name__ == '__main__':
    with installed():
        from overlock_mm.cli import main
    main('init')
