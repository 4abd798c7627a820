"""The HTML page of a report: the error of every layer, plotted over depth and listed in a table.

The curves are inline SVG instead of an image, so that every point shows the name of its layer.
"""

from __future__ import annotations

import itertools
import math
import re
from html import escape

from parity.compare.layers import OUTPUTS, PARAMETERS, Row
from parity.compare.report import Findings
from tinyllm.tools.plot import COLORS, GREY, LIGHT

WIDTH, HEIGHT, LEFT, RIGHT, TOP, BOTTOM = 1080, 300, 64, 34, 20, 58

SIDES = ("the twin", "transformers")

STYLE = """
:root { --bad: #c62828; --good: #2e7d32; }
body { font: 15px/1.5 system-ui, sans-serif; color: #1d2329; background: #fff; max-width: 1120px;
  margin: 2rem auto; padding: 0 1.2rem; }
h1 { font-size: 1.6rem; margin: 0 0 .6rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .3rem; }
.verdict { padding: .7rem 1rem; border-left: 5px solid var(--good); background: #eef7ef; }
.verdict.bad { border-color: var(--bad); background: #fdeeee; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; margin: 1rem 0; }
dt { color: var(--dim); } dd { margin: 0; }
p.note, li { color: #3d444d; margin: .3rem 0; white-space: pre-line; }
svg { width: 100%; height: auto; display: block; }
svg text { font: 11px system-ui, sans-serif; fill: var(--dim); }
.grid { stroke: var(--line); } .block { stroke: #f0f2f4; } .bound { stroke: var(--bad); fill: none;
  stroke-width: 1.5; stroke-dasharray: 6 4; } .s0 { --c: var(--twin); } .s1 { --c: var(--theirs); }
.curve { fill: none; stroke: var(--c); stroke-opacity: .45; stroke-width: 1.2; } .dot { fill: var(--c); }
.hollow { fill: #fff; stroke: var(--c); stroke-width: 1.4; }
path.broken { stroke: var(--bad); } svg text.broken { fill: var(--bad); font-weight: 600; }
table { border-collapse: collapse; width: 100%; font-size: 13px; font-variant-numeric: tabular-nums; }
th { position: sticky; top: 0; background: #f6f7f9; text-align: left; font-weight: 600; }
th, td { padding: .22rem .5rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
td.n, th.n { text-align: right; } td code { font-size: 12.5px; } tr.bad td { background: #fdeeee; }
tr.part td { background: #eef1f5; font-weight: 600; } .ok { color: var(--good); } .no { color: var(--bad);
  font-weight: 600; } .dim { color: var(--dim); }
"""

COLOURS = f":root {{ --twin: {COLORS[0]}; --theirs: {COLORS[1]}; --line: {LIGHT}; --dim: {GREY}; }}"


def render(findings: Findings) -> str:
    """The whole page as text."""
    forward = [line for line in findings.lines if _row(line).kind == OUTPUTS]
    backward = [line for line in findings.lines if _row(line).kind != OUTPUTS]
    facts = "".join(f"<dt>{escape(k)}<dd>{escape(v)}" for k, v in findings.facts.items())
    lone = "".join(
        f"<li>Only {escape(side)}: {', '.join(f'<code>{escape(name)}</code>' for name in names)}."
        for side, names in findings.one_sided().items()
        if names
    )
    notes = "".join(f"<p class=note>{escape(note)}" for note in findings.notes)
    return f"""<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width">
<title>parity: {escape(findings.facts.get("model", "report"))}</title><style>{COLOURS}{STYLE}</style>
<h1>tinyllm compared with PyTorch</h1>
<p class="verdict{"" if findings.first is None else " bad"}">{_verdict(findings)}
<dl>{facts}</dl>
<h2>Forward pass: error of every layer's output</h2>
{_legend(parameters=False)}{_plot(forward)}
<h2>Backward pass: error of every gradient</h2>
{_legend(parameters=True)}{_plot(backward)}
<h2>Method</h2>
{notes}
<ul>{lone}</ul>
<h2>Every layer, in the order of computation</h2>
{_table(findings, forward, backward)}
</html>
"""


def _row(line) -> Row:
    return line[0] or line[1]


def _verdict(findings: Findings) -> str:
    link = "" if findings.first is None else ' <a href="#first">Go to its row in the table.</a>'
    return escape(findings.verdict()) + link


# ---- The curves ----


def _legend(parameters: bool) -> str:
    """One line of swatches; ``parameters`` adds that of the hollow points."""

    def item(x: int, shape: str, text: str) -> str:
        return f'<g transform="translate({x} 10)">{shape}<text x="24" y="4">{text}</text></g>'

    dot = '<path class="curve {0}" d="M0 0H18"/><circle class="dot {0}" cx="9" r="3.5"/>'.format
    items = [item(LEFT, dot("s0"), "against the PyTorch twin"), item(260, dot("s1"), "against transformers")]
    items.append(item(430, '<path class="bound" d="M0 0H18"/>', "bound"))
    if parameters:
        hollow = '<circle class="hollow s0" cx="6" r="3.5"/><circle class="hollow s1" cx="16" r="3.5"/>'
        items.append(item(510, hollow, "gradient of a parameter (filled: gradient of a layer's output)"))
    return f'<svg viewBox="0 0 {WIDTH} 20">{"".join(items)}</svg>'


