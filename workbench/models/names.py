"""What a model may be called: a hub id, a folder, ``demo`` or ``toy:DIR``."""

from importlib.resources import files
from pathlib import Path


def demo_folder() -> Path:
    """The folder of the embedded demo model."""
    return Path(str(files("workbench") / "assets" / "demo"))


def resolve_model(name: str) -> str:
    """Turn ``demo`` and ``toy:DIR`` into a folder; other names pass."""
    if name == "demo":
        return str(demo_folder())
    return name.removeprefix("toy:")


def looks_local(name: str) -> bool:
    """Whether a name means a folder: a path, ``demo`` or ``toy:DIR``, or a folder that exists."""
    if name == "demo" or name.startswith("toy:"):
        return True
    return Path(name).is_absolute() or name.startswith((".", "~")) or Path(name).exists()
