"""Plans as text: YAML files and the comma lists of a command line."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from workbench.errors import ConfigError


def read_plan(path: Path) -> dict[str, Any]:
    """Read a plan file, without expanding it.

    Raises:
        ConfigError: It cannot be read, is no YAML, no mapping, or has a key twice.
    """
    import yaml

    try:
        document = _loader()(path.read_text("utf-8")).get_single_data()
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"the plan must be a readable file; {path}: {reason}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"the plan must be YAML in UTF-8; {path}: {_short(error)}") from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"the plan must be a mapping with models and probes; {path} holds "
            f"{type(document).__name__}"
        )
    _check_size(document, path)
    return document


MOST_VALUES = 100_000


def _check_size(document: Any, path: Path) -> None:
    """Refuse a plan that names itself, or that a few references blow up beyond all measure."""
    sizes: dict[int, int | None] = {}

    def size(value: Any) -> int:
        if not isinstance(value, dict | list):
            return 1
        known = sizes.setdefault(id(value), None) if id(value) in sizes else 0
        if known is None:
            raise ConfigError(f"a plan must end; {path} has an entry that holds itself")
        if not known:
            sizes[id(value)] = None
            items = value.values() if isinstance(value, dict) else value
            known = sizes[id(value)] = 1 + sum(map(size, items))
        return known

    if size(document) > MOST_VALUES:
        raise ConfigError(
            f"a plan must hold at most {MOST_VALUES} values; {path} stands for more; split it"
        )


def _short(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__


def _loader() -> Any:
    """YAML's safe loader, which by itself keeps the last of two equal keys in silence."""
    import yaml

    class UniqueKeys(yaml.SafeLoader):
        def construct_mapping(self, node: Any, deep: bool = False) -> Any:
            """Refuse a key that is there twice."""
            plain = [key for key, _ in node.value if not key.tag.endswith(":merge")]
            keys = [self.construct_object(key, deep=True) for key in plain]
            for key in keys:
                if keys.count(key) > 1:
                    raise ConfigError(
                        f"a plan must have each key once; {key!r} is there twice "
                        f"(line {node.start_mark.line + 1} on); join them into one"
                    )
            return super().construct_mapping(node, deep)

    return UniqueKeys


def read_list(text: str) -> Sequence[Any]:
    """A comma list of the command line; each part is read as YAML reads it (0.3 is a number).

    Raises:
        ConfigError: A part is no YAML.
    """
    import yaml

    try:
        return [yaml.safe_load(part) for part in text.split(",") if part.strip()]
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"a list must be values with commas between them; {text!r}: {_short(error)}"
        ) from error