def _plot(lines) -> str:
    """SVG of the relative error (log scale) of the layers in the order of computation, with the bound."""
    values = [row.relative for line in lines for row in line if row and 0 < row.relative < math.inf]
    bounds = [_row(line).bound for line in lines]
    low = math.floor(math.log10(min([*values, min(bounds) / 10]))) - 1  # the lowest grid line is 0
    high = math.ceil(math.log10(max([*values, *bounds]))) + 1
    step = (WIDTH - LEFT - RIGHT) / len(lines)
    bottom = HEIGHT - BOTTOM

    def x(i: float) -> float:
        return LEFT + (i + 0.5) * step

    def y(value: float) -> float:  # nan and infinity at the top
        level = low if value == 0 else math.log10(value) if 0 < value < math.inf else high
        return TOP + (high - level) / (high - low) * (bottom - TOP)

    parts = []
    for level in range(low, high + 1, max(1, (high - low) // 8)):
        at = y(10.0**level)
        label = "0" if level == low else f"1e{level}"
        parts.append(f'<path class="grid" d="M{LEFT} {at:.1f}H{WIDTH - RIGHT}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{at + 4:.1f}" text-anchor="end">{label}</text>')
    parts += _blocks([_row(line).name for line in lines], x, step, bottom)
    path = "L".join(f"{x(i):.1f} {y(bound):.1f}" for i, bound in enumerate(bounds))
    parts.append(f'<path class="bound" d="M{LEFT} {y(bounds[0]):.1f}L{path}H{WIDTH - RIGHT}"/>')
    radius = max(2.0, min(4.0, step / 2.2))
    for side in (1, 0):  # the twin's points are smaller and on top, so that both of an equal pair show
        points = [(i, line[side]) for i, line in enumerate(lines) if line[side]]
        curve = "L".join(f"{x(i):.1f} {y(r.relative):.1f}" for i, r in points if r.kind != PARAMETERS)
        parts.append(f'<path class="curve s{side}" d="M{curve}"/>')
        for i, row in points:
            shape = "hollow" if row.kind == PARAMETERS else "dot"
            title = f"{row}: {row.relative:.2e} against {SIDES[side]}, bound {row.bound:.1e}"
            parts.append(
                f'<circle class="{shape} s{side}" cx="{x(i):.1f}" cy="{y(row.relative):.1f}" '
                f'r="{radius if side else 0.65 * radius:.1f}"><title>{escape(title)}</title></circle>'
            )
    broken = [i for i, line in enumerate(lines) if not _agrees(line)]
    if broken:
        at, name = x(broken[0]), escape(_row(lines[broken[0]]).name)
        end = "end" if at > WIDTH / 2 else "start"
        parts.append(f'<path class="broken" d="M{at:.1f} {TOP}V{bottom}"/>')
        parts.append(
            f'<text class="broken" x="{at:.1f}" y="{TOP - 7}" text-anchor="{end}">{name} differs</text>'
        )
    parts.append(f'<text x="{LEFT}" y="{HEIGHT - 4}">order of computation →</text>')
    middle = (TOP + bottom) / 2
    parts.append(
        f'<text text-anchor="middle" transform="translate(12 {middle}) rotate(-90)">relative error</text>'
    )
    return f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img">{"".join(parts)}</svg>'


def _blocks(names: list[str], x, step: float, bottom: float) -> list[str]:
    """A line where each block (h.0, h.1 …) or single layer begins, with its name if there is space."""
    parts, free = [], 0.0  # free: x coordinate where the last name ends
    for group, indices in itertools.groupby(range(len(names)), key=lambda i: _block(names[i])):
        indices = list(indices)
        start, end = x(indices[0]) - step / 2, x(indices[-1]) + step / 2
        parts.append(f'<path class="block" d="M{start:.1f} {TOP}V{bottom}"/>')
        middle = (start + end) / 2
        if end - start > 7 * len(group):  # the name fits below its block; otherwise it is slanted
            at = f'x="{middle:.1f}" y="{bottom + 16}" text-anchor="middle"'
            parts.append(f"<text {at}>{escape(group)}</text>")
            free = middle + 3.5 * len(group)
        elif start >= free:
            place = f"translate({middle - 3:.1f} {bottom + 12}) rotate(50)"
            parts.append(f'<text transform="{place}">{escape(group)}</text>')
            free = start + 13
    return parts


def _block(name: str) -> str:
    """The block or single layer of a name: h.0 for h.0.attn.c_proj, wte for wte.weight."""
    numbered = re.match(r".*?\.\d+(?=\.|$)", name)
    return numbered[0] if numbered else name.partition(".")[0]


def _agrees(line) -> bool:
    return all(row is None or row.agrees for row in line)


# ---- The table ----


def _table(findings: Findings, forward, backward) -> str:
    head = (
        "<tr><th>layer<th>compared<th>shape<th class=n>twin: max abs<th class=n>relative"
        "<th class=n>transformers: max abs<th class=n>relative<th class=n>bound<th>verdict"
    )
    first = findings.first[0] if findings.first else None
    rows = [_part("Forward"), *(_table_row(line, first) for line in forward)]
    rows += [_part("Backward"), *(_table_row(line, first) for line in backward)]
    return f"<table><thead>{head}</thead><tbody>{''.join(rows)}</tbody></table>"


def _part(title: str) -> str:
    return f"<tr class=part><td colspan=9>{title}"


def _table_row(line, first: Row | None) -> str:
    row = _row(line)
    cells = "".join(
        f"<td class=n>{r.absolute:.1e}<td class=n>{r.relative:.1e}" if r else "<td class=n>–<td class=n>–"
        for r in line
    )
    agrees = _agrees(line)
    verdict = "<span class=ok>agrees</span>" if agrees else "<span class=no>differs</span>"
    mark = ' id="first"' if any(r is first for r in line if r) else ""
    bad = "" if agrees else " class=bad"
    return (
        f"<tr{mark}{bad}><td><code>{escape(row.name)}</code><td class=dim>{row.kind}<td class=dim>{row.shape}"
        f"{cells}<td class='n dim'>{row.bound:.1e}<td>{verdict}"
    )
