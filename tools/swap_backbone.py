"""Put OverLoCK, or a model of timm, into a config that you have: `overlock swap`."""

from _guard import installed

if __name__ == '__main__':
    with installed():
        from overlock_mm.cli import main
    main('swap')
