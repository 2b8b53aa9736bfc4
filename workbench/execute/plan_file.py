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
        document = yaml.load(path.read_text("utf-8"), Loader=_loader())
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"the plan must be a readable file; {path}: {reason}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        text = " ".join(str(error).split())
        raise ConfigError(f"the plan must be YAML in UTF-8; {path}: {text}") from error
    if not isinstance(document, dict):
        raise ConfigError(
            f"the plan must be a mapping with models and probes; {path} holds "
            f"{type(document).__name__}"
        )
    return document


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
    """A comma list of the command line; each part is read as YAML reads it (0.3 is a number)."""
    import yaml

    return [yaml.safe_load(part) for part in text.split(",") if part.strip()]
