"""The reference of the command line, from the commands themselves."""

import re
from typing import Any

from docs_tools.markdown import table


def command_page() -> str:
    """Every command with its arguments and options."""
    import typer

    from workbench.cli.commands import app

    root = typer.main.get_command(app)
    parts = [
        "# Command line",
        "Made from the commands themselves; `workbench COMMAND --help` prints the same. Results go to stdout, "
        "messages and progress to stderr; [exit codes](faq.md#what-do-the-exit-codes-mean).",
    ]
    for name, command in root.commands.items():  # type: ignore[attr-defined]
        parts += command_parts(f"workbench {name}", command, "##")
    return "\n\n".join(parts)


def command_parts(path: str, command: Any, level: str) -> list[str]:
    """A command, and below it the commands of a group."""
    inner = getattr(command, "commands", None)
    help_text = re.sub(r"\s+", " ", (command.help or "").split("\b")[0]).strip()
    parts = [f"{level} {path}", _escaped(help_text)]
    if inner:
        for name, each in inner.items():
            parts += command_parts(f"{path} {name}", each, level + "#")
        return parts
    arguments = [each for each in command.params if each.param_type_name == "argument"]
    options = [each for each in command.params if each.param_type_name == "option"]
    written = [_written(each) for each in arguments]
    parts.append(
        "    " + " ".join([path, "[OPTIONS]" if options else "", *written]).replace("  ", " ")
    )
    rows = [
        (f"`{name}`", "", _escaped(each.help or ""))
        for name, each in zip(written, arguments, strict=True)
    ]
    rows += [option_row(each) for each in options if not getattr(each, "hidden", False)]
    if rows:
        parts.append(table(("option", "default", "meaning"), rows))
    return parts


def _written(argument: Any) -> str:
    name = argument.metavar or argument.name.upper()
    return name if argument.required else f"[{name.strip('[]')}]"


def option_row(option: Any) -> tuple[str, str, str]:
    """How an option is written, its default, and what it means."""
    names = ", ".join([*option.opts, *option.secondary_opts])
    value = "" if getattr(option, "is_flag", False) else f" {option.metavar or 'VALUE'}"
    default = option.default
    shown = "" if default in (None, False, (), []) or callable(default) else f"`{default}`"
    needed = "required" if option.required else shown
    return f"`{names}{value}`", needed, _escaped(option.help or "")


def _escaped(text: str) -> str:
    return text.replace("<", "&lt;").replace("*", "\\*").replace("[", "\\[")
