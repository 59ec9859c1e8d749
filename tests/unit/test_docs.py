"""Every setting, verb and metric is documented, and no documented one is gone.

The tables of docs/settings.md are written from the classes themselves:
`python -m tests.unit.test_docs` in the repository's root rewrites them.
"""

import ast
import importlib
import importlib.metadata
import itertools
import re
from pathlib import Path
from typing import Any

import msgspec
import msgspec.inspect
import pytest

from afterclick.serving.api import ApiMetrics
from afterclick.serving.manifest import Publication
from afterclick.serving.records import Head, InputsEntry, TopList
from afterclick.streams.events import Click, Item
from afterclick.streams.metrics import Metrics

ROOT = Path(__file__).parents[2]
SETTINGS_PAGE = ROOT / "docs" / "settings.md"
CONTRACTS_PAGE = ROOT / "docs" / "contracts.md"
OPERATIONS_PAGE = ROOT / "docs" / "operations.md"
CLASSES = {
    "SERVING": ("serving", "ServingSettings"),
    "STREAMS": ("streams", "StreamsSettings"),
    "TRAINING": ("training", "TrainingSettings"),
}


def meanings(path: Path, class_name: str) -> dict[str, str]:
    """Field name → the docstring that follows it in the source."""
    tree = ast.parse(path.read_text())
    body = next(
        node.body
        for node in tree.body
        if isinstance(node, ast.ClassDef) and node.name == class_name
    )
    found = {}
    for field, doc in itertools.pairwise(body):
        if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
            is_text = isinstance(doc, ast.Expr) and isinstance(doc.value, ast.Constant)
            found[field.target.id] = " ".join(str(doc.value.value).split()) if is_text else ""
    return found


def allowed(kind: Any) -> str:
    """What a field takes, in words."""
    if isinstance(kind, msgspec.inspect.LiteralType):
        return ", ".join(f"`{value}`" for value in kind.values)
    if isinstance(kind, msgspec.inspect.BoolType):
        return "`true`, `false`"
    if isinstance(kind, msgspec.inspect.UnionType):
        return " or ".join(allowed(part) for part in kind.types)
    if isinstance(kind, msgspec.inspect.IntType | msgspec.inspect.FloatType):
        name = "integer" if isinstance(kind, msgspec.inspect.IntType) else "number"
        limits = [
            f"{sign} {value:g}" if isinstance(value, float) else f"{sign} {value}"
            for sign, value in (("≥", kind.ge), (">", kind.gt), ("≤", kind.le), ("<", kind.lt))
            if value is not None
        ]
        return " ".join([name, ", ".join(limits)]).strip()
    if isinstance(kind, msgspec.inspect.StrType):
        return f"text matching `{kind.pattern}`" if kind.pattern else "text"
    return type(kind).__name__.removesuffix("Type").lower()


def shown(value: Any) -> str:
    if value == "":
        return "empty"
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"


def table(package: str) -> str:
    """Markdown table of one class."""
    folder, class_name = CLASSES[package]
    module = importlib.import_module(f"afterclick.{folder}.settings")
    info: Any = msgspec.inspect.type_info(getattr(module, class_name))
    told = meanings(ROOT / folder / "settings.py", class_name)
    rows = ["| variable | default | takes | meaning |", "|---|---|---|---|"]
    for field in info.fields:
        cells = [
            f"`AFTERCLICK_{package}__{field.name.upper()}`",
            shown(field.default),
            allowed(field.type).replace("|", "\\|"),
            told[field.name].replace("|", "\\|"),
        ]
        rows.append("| " + " | ".join(cells) + " |")
    return "\n".join(rows)


def marked(page: str, package: str) -> tuple[int, int]:
    """Where a package's table stands in the page."""
    begin = f"<!-- {package} -->\n"
    return page.index(begin) + len(begin), page.index(f"\n<!-- /{package} -->")


