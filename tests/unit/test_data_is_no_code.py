"""Nothing that the rooms read from outside can run: no pickle, no eval, no unsafe loader."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ROOMS = ("serving", "streams", "training", "benchmarks")

MODULES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
ONLY_ERRORS = {"UnpicklingError"}
"""What may be named of them: torch.load raises it."""

CALLS = {"eval", "exec", "compile", "__import__"}
NEEDS = {
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
    "torch.load": ("weights_only", True),
}
NEVER = {"yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.jit.load", "os.system"}


def dangers(source: str) -> Iterator[str]:
    """What the source does that could make data run, with its line."""
    for node in ast.walk(ast.parse(source)):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in MODULES:
            names = {alias.name for alias in node.names}
            if names - ONLY_ERRORS:
                yield f"{line}: from {node.module} import {', '.join(sorted(names))}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) in MODULES:
            if node.attr not in ONLY_ERRORS:
                yield f"{line}: {ast.unparse(node)}"
        elif isinstance(node, ast.Import):
            yield from (
                f"{line}: import {alias.name} as {alias.asname}"
                for alias in node.names
                if alias.asname and alias.name.partition(".")[0] in MODULES
            )
        elif isinstance(node, ast.Call):
            yield from (f"{line}: {danger}" for danger in _of_call(node))


def _of_call(node: ast.Call) -> Iterator[str]:
    name = ast.unparse(node.func)
    given = {word.arg: word.value for word in node.keywords}
    if name in CALLS or name in NEVER:
        yield name
    if name in NEEDS:
        word, wanted = NEEDS[name]
        value = given.get(word)
        if not (isinstance(value, ast.Constant) and value.value is wanted):
            yield f"{name} without {word}={wanted}"
    if "shell" in given:
        yield f"{name} with shell="


@pytest.mark.parametrize("room", ROOMS)
def test_no_data_becomes_code(room: str) -> None:
    """A release, a checkpoint or an archive may come from someone who is not us."""
    files = sorted((ROOT / room).rglob("*.py"))

    assert files
    found = [
        f"{file.relative_to(ROOT)}:{danger}"
        for file in files
        for danger in dangers(file.read_text())
    ]
    assert found == []


@pytest.mark.parametrize(
    "line",
    [
        "import pickle; pickle.loads(b'')",
        "import pickle as p",
        "from pickle import loads",
        "from joblib import load",
        "np.load(path)",
        "np.load(path, allow_pickle=True)",
        "np.load(path, allow_pickle=flag)",
        "torch.load(path)",
        "torch.load(path, weights_only=False)",
        "yaml.load(text)",
        "eval(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_each_way_is_noticed(line: str) -> None:
    """A check that looks elsewhere would pass for ever."""
    assert list(dangers(line))


@pytest.mark.parametrize(
    "line",
    [
        "import pickle\ntry: pass\nexcept pickle.UnpicklingError: pass",
        "np.load(path, allow_pickle=False)",
        "torch.load(path, weights_only=True)",
        "model.eval()",
        "re.compile(text)",
    ],
)
def test_what_is_safe_passes(line: str) -> None:
    """Else the check would be switched off."""
    assert not list(dangers(line))
