"""What one run found: named arrays, headline numbers, and what produced them.

A ``Result`` is the same thing whether it was just measured or read from a store. Arrays stay on
disk until they are asked for, and torch, pandas and plotly are imported only where they are used.
"""

import dataclasses
import inspect
import typing
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from workbench import discovery
from workbench.card import card, show
from workbench.errors import StoreError, WorkbenchError
from workbench.provenance import edit_text, model_name
from workbench.registry import Probe
from workbench.settings import make_config
from workbench.store.migrations import RESULT_SCHEMA
from workbench.store.strict_json import jsonable

Arrays = Any
"""A mapping from names to numpy arrays; a run-time check of that would open a file on the disk."""

SHORT_KEY = 12
"""Characters of a key that people are shown; any unique prefix of six is accepted."""


class Result:
    """Arrays, metrics and provenance of one run.

    Every array is also an attribute, as a torch tensor on the CPU (``result.score``), and the
    names along an axis are one too (``result.tasks`` is ``result.labels["task"]``).
    """

    def __init__(
        self,
        *,
        key: str,
        probe: str,
        version: int,
        config: Mapping[str, Any],
        arrays: Arrays,
        metrics: Mapping[str, float | int],
        labels: Mapping[str, Any] | None = None,
        provenance: Mapping[str, Any] | None = None,
        path: Path | None = None,
        cached: bool = False,
    ) -> None:
        self.key = key
        self.probe = probe
        self.version = version
        self.config = dict(config)
        self.arrays = arrays
        self.labels = {
            axis: [str(name) for name in names] for axis, names in (labels or {}).items()
        }
        self.provenance = dict(provenance or {})
        self.path = path
        self.cached = cached
        self._metrics = {name: float(value) for name, value in metrics.items()}

    @classmethod
    def from_measurement(
        cls, probe: Probe, measured: Any, *, key: str, provenance: Mapping[str, Any]
    ) -> "Result":
        """Turn what a probe measured into a result.

        Args:
            probe: The probe that measured.
            measured: Its frozen dataclass: tensors (or None: not measured), ``config`` and
                optionally ``labels``.
            key: 64 hex characters that name everything the numbers depend on.
            provenance: What produced the numbers; ``model`` and ``created`` are shown in lists.
        """
        fields = {
            field.name: getattr(measured, field.name) for field in dataclasses.fields(measured)
        }
        config = fields.pop("config", None)
        labels = fields.pop("labels", None)
        arrays = {
            name: _to_numpy(name, value) for name, value in fields.items() if value is not None
        }
        return cls(
            key=key,
            probe=probe.name,
            version=probe.version,
            config={} if config is None else dataclasses.asdict(config),
            arrays=arrays,
            metrics=measured.metrics(),
            labels=labels,
            provenance=provenance,
        )

    def metrics(self) -> dict[str, float]:
        """The headline numbers, by name."""
        return dict(self._metrics)

    @property
    def model(self) -> str:
        """The name of the model that was measured, "" when none is known."""
        return model_name(self.provenance)

    @property
    def edit(self) -> str:
        """The interventions under which it was measured, in words; "" for the stock model."""
        return edit_text(self.provenance)

    @cached_property
    def measured(self) -> Any:
        """The probe's own dataclass, rebuilt from the arrays.

        Raises:
            UnknownNameError: The probe that made this result is not installed.
            StoreError: Another version of the probe stored other arrays.
        """
        import torch

        probe = discovery.find_probe(self.probe)
        config = make_config(probe.config, self.config, self.probe)
        # A probe of several modes has a result type for each.
        kind_of = getattr(probe.result, "kind_of", None)
        kind = probe.result if kind_of is None else kind_of(config)
        hints = typing.get_type_hints(kind)
        values: dict[str, Any] = {}
        for field in dataclasses.fields(kind):
            if field.name == "config":
                values["config"] = config
            elif field.name == "labels":
                values["labels"] = {axis: tuple(names) for axis, names in self.labels.items()}
            elif field.name in self.arrays:
                values[field.name] = torch.tensor(self.arrays[field.name])
            elif type(None) in typing.get_args(hints[field.name]):
                values[field.name] = None
            elif field.default is dataclasses.MISSING:
                raise StoreError(
                    f"result {self.key[:SHORT_KEY]} of {self.probe} version {self.version} has no "
                    f"array {field.name!r}, which version {probe.version} needs; run it again"
                )
        return kind(**values)

    def __getattr__(self, name: str) -> Any:
        """An array as a torch tensor, or the labels of an axis by its plural."""
        # Copying and unpickling ask for dunder names before __init__ has run.
        if name.startswith("_") or name == "arrays":
            raise AttributeError(name)
        if name in self.arrays:
            import torch

            return torch.tensor(self.arrays[name])
        axis = name.removesuffix("s")
        if name.endswith("s") and axis in self.labels:
            return list(self.labels[axis])
        known = ", ".join(sorted(self.arrays))
        raise AttributeError(
            f"this result of {self.probe} has no {name!r}; its arrays are: {known}"
        )

    def __dir__(self) -> list[str]:
        """Offer the arrays to tab completion too."""
        return sorted({*super().__dir__(), *self.arrays, *(f"{axis}s" for axis in self.labels)})

    def array_shapes(self) -> dict[str, tuple[str, tuple[int, ...]]]:
        """Type and shape of every array, without reading the arrays of a stored result."""
        describe = getattr(self.arrays, "describe", None)
        if describe is not None:
            return describe()
        return {name: (str(array.dtype), array.shape) for name, array in self.arrays.items()}

    def document(self) -> dict[str, Any]:
        """What ``result.json`` holds, ready for JSON.

        A metric that is NaN is null there, an infinite one "Infinity" or "-Infinity", so that
        every reader of JSON can read it; ``read_number`` is the way back.
        """
        return {
            "schema": RESULT_SCHEMA,
            "key": self.key,
            "probe": self.probe,
            "version": self.version,
            "metrics": jsonable(self._metrics),
            "labels": jsonable(self.labels),
            "config": jsonable(self.config, nan="NaN"),
            "provenance": jsonable(self.provenance),
        }

    def table(self) -> dict[str, list[Any]]:
        """The columns of the headline table."""
        return self.measured.table()

    def to_dataframe(self) -> Any:
        """The headline table as a pandas DataFrame.

        Raises:
            WorkbenchError: pandas is not installed.
        """
        try:
            import pandas
        except ImportError as error:
            raise WorkbenchError(missing_package("a data frame", "pandas", "view")) from error
        return pandas.DataFrame(self.table())

    def figures(self) -> dict[str, Any]:
        """The probe's plotly figures of this result, by name, the main one first.

        Raises:
            WorkbenchError: plotly is not installed.
        """
        with _asking_for_plotly():
            draw = discovery.find_figures(discovery.find_probe(self.probe))
            return {} if draw is None else draw(self.measured)

    def finding(self) -> str:
        """What was found: the probe's own sentence, or the headline numbers where it has none.

        Raises:
            WorkbenchError: plotly is not installed.
        """
        # The sentence stands beside the figures: both say a result, and neither measures.
        with _asking_for_plotly():
            draw = discovery.find_figures(discovery.find_probe(self.probe))
            say = getattr(inspect.getmodule(draw), "finding", None)
            if say is not None:
                return str(say(self.measured))
        return ", ".join(f"{name} {value:.4g}" for name, value in self._metrics.items()) + "."

    def save(self, path: str | Path) -> Path:
        """Write the result as .json, .csv, .parquet, .html, .png or .svg, by the suffix.

        The file appears whole or not at all.

        Raises:
            WorkbenchError: An unknown suffix, a package or browser that is missing, or a place
                that cannot be written.
        """
        from workbench.store.formats import save

        save(self, Path(path))
        return Path(path)

    def __repr__(self) -> str:
        """The headline, for people at a prompt."""
        numbers = ", ".join(f"{name}={value:.4g}" for name, value in self._metrics.items())
        arrays = ", ".join(
            f"{name} [{' '.join(map(str, shape))}]"
            for name, (_, shape) in self.array_shapes().items()
        )
        model = f" on {self.model}" if self.model else ""
        model += f" under {self.edit}" if self.edit else ""
        return f"<Result {self.probe}{model}, key {self.key[:SHORT_KEY]}: {numbers}; {arrays}>"

    def _repr_html_(self) -> str:
        """The card alone, for front ends that are no Jupyter."""
        return card(self)

    def _ipython_display_(self) -> None:
        """In a notebook: the card, and under it the main figure."""
        show(self)


@contextmanager
def _asking_for_plotly() -> Iterator[None]:
    """Say what to install where figures, which may import it late, find no plotly."""
    try:
        yield
    except ModuleNotFoundError as error:
        if (error.name or "").split(".")[0] != "plotly":
            raise
        raise WorkbenchError(missing_package("a figure", "plotly", "view")) from error


def missing_package(what: str, package: str, extra: str) -> str:
    """The sentence that says how to install what ``what`` needs."""
    return f"{what} needs {package}; install it: pip install 'interpretability-workbench[{extra}]'"


def _to_numpy(name: str, value: Any) -> np.ndarray:
    if hasattr(Result, name):
        raise TypeError(f"an array cannot be called {name!r}: Result has an attribute of that name")
    if isinstance(value, np.ndarray):
        return value
    if not hasattr(value, "detach"):
        raise TypeError(f"field {name!r} of a probe's result must be a tensor; got {type(value)}")
    tensor = value.detach().cpu()
    # numpy has no bfloat16, and results are float32 by contract.
    array: np.ndarray = (
        tensor.float() if str(tensor.dtype) == "torch.bfloat16" else tensor
    ).numpy()
    return array