@pytest.mark.parametrize("package", CLASSES)
def test_the_table_of_settings_is_what_the_class_says(package: str) -> None:
    """Names, defaults and ranges in a page drift from the code unless a test holds them."""
    page = SETTINGS_PAGE.read_text()
    begin, end = marked(page, package)

    assert page[begin:end] == table(package), "run: python -m tests.unit.test_docs"


@pytest.mark.parametrize("package", CLASSES)
def test_every_setting_has_a_meaning_and_a_default(package: str) -> None:
    """A setting without a meaning is a riddle; one without a default stops the first run."""
    rows = table(package).splitlines()[2:]

    assert rows
    assert not [row for row in rows if row.endswith("|  |")]


def test_every_verb_is_in_the_operations_page() -> None:
    """`afterclick --help` is short; the page tells what a verb reads, writes and exits with."""
    page = OPERATIONS_PAGE.read_text()
    section = page.partition("## Commands")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `afterclick ([a-z]+)", section, re.MULTILINE))
    entries = importlib.metadata.entry_points(group="afterclick.commands")

    assert documented == {entry.name for entry in entries}


def test_every_metric_is_in_the_operations_page_and_the_reverse() -> None:
    """Alerts are written from this table."""
    page = OPERATIONS_PAGE.read_text()
    section = page.partition("## Metrics")[2].partition("\n## ")[0]
    documented = set(re.findall(r"^\| `(afterclick_[a-z_]+)", section, re.MULTILINE))
    counted = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in Metrics().registry.collect()
        if metric.name.startswith("afterclick_")
    }

    assert documented == counted


def test_the_metrics_of_the_api_are_in_the_operations_page() -> None:
    """They are another process's, so they stand in its own section."""
    page = OPERATIONS_PAGE.read_text()
    section = page.partition("## Lists over HTTP")[2].partition("\n## ")[0]
    documented = set(re.findall(r"`(afterclick_api_[a-z_]+)`", section))
    counted = {
        metric.name + ("_total" if metric.type == "counter" else "")
        for metric in ApiMetrics().registry.collect()
        if metric.name.startswith("afterclick_")
    }

    assert documented == counted


def section(heading: str) -> str:
    page = CONTRACTS_PAGE.read_text()
    return page.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("Click", Click),
        ("Item", Item),
        ("List", TopList),
        ("Head", Head),
        ("Inputs", InputsEntry),
        ("Release", Publication),
    ],
)
def test_the_contracts_page_names_every_field(heading: str, kind: type[msgspec.Struct]) -> None:
    """Whoever reads a list in another language reads this page, not our classes."""
    text = section(heading)
    names = set(re.findall(r"[`\"]([a-z0-9_]+)[`\"]", text))

    assert {field.name for field in msgspec.structs.fields(kind)} - {"v"} <= names


@pytest.mark.parametrize(
    ("heading", "kind"),
    [
        ("Click", Click),
        ("Item", Item),
        ("List", TopList),
        ("Inputs", InputsEntry),
        ("Release", Publication),
    ],
)
def test_the_contracts_page_s_examples_are_what_we_read(
    heading: str, kind: type[msgspec.Struct]
) -> None:
    """An example that does not decode teaches a mistake."""
    blocks = re.findall(r"(?:^    .*\n)+", section(heading), re.MULTILINE)
    examples = [block for block in blocks if block.lstrip().startswith("{")]

    assert examples
    for example in examples:
        msgspec.json.decode(example, type=kind)


def test_dead_letter_reasons_are_those_of_the_code() -> None:
    """Alerts and clean-up scripts go by these labels."""
    source = (ROOT / "streams" / "events.py").read_text()
    table = section("Dead letters").partition("| reason |")[2]

    assert set(re.findall(r"^\| `([a-z-]+)`", table, re.MULTILINE)) == set(
        re.findall(r'reason="([a-z-]+)"', source)
    )


def main() -> None:
    """Rewrite the tables of docs/settings.md."""
    page = SETTINGS_PAGE.read_text()
    for package in CLASSES:
        begin, end = marked(page, package)
        page = page[:begin] + table(package) + page[end:]
    SETTINGS_PAGE.write_text(page)


if __name__ == "__main__":
    main()
