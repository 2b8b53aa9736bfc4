"""``workbench doctor``: what is installed, where results go, what is missing for what."""

import os
import platform
import shutil
import sys
from pathlib import Path
from typing import Any

from workbench import __version__
from workbench.cli import options as given
from workbench.cli.console import print_json, print_table
from workbench.provenance import package_version

NEEDED = ("torch", "transformers", "safetensors", "numpy", "jaxtyping", "typer", "rich")

OPTIONAL = {
    "plotly": "figures and reports",
    "pandas": "data frames",
    "pyarrow": ".parquet files",
    "streamlit": "the dashboard",
    "kaleido": "figures as .png and .svg (with Chromium)",
    "transformer-lens": "the transformer-lens backend",
    "nnsight": "the nnsight backend",
    "datasets": "data sets of the hub (hf:NAME)",
    "accelerate": "models on several devices (device_map)",
}
"""What each optional package adds."""

_BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def doctor_command(store: given.StoreFolder = None, as_json: given.AsJson = False) -> None:
    """Say what this machine has and what is missing.

    The exit code is 0 whatever is missing.
    """
    found = {
        "workbench": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.machine()}",
        "packages": {name: package_version(name) for name in NEEDED},
        "optional": {name: package_version(name) for name in OPTIONAL},
        "torch": _torch(),
        "memory_free_bytes": _free_memory(),
        "store": _store(store),
        "demo_model": _has_demo(),
        "chromium": _browser(),
    }
    if as_json:
        print_json(found)
        return
    print_table(("what", "found", ""), _rows(found))


def _torch() -> dict[str, Any] | None:
    if package_version("torch") is None:
        return None
    import torch

    devices = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return {"threads": torch.get_num_threads(), "cores": os.cpu_count(), "cuda": devices}


def _free_memory() -> int | None:
    try:
        from workbench.memory import free_memory_bytes
    except ImportError:
        return None
    return free_memory_bytes()


def _store(chosen: Path | None) -> dict[str, Any]:
    from workbench.store.results import Store

    path = Store(chosen).path
    nearest = next(folder for folder in (path, *path.parents) if folder.exists())
    return {"path": path, "exists": path.exists(), "writable": os.access(nearest, os.W_OK)}


def _has_demo() -> bool:
    from workbench.models.names import demo_folder

    return (demo_folder() / "config.json").is_file()


def _browser() -> str | None:
    return next((name for name in _BROWSERS if shutil.which(name)), None)


def _rows(found: dict[str, Any]) -> list[tuple[str, str, str]]:
    torch, store, memory = found["torch"], found["store"], found["memory_free_bytes"]
    rows = [
        ("workbench", found["workbench"], ""),
        ("python", found["python"], f"{found['platform']}, {sys.executable}"),
    ]
    for name, number in found["packages"].items():
        rows.append((name, number or "missing", "" if number else "needed: pip install " + name))
    for name, number in found["optional"].items():
        rows.append((name, number or "not installed", f"for {OPTIONAL[name]}"))
    if torch:
        cuda = ", ".join(torch["cuda"]) or "none"
        rows.append(("threads", str(torch["threads"]), f"of {torch['cores']} cores"))
        rows.append(("CUDA devices", cuda, ""))
    if memory is not None:
        rows.append(("free memory", f"{memory / 1e9:.1f} GB", ""))
    state = "writable" if store["writable"] else "NOT writable; choose another with --store"
    rows.append(("store", str(store["path"]), state))
    rows.append(("demo model", "there" if found["demo_model"] else "missing", ""))
    rows.append(("Chromium", found["chromium"] or "not found", "for .png and .svg"))
    return rows
