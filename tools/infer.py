"""Predict images, folders and videos: `overlock infer`."""

from _guard import installed

if __name__ == '__main__':
    with installed():
        from overlock_mm.cli import main
    main('infer')
