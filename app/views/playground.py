"""Stub."""

from app.components.layout import page


def playground_page() -> None:
    """Stub."""
    with page("playground", "playground"):
        pass
