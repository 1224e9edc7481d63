"""Results as text and as a picture."""

import statistics


def units(side: dict) -> tuple[str, float, str, float]:
    """Units of time and memory, and the factors from seconds and bytes to them."""
    if side['pixels']:
        return 'ns/pixel', 1e9 / side['pixels'], 'B/pixel', 1 / side['pixels']
    return 'ms', 1e3, 'MiB', 2**-20


def table(result: dict) -> str:
    """The result of :func:`run_benchmark` as lines to print."""
    width = max(len(side['name']) for side in result['sides'])
    row = f'{{:{width}}}  {{:<14}}  {{:<26}}  {{}}'.format
    lines = [row('side', 'time (median)', 'spread', 'peak extra memory')]
    for side in result['sides']:
        unit, scale, memory_unit, memory_scale = units(side)
        low, high = (number(f(side['seconds']) * scale) for f in (min, max))
        median = f'{number(side["median_seconds"] * scale)} {unit}'
        peak = side['peak_extra_bytes']
        memory = '-' if peak is None else f'{number(peak * memory_scale)} {memory_unit}'
        lines.append(row(side['name'], median, f'{low} to {high} {unit}', memory))
    return '\n'.join([*lines, summary(result)])


def summary(result: dict) -> str:
    """Say in one line how much faster ours is."""
    ratio, ratios = result['median_ratio'], result['ratios']
    word = 'faster' if ratio >= 1 else 'slower'
    if ratio < 1:
        ratio, ratios = 1 / ratio, [1 / r for r in ratios]
    memory = result['memory_ratio']
    return (
        ('per pixel, ' if result['sides'][0]['pixels'] else '')
        + f'ours is {number(ratio)} times {word} ({number(min(ratios))} to '
        f'{number(max(ratios))} over {len(ratios)} rounds)'
        + (f', with {number(memory)} of its peak extra memory' if memory else '')
    )


def number(value: float) -> str:
    """Three significant digits, or all before the decimal point."""
    return f'{value:.0f}' if value >= 99.95 else f'{value:#.3g}'


def plot(result: dict, path: str) -> None:
    """Draw bars of both sides' times, with the spread, and of their memory."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4.5), layout='constrained')
    figure.suptitle(f'{result["what"]}\n{summary(result)}', fontsize='medium')
    left, right = figure.subplots(1, 2)
    for side, color in zip(result['sides'], ('tab:blue', 'tab:gray'), strict=True):
        unit, scale, memory_unit, memory_scale = units(side)
        times, name = [t * scale for t in side['seconds']], side['name'].replace(', ', '\n')
        median = statistics.median(times)
        spread = [[median - min(times)], [max(times) - median]]
        left.bar(name, median, yerr=spread, capsize=6, color=color)
        right.bar(name, (side['peak_extra_bytes'] or 0) * memory_scale, color=color)
    left.set_title(f'time, {unit} (median, lowest to highest)', fontsize='medium')
    right.set_title(f'peak extra memory, {memory_unit}', fontsize='medium')
    figure.savefig(path, dpi=120)
