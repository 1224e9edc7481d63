"""Merge the dilated branches of a trained model: `overlock deploy`."""

from _guard import installed

if __name__ == '__main__':
    with installed():
        from overlock_mm.cli import main
    main('deploy')
