"""Write a trained model as a file for other runtimes: `overlock export`."""

from _guard import installed

if __name__ == '__main__':
    with installed():
        from overlock_mm.cli import main
    main('export')
