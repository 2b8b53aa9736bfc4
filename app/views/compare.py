"""Stub."""

from app.components.layout import page


def compare_page() -> None:
    """Stub."""
    with page("compare", "compare"):
        pass
