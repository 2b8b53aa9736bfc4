"""Stub."""

from app.components.layout import page


def training_page() -> None:
    """Stub."""
    with page("training", "training"):
        pass
