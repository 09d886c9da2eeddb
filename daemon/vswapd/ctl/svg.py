"""The status screen as a picture that needs nothing from anywhere: one SVG file.

This module must not know where the document comes from.
"""

from __future__ import annotations

import io
import re
from typing import Final

from rich.console import Console, RenderableType
from rich.terminal_theme import TerminalTheme

COLUMNS: Final = 80
_THEME: Final = TerminalTheme(
    (30, 32, 40),
    (214, 218, 226),
    [
        (69, 73, 86), (232, 92, 92), (125, 196, 116), (233, 196, 106),
        (97, 160, 232), (198, 133, 215), (96, 196, 205), (214, 218, 226),
    ],
)  # fmt: skip
_FONT_PX: Final = 20
"""What rich's export draws with."""
_ASPECT: Final = 0.602
"""Width of a character by its height, in DejaVu Sans Mono."""
_LEADING: Final = re.compile(
    r'x="(?P<x>[\d.]+)" y="(?P<y>[\d.]+)" textLength="(?P<length>[\d.]+)"(?P<rest>[^>]*)>'
    "(?P<spaces>(?:&#160;)+)(?=[^<&]|&[^#])"
)
"""Blanks at the beginning of a text: some renderers drop them, and all that follows moves."""
_FORMAT: Final = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" \
xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{
  font-family: "DejaVu Sans Mono", Menlo, Consolas, "Liberation Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width;
}}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal">
<rect x="0" y="0" width="{terminal_width}" height="{terminal_height}" />
</clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g>
</g>
</svg>
"""
"""Rich's own format, less the fonts that it would have a reader's browser fetch."""


def picture(screen: RenderableType, title: str) -> str:
    """The SVG text of a screen at 80 columns."""
    console = Console(
        record=True,
        width=COLUMNS,
        file=io.StringIO(),
        force_terminal=True,
        color_system="truecolor",
    )
    console.print(screen)
    text = console.export_svg(
        title=title,
        theme=_THEME,
        code_format=_FORMAT,
        font_aspect_ratio=_ASPECT,
        unique_id="vswapctl",
    )
    return _LEADING.sub(_without_leading, text)


def _without_leading(found: re.Match[str]) -> str:
    """A text element that begins where its first visible character stands."""
    spaces = found["spaces"].count("&#160;")
    width = _FONT_PX * _ASPECT
    x = float(found["x"]) + spaces * width
    length = float(found["length"]) - spaces * width
    return f'x="{x:g}" y="{found["y"]}" textLength="{length:g}"{found["rest"]}>'
