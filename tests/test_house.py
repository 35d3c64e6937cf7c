"""Rules of the house that can be checked."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

from outsize.family.find import NOT_FAMILIES

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "outsize"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {path: ast.parse(path.read_text()) for path in FILES}
each_file = pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
# A room imports only from rooms before it in this list. The first are modules that stand alone, the last is
# the package itself, the public surface.
ORDER = [
    "version", "errors", "arguments", "options", "home", "log", "progress", "registry", "model_parts",
    "model_config", "system", "kv", "kernels", "checkpoint", "family", "encoding", "pack", "storage",
    "prefix", "sampling", "text", "caching", "weights", "parallel", "model", "forward", "draft", "plan",
    "engine", "report", "adapt", "bench", "serve", "cli", "__main__", "__init__",
]  # fmt: skip
# Imported within a function, so that --help and `import outsize` are instant, or because a system lacks them.
LATE = {
    "fcntl", "gguf", "huggingface_hub", "importlib", "jinja2", "llguidance", "platformdirs", "psutil",
    "readline", "resource", "rich", "safetensors", "tokenizers", "tomllib", "torch",
}  # fmt: skip
MOST_PARAMETERS = 6


def name_of(path: Path) -> str:
    """A module's dotted name below outsize; of a folder's __init__.py, the folder's."""
    parts = path.relative_to(SOURCE).with_suffix("").parts
    return ".".join(parts[:-1] if len(parts) > 1 and parts[-1] == "__init__" else parts)


MODULES = {name_of(path) for path in FILES}


def imports(tree: ast.AST) -> Iterator[str]:
    """Modules below outsize that some code imports, anywhere in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "outsize":
            folder = (node.module or "").removeprefix("outsize").lstrip(".")
            for name in node.names:
                inner = f"{folder}.{name.name}".lstrip(".")
                yield inner if inner in MODULES else folder or "__init__"
        elif isinstance(node, ast.Import):
            yield from (n.name[8:] for n in node.names if n.name.startswith("outsize."))


@each_file
def test_order(path: Path) -> None:
    here = name_of(path).split(".")[0]
    for there in {name.split(".")[0] for name in imports(TREES[path])} - {here}:
        assert ORDER.index(there) < ORDER.index(here), f"{here} imports {there}, a later room"


def test_no_circles() -> None:
    left = {name_of(path): set(imports(TREES[path])) & MODULES for path in FILES}
    while free := {name for name, needs in left.items() if not needs - {name}}:
        left = {name: needs - free for name, needs in left.items() if name not in free}
    assert not left, "these import each other, or what does"


@each_file
def test_imports_within_functions_are_for_start_up(path: Path) -> None:
    for node in functions(path):
        for inner in ast.walk(node):
            if isinstance(inner, ast.ImportFrom | ast.Import):
                first = getattr(inner, "module", None) or inner.names[0].name
                assert first.split(".")[0] in LATE or name_of(path).startswith("cli."), first


def functions(path: Path) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@each_file
def test_sizes(path: Path) -> None:
    assert path.read_text().count("\n") <= 300
    for node in functions(path):
        length = (node.end_lineno or 0) - node.lineno + 1
        assert length <= 60, f"{node.name} has {length} lines"
        told = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
        told += [a for a in (node.args.vararg, node.args.kwarg) if a is not None]
        count = sum(a.arg not in ("self", "cls") for a in told)
        assert count <= MOST_PARAMETERS, f"{node.name} has {count} parameters"


@each_file
def test_privacy(path: Path) -> None:
    """No class reaches into another's private parts, and types say what an assertion would."""
    for node in ast.walk(TREES[path]):
        if isinstance(node, ast.Attribute) and re.match(r"_[a-z]", node.attr):
            of = ast.unparse(node.value)
            assert (
                of in ("self", "cls")
                or of.startswith("torch")
                or node.attr in ("_replace", "_fields")
            ), f"{of}.{node.attr}"
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("outsize"):
            assert not [n.name for n in node.names if re.match(r"_[a-z]", n.name)]
        assert not (isinstance(node, ast.Assert) and "isinstance" in ast.unparse(node.test))


