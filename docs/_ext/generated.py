"""Parts of reference pages that are made from the code: fields of the result schema, program help.

Types and defaults come from the models, meanings from the page; a field without a meaning, or a
meaning without a field, is an error, so the page cannot fall behind.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from docutils import nodes
from sphinx.util.docutils import SphinxDirective

if TYPE_CHECKING:
    from sphinx.application import Sphinx


class ResultModel(SphinxDirective):
    """Fields of a model of `kvarn_eval.schema` as a table; content: ``field: meaning`` lines."""

    required_arguments = 1
    has_content = True

    def run(self) -> list[nodes.Node]:
        """Build the table."""
        from kvarn_eval import schema

        fields = getattr(schema, self.arguments[0]).model_fields
        meanings = dict(line.split(": ", 1) for line in self.content if line.strip())
        if wrong := set(fields) ^ set(meanings):
            raise self.error(f"{self.arguments[0]}: describe exactly its fields, see {wrong}.")
        rows = [
            f"| `{name}` | `{type_name(field.annotation)}` | {default(field)} | {meanings[name]} |"
            for name, field in fields.items()
        ]
        head = ["| field | type | default | meaning |", "|---|---|---|---|"]
        return self.parse_text_to_nodes("\n".join(head + rows))


class Members(SphinxDirective):
    """Values of an enumeration of `kvarn_eval.schema`, in one line."""

    required_arguments = 1

    def run(self) -> list[nodes.Node]:
        """List the values."""
        from kvarn_eval import schema

        values = [f"`{member.value}`" for member in getattr(schema, self.arguments[0])]
        return self.parse_text_to_nodes(", ".join(values) + ".")


class CommandHelp(SphinxDirective):
    """What ``--help`` prints, of `kvarn-eval` and of each of its commands."""

    def run(self) -> list[nodes.Node]:
        """Run the program's parser for every command."""
        from typer.main import get_command
        from typer.testing import CliRunner

        from kvarn_eval.cli import app
        from kvarn_eval.small_model import SMALL_MODEL

        checkout = f"{SMALL_MODEL.parents[3]}/"
        found: list[nodes.Node] = []
        for name in get_command(app).commands:  # type: ignore[attr-defined]
            result = CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "100"})
            text = re.sub(r"Usage: \S+", "Usage: kvarn-eval", result.output.strip())
            text = text.replace(checkout, "")  # defaults inside the checkout
            block = nodes.literal_block(text, text, language="text")
            found.append(nodes.section("", nodes.title(text=name), block, ids=[f"command-{name}"]))
        return found


def type_name(annotation: Any) -> str:
    """Readable form of a type: names without modules, literals as their values."""
    text = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    if getattr(annotation, "__args__", None):
        text = str(annotation)
    text = re.sub(r"\b(?:[a-z_]+\.)+(?=[A-Za-z])", "", text)
    text = re.sub(r"Literal\[(.*?)\]", lambda found: found[1].replace(", ", " or "), text)
    return text.replace("NoneType", "None").replace("|", "or")


def default(field: Any) -> str:
    """Default of a field as code, or that it is required."""
    return "required" if field.is_required() else f"`{field.get_default()!r}`"


def keep_colons(
    app: Sphinx, what: str, name: str, obj: object, options: object, lines: list[str]
) -> None:
    """Stop napoleon from reading ``Fact: explanation`` of a property as a type and a text."""
    if what == "property" and lines:
        lines[0] = f": {lines[0]}"


def setup(app: Sphinx) -> dict[str, bool]:
    """Register the directives, and a filter of docstrings."""
    app.setup_extension("sphinx.ext.autodoc")
    app.add_directive("result-model", ResultModel)
    app.add_directive("result-members", Members)
    app.add_directive("command-help", CommandHelp)
    app.connect("autodoc-process-docstring", keep_colons, priority=400)  # napoleon comes at 500
    return {"parallel_read_safe": True}
