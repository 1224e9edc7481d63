"""Draw figures of models and of what they do: `overlock visualize`."""

from _guard import installed

if __name__ == '__main__':
    with installed():
        from overlock_mm.cli import main
    main('visualize')
