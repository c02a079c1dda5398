"""Whether an animation can be written to a path; imports nothing that draws, so that a mistake costs no seconds."""

from __future__ import annotations

from pathlib import Path

ANIMATIONS = (".gif", ".webp", ".png")
"""Kinds of files that Pillow writes several pictures into."""


def animation_problems(path: Path) -> list[str]:
    """Why no animation can be written to a path, one line each."""
    found = []
    if path.suffix.lower() not in ANIMATIONS:
        found.append(f"save_animation={str(path)!r}: ends in {path.suffix!r}; allowed: {', '.join(ANIMATIONS)}")
    if not path.parent.is_dir():
        found.append(f"save_animation={str(path)!r}: there is no folder {str(path.parent)!r}")
    return found
