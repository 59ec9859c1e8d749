"""The rights that docs/operations.md gives Redis users are those that the code uses."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]

COMMANDS_OF = {
    "hscan_iter": {"hscan"},
    "scan_iter": {"scan"},
    "pipeline": {"multi", "exec"},
    "register_script": {"evalsha", "script|load"},
    "execute_command": set[str](),
    "mget_nonatomic": {"mget"},
    "execute": set[str](),
    "close": set[str](),
    "aclose": set[str](),
    "get_node_from_key": set[str](),
}
"""redis-py's methods that are not named like their command."""


def rights(user: str) -> set[str]:
    """Commands that the page's line for a user allows."""
    page = (ROOT / "docs" / "operations.md").read_text()
    (line,) = re.findall(rf"^ +ACL SETUSER {user} (.*)$", page, re.MULTILINE)
    return set(re.findall(r"\+(\S+)", line))


def used(*files: str) -> set[str]:
    """Commands in the source: in scripts, as strings, and as methods of a client."""
    found: set[str] = set()
    for file in files:
        source = (ROOT / "serving" / file).read_text()
        found |= {name.lower() for name in re.findall(r"redis\.call\('([A-Z]+)'", source)}
        found |= {name.lower() for name in re.findall(r'(?:yield |command)\("([A-Z]+)"', source)}
        for method in re.findall(r"\b(?:self\._redis|pipe)\.([a-z_]+)\(", source):
            found |= COMMANDS_OF.get(method, {method})
    return found


@pytest.mark.parametrize(
    ("user", "files"),
    [("worker", ("scripts.py", "store.py")), ("reader", ("lookup.py", "reader.py"))],
)
def test_a_user_may_do_what_the_code_does_and_nothing_else(
    user: str, files: tuple[str, ...]
) -> None:
    """A command that the line lacks stops every deployment with users; one too many is a hole."""
    allowed, needed = rights(user), used(*files)

    assert needed - allowed == set(), "docs/operations.md, Security: add them"
    assert allowed - needed == set(), "docs/operations.md, Security: nobody uses them"
