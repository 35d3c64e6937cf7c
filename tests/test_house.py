"""Rules of the house that can be checked."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from outsize.family.find import NOT_FAMILIES

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "outsize"
FILES = sorted(SOURCE.rglob("*.py"))
# A room imports only from rooms before it in this list; the first are modules that stand alone.
ORDER = [
    "version", "errors", "arguments", "options", "home", "log", "progress", "registry", "model_config",
    "system", "kv", "kernels",
    "checkpoint", "family", "encoding", "pack", "storage", "sampling", "text", "caching", "weights", "model",
    "forward", "draft", "plan", "engine", "report", "adapt", "bench", "cli",
    "__main__",
]  # fmt: skip


def folder_of(path: Path) -> str:
    parts = path.relative_to(SOURCE).parts
    return parts[0] if len(parts) > 1 else path.stem


def imports(path: Path) -> list[str]:
    """Top-level names below outsize that a file imports, anywhere in it."""
    out = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("outsize"):
            parts = node.module.split(".")
            out += [parts[1]] if len(parts) > 1 else [a.name for a in node.names]
        elif isinstance(node, ast.Import):
            out += [a.name.split(".")[1] for a in node.names if a.name.startswith("outsize.")]
    return out


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_layers(path: Path) -> None:
    here = folder_of(path)
    if here == "__init__":
        return
    for there in imports(path):
        if there != here:
            assert ORDER.index(there) < ORDER.index(here), f"{here} imports {there} to its right"


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_sizes(path: Path) -> None:
    text = path.read_text()
    assert text.count("\n") <= 300
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.FunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines"


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


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
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


def test_caching_knows_integers_only() -> None:
    """No tensors, no files but the traces of a replay: the same policies run live and in virtual time."""
    known = {"caching", "errors", "registry", "storage.stats"}
    for path in (SOURCE / "caching").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                assert "torch" not in [a.name for a in node.names], path
            elif isinstance(node, ast.ImportFrom):
                name = (node.module or "").removeprefix("outsize.")
                of_ours = (node.module or "").startswith("outsize.")
                is_trace = path.stem == "trace" and name == "checkpoint.bounded"
                assert not of_ours or name.split(".")[0] in known or name in known or is_trace, path


FACTORIES = {
    "arange", "as_tensor", "asarray", "empty", "eye", "full", "linspace", "ones", "rand", "randint", "randn",
    "randperm", "scalar_tensor", "tensor", "zeros",
}  # fmt: skip


@pytest.mark.parametrize(
    "path", [p for p in FILES if folder_of(p) not in ("adapt", "bench")], ids=lambda p: p.stem
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
