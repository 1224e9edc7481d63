"""Changing configs."""


def loading_options(cfg) -> dict:
    """The config's entry for loading, as it is or as it is by default."""
    loading = cfg.setdefault('default_hooks', {}).setdefault('loading', {})
    loading.setdefault('type', 'StrictLoadingHook')
    return loading


def without_pretrained(node) -> None:
    """Remove every ``init_cfg`` that loads a file from a model config, in place."""
    if isinstance(node, dict):
        init_cfg = node.get('init_cfg')
        if isinstance(init_cfg, list):
            node['init_cfg'] = [c for c in init_cfg if not _is_pretrained(c)]
        elif _is_pretrained(init_cfg):
            node['init_cfg'] = None
        for value in node.values():
            without_pretrained(value)
    elif isinstance(node, list):
        for value in node:
            without_pretrained(value)


def _is_pretrained(init_cfg) -> bool:
    kind = init_cfg.get('type') if isinstance(init_cfg, dict) else None
    return getattr(kind, '__name__', str(kind)).split('.')[-1] in (
        'Pretrained',
        'PretrainedInit',
    )
