"""Drawings of models as SVG, written by hand: nested boxes with loops, or a layered graph. From plain data alone."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from stepladder.report.words import quantity

WIDTH, PAD, GAP, ROW = 760, 14, 16, 34
BOLD, PLAIN, SMALL = 8.8, 7.4, 5.7  # width of a letter at 13, 13 and 12 pixels, rather too large
INK, MUTED, LINE, ACCENT = "#23252b", "#676b74", "#b9b4a8", "#b0480a"
FILLS = ("#fcfbf8", "#f2f5f8", "#e6edf3", "#dbe5ee", "#d0dde9")
LEAF = "#ffffff"
FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Liberation Sans', Arial, sans-serif"


def modules(tree: Mapping[str, Any]) -> str:
    """The tree of ``stepladder.diagram.modules``: what comes in at the top goes out at the bottom; arrows are loops."""
    lines: list[str] = []
    height = _box(tree, PAD, 62, WIDTH - 2 * PAD, 0, lines)
    title = f"{tree['name']}: {tree['params']:,} parameters, {quantity(tree['flops'])} FLOPs per token"
    below = f"vocabulary {tree['vocab']:,}, context {tree['context']:,}; FLOPs are forward, per token; "
    below += "of what is repeated, those of one call"
    head = [_text(PAD, 28, title, 17, INK, weight=600), _text(PAD, 48, below, 12, MUTED)]
    return _svg(WIDTH, 62 + height + PAD, title, [*head, *lines])


def _box(node: Mapping[str, Any], x: float, y: float, width: float, depth: int, lines: list[str]) -> float:
    """Draw a module and what it holds; returns its height."""
    place = len(lines)
    children = node["children"]
    shape = " × ".join(map(str, node["shape"])) if node["shape"] else ""
    facts = [shape, f"{quantity(node['params'])} params" if node["params"] else ""]
    facts += [f"{quantity(node['flops'])} FLOPs" if node["flops"] else ""]
    right = "  ·  ".join(filter(None, facts))
    times = f"  × {node['count']}" if node["count"] > 1 else ""
    kind = f"{node['name']}: {node['kind']}" if node["kind"] else node["name"]
    kind = _short(kind, int((width - 36 - len(right) * SMALL) / BOLD) - len(times))
    told = "" if node["reads"] is None else "← " + " + ".join(node["reads"])
    beside = (len(kind) + len(times)) * BOLD + len(told) * PLAIN + len(right) * SMALL + 60 < width
    below = [] if beside else textwrap.wrap(told, int((width - 40) / PLAIN))
    top = y + ROW + 18 * len(below)
    inner, spans = top, list[tuple[float, float]]()
    loops = _loops(children)
    longest = max((len(label) for *_, label in loops), default=0)
    room = 34 + longest * BOLD if loops else 0
    left, size = x + PAD, width - 2 * PAD - room
    for number, child in enumerate(children):
        high = _box(child, left, inner, size, depth + 1, lines)
        spans.append((inner, inner + high))
        inner += high + GAP
        if number + 1 < len(children) and not child["reads"]:
            middle = left + size / 2
            lines.append(_arrow(middle, inner - GAP, middle, inner - 1, MUTED))
    lines += [_loop(left + size, spans[first][0], spans[last][1], label) for first, last, label in loops]
    height = inner - y - (GAP - PAD if children else 0)
    fill = FILLS[min(depth, len(FILLS) - 1)] if children else LEAF
    drawn = [f'<rect x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="5" fill="{fill}" stroke="{LINE}"/>']
    if node["count"] > 1:  # a second card behind the first: there are several
        drawn.insert(0, drawn[0].replace(f'x="{x:g}" y="{y:g}"', f'x="{x + 4:g}" y="{y + 4:g}"'))
    drawn.append(_text(x + 10, y + 22, kind, 13, INK, weight=600, more=f"  {told}" * bool(told and beside), loud=times))
    drawn.append(_text(x + width - 10, y + 22, right, 12, MUTED, anchor="end"))
    drawn += [_text(x + 10, y + 40 + 18 * number, line, 13, MUTED) for number, line in enumerate(below)]
    lines[place:place] = drawn
    return height


def _short(text: str, letters: int) -> str:
    """The text, its middle left out if it has too many letters: names differ at either end."""
    cut = max(letters, 9) // 2
    return text if len(text) <= letters else f"{text[: cut - 1]}…{text[-cut:]}"


def _loops(children: Sequence[Mapping[str, Any]]) -> list[tuple[int, int, str]]:
    """First and last child of every loop, and what goes round in it."""
    found: list[tuple[int, int, str]] = []
    for number, child in enumerate(children):
        if child["repeat"] != 1:
            first = found.pop()[0] if child["joins"] else number
            found.append((first, number, f"{child['repeat']} ticks" if child["repeat"] else "tokens"))
    return found


def _loop(x: float, top: float, bottom: float, label: str) -> str:
    """From the bottom of the last box back to the top of the first, on their right."""
    low, high, far = bottom - 10, top + 12, x + 22
    path = f"M{x:g} {low:g} H{far:g} V{high:g} H{x + 3:g}"
    drawn = f'<path d="{path}" fill="none" stroke="{ACCENT}" stroke-width="1.8" marker-end="url(#loop)"/>'
    return drawn + _text(far + 5, (low + high) / 2 + 4, label, 12, ACCENT, weight=600)


def autograd(graph: Mapping[str, Any]) -> str:
    """The graph of ``stepladder.diagram.autograd``: the loss on top, gradients flow down, parameters are coloured."""
    nodes, edges = graph["nodes"], graph["edges"]
    layers = _layers(len(nodes), edges)
    widest = max(map(len, layers))
    step, high = 122, 58
    width, top = max(WIDTH, widest * step + 2 * PAD), 74
    place = {
        node: ((width - len(layer) * step) / 2 + (number + 0.5) * step, top + row * high)
        for row, layer in enumerate(layers)
        for number, node in enumerate(layer)
    }
    lines = []
    for before, after in edges:
        (x, y), (u, v) = place[before], place[after]
        bend = (v - y) / 2
        lines.append(
            f'<path d="M{x:g} {y + 13:g} C{x:g} {y + bend:g} {u:g} {v - bend:g} {u:g} {v - 14:g}" fill="none" '
            f'stroke="{LINE}" marker-end="url(#arrow)"/>'
        )
    for number, node in enumerate(nodes):
        x, y = place[number]
        parameter = node["parameter"]
        label = node["label"] if parameter is None else parameter
        short = label if len(label) <= 17 else "…" + label[-16:]
        fill, stroke = (LEAF, LINE) if parameter is None else ("#d0dde9", "#0f4c7a")
        lines.append(
            f'<g><title>{escape(label)}</title><rect x="{x - 57:g}" y="{y - 13:g}" width="114" height="26" rx="4" '
            f'fill="{fill}" stroke="{stroke}"/>{_text(x, y + 4, short, 11, INK, anchor="middle")}</g>'
        )
    found = sum(node["parameter"] is not None for node in nodes)
    title = f"{graph['name']}: the graph of a backward pass"
    below = f"{len(nodes):,} operations and parameters, {found} of them parameters (blue); three tokens"
    if graph["missed"]:
        below += f"; no gradient reaches {', '.join(graph['missed'])}"
    head = [_text(PAD, 28, title, 17, INK, weight=600), _text(PAD, 48, below, 12, MUTED)]
    return _svg(width, top + len(layers) * high, title, [*head, *lines])


def _layers(count: int, edges: Sequence[Sequence[int]]) -> list[list[int]]:
    """Nodes by their longest way from the top, each layer in the order of what its nodes hang from."""
    above: dict[int, list[int]] = {node: [] for node in range(count)}
    below: dict[int, list[int]] = {node: [] for node in range(count)}
    for before, after in edges:
        above[after].append(before)
        below[before].append(after)
    left = {node: len(above[node]) for node in above}
    depth = dict.fromkeys(above, 0)
    ready = [node for node in above if not left[node]]
    while ready:
        node = ready.pop()
        for after in below[node]:
            depth[after] = max(depth[after], depth[node] + 1)
            left[after] -= 1
            if not left[after]:
                ready.append(after)
    layers: list[list[int]] = [[] for _ in range(max(depth.values()) + 1)]
    for node in above:
        layers[depth[node]].append(node)
    where: dict[int, float] = {}
    for layer in layers:
        layer.sort(key=lambda node: sum(where[b] for b in above[node]) / max(1, len(above[node])))
        where.update({node: (number + 0.5) / len(layer) for number, node in enumerate(layer)})
    return layers


def _text(
    x: float, y: float, text: str, size: int, colour: str, *,
    weight: int = 400, anchor: str = "start", more: str = "", loud: str = "",
) -> str:  # fmt: skip
    extra = f'<tspan font-weight="400" fill="{MUTED}">{escape(more)}</tspan>' if more else ""
    extra += f'<tspan fill="{ACCENT}">{escape(loud)}</tspan>' if loud else ""
    look = f'font-size="{size}" font-weight="{weight}" fill="{colour}" text-anchor="{anchor}" xml:space="preserve"'
    return f'<text x="{x:g}" y="{y:g}" {look}>{escape(text)}{extra}</text>'


def _arrow(x: float, y: float, u: float, v: float, colour: str) -> str:
    return f'<path d="M{x:g} {y:g} L{u:g} {v:g}" stroke="{colour}" marker-end="url(#arrow)"/>'


def _svg(width: float, height: float, title: str, lines: Sequence[str]) -> str:
    heads = "".join(
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 Z" fill="{colour}"/></marker>'
        for name, colour in (("arrow", MUTED), ("loop", ACCENT))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" width="{width:g}" '
        f'height="{height:g}" font-family="{FONT}" role="img"><title>{escape(title)}</title><defs>{heads}</defs>'
        f'<rect width="100%" height="100%" fill="#ffffff"/>\n' + "\n".join(lines) + "\n</svg>\n"
    )
