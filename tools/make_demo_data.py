"""Make the demo data set: `overlock demo-data`."""

from _guard import installed

if __name__ == '__main__':
    with installed('onedl,demo'):
        from overlock_mm.cli import main
    main('demo_data')
