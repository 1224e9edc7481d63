"""Parameters and multiply-adds of a model, part by part: `overlock flops`."""

from _guard import installed

if __name__ == '__main__':
    with installed():
        from overlock_mm.cli import main
    main('flops')