def test_functions_are_short_and_families_shorter() -> None:
    lengths = sorted(
        (node.end_lineno or 0) - node.lineno + 1
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef)
    )
    assert lengths[len(lengths) // 2] < 10
    assert lengths[int(len(lengths) * 0.9)] < 30
    for path in (SOURCE / "family").glob("*.py"):
        if path.stem not in NOT_FAMILIES:
            assert path.read_text().count("\n") < 90


@each_file
def test_habits(path: Path) -> None:
    tree = ast.parse(path.read_text())
    if path.name != "__init__.py":
        assert ast.get_docstring(tree), "a module says what it is"
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            assert node.func.id not in ("hasattr", "eval", "exec"), node.func.id
        if isinstance(node, ast.FunctionDef) and node.args.kwarg is not None:
            annotation = ast.unparse(node.args.kwarg.annotation or ast.Constant(None))
            assert annotation.startswith("Unpack["), f"{node.name} takes untyped keywords"
        if isinstance(node, ast.ImportFrom | ast.Import):
            names = [a.name for a in node.names] + [getattr(node, "module", "") or ""]
            assert not {"pickle", "marshal", "dill", "shelve"} & set(names)
    assert "utils" not in path.stem


FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
    "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


@pytest.mark.parametrize(
    "path",
    [p for p in FILES if name_of(p).split(".")[0] not in ("adapt", "bench")],
    ids=lambda p: p.stem,
)
def test_tensors_state_type_and_device(path: Path) -> None:
    """torch's defaults are the user's to set, and C takes a tensor for what it should be."""
    for node in ast.walk(ast.parse(path.read_text())):
        if not isinstance(node, ast.Call) or not ast.unparse(node.func).startswith("torch."):
            continue
        if ast.unparse(node.func).removeprefix("torch.") in FACTORIES:
            stated = {word.arg for word in node.keywords}
            assert stated >= {"dtype", "device"}, f"line {node.lineno}: {ast.unparse(node)}"


def test_imports_are_inert() -> None:
    """Importing everything changes no environment, starts no thread, prints nothing."""
    modules = [
        ".".join(("outsize", *p.relative_to(SOURCE).with_suffix("").parts))
        for p in FILES
        if p.name not in ("__init__.py", "lm_eval.py")
    ]
    code = (
        "import os, threading, torch, importlib\n"
        "before = dict(os.environ), threading.active_count(), torch.get_num_threads()\n"
        f"for name in {modules!r}: importlib.import_module(name)\n"
        "assert before == (dict(os.environ), threading.active_count(), torch.get_num_threads())\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["outsize", "outsize.cli.main"])
def test_importing_outsize_is_cheap(name: str) -> None:
    """`--help` and `import outsize` load nothing heavy."""
    heavy = ("torch", "numpy", "tokenizers", "huggingface_hub", "rich.console")
    code = f"import sys, {name}; print([m for m in {heavy} if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_the_public_names() -> None:
    import outsize

    assert outsize.__all__ == sorted(outsize.__all__, key=lambda n: (n[0].islower(), n))
    for name in outsize.__all__:
        assert getattr(outsize, name) is not None
        assert name in dir(outsize), "consoles complete it"
    for name, home in outsize.HOME.items():
        assert getattr(outsize, name).__module__ == home
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        outsize.nothing  # noqa: B018


def test_every_file_is_installed() -> None:
    """setuptools leaves out, without a word, files of no pattern and folders without __init__.py."""
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())
    patterns = settings["tool"]["setuptools"]["package-data"]["outsize"]
    for path in (p for p in SOURCE.rglob("*") if p.is_file() and p.suffix != ".pyc"):
        name = path.relative_to(SOURCE)
        if path.suffix == ".py":
            assert (path.parent / "__init__.py").is_file(), name
        else:
            assert any(name.match(pattern) for pattern in patterns), name


def test_every_error_is_drawn_and_raised_or_a_parent() -> None:
    from outsize import errors

    drawn, above = {}, ["Exception"]
    for line in (errors.__doc__ or "").splitlines():
        if (found := re.match(r"([|+\- ]*)(\w+Error)\b", line)) is not None:
            depth = 1 + len(found[1]) // 4
            drawn[found[2]] = above[depth - 1]
            above[depth:] = [found[2]]
    kinds = {
        n: v for n, v in vars(errors).items() if isinstance(v, type) and issubclass(v, Exception)
    }
    assert drawn == {name: kind.__mro__[1].__name__ for name, kind in kinds.items()}
    made = {
        node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id
        for path in FILES
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute | ast.Name)
    }
    for name, kind in kinds.items():
        assert name in made or kind.__subclasses__(), f"{name} is never raised"


def test_readme_commands_are_the_ci_commands() -> None:
    readme, gate = (ROOT / "README.md").read_text(), (ROOT / ".ci" / "run").read_text()
    assert 'pip install . && outsize run "Why is the sky blue?"' in readme
    assert 'pip install -e ".[dev]" && pytest' in readme
    assert "README.md" in gate
    assert "ruff" in gate
    assert "mypy" in gate


DOCUMENTS = [
    ROOT / "README.md",
    *(ROOT / "docs").glob("*.md"),
    *(ROOT / "docs" / "results").glob("*.md"),
]
OF_THEIR_TIME = ("decisions.md", "reports.md")  # name files as they were then


@pytest.mark.parametrize(
    "path", [p for p in DOCUMENTS if p.name not in OF_THEIR_TIME], ids=lambda p: p.name
)
def test_documents_name_files_that_are_there(path: Path) -> None:
    known = [
        str(p) for place in ("src", "tests", "experiments") for p in (ROOT / place).rglob("*.*")
    ]
    for named in re.findall(r"[`( /]([\w./-]+\.(?:py|c|h|npz))\b", path.read_text()):
        tail = "/" + named.lstrip("./")
        assert (ROOT / named).is_file() or any(k.endswith(tail) for k in known), named


def test_the_way_of_a_token_is_six_short_files() -> None:
    text = (ROOT / "docs" / "reading.md").read_text()
    named = re.findall(r"^## \d\. `([\w/.]+)`", text, re.MULTILINE)
    assert len(named) == 6
    assert sum((SOURCE / name).read_text().count("\n") for name in named) <= 700
