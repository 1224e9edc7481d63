"""Top-1 and top-5 accuracy of a classifier on a folder of images: `overlock validate`."""

from _guard import installed

if __name__ == '__main__':
    with installed():
        from overlock_mm.cli import main
    main('validate')
