"""Run as a script with names of objectives: breaks each term of each, one at a time, and runs the objective's own tests.

Prints the mutants that no test noticed, as JSON. A term is a function of the module: what it returns is negated, dropped.
"""

import ast
import contextlib
import importlib
import io
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

HERE = Path(__file__).parent


def negated(value: ast.expr) -> ast.expr:
    return ast.UnaryOp(ast.USub(), value)


def dropped(value: ast.expr) -> ast.expr:
    return ast.BinOp(value, ast.Mult(), ast.Constant(0))


def mutants(name: str) -> Iterator[tuple[str, ModuleType]]:
    path = Path(importlib.import_module(f"darkmatter.objectives.{name}").__file__ or "")
    terms = [node.name for node in ast.parse(path.read_text()).body if isinstance(node, ast.FunctionDef)]
    for term in terms:
        if term == "build" or term.startswith("_"):
            continue
        for change in (negated, dropped):
            tree = ast.parse(path.read_text())
            function = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == term)
            final = function.body[-1]
            assert isinstance(final, ast.Return) and final.value is not None, (
                f"{name}.{term} does not end with a return"
            )
            final.value = change(final.value)
            module = ModuleType(f"darkmatter.objectives.{name}")
            module.__file__ = str(path)
            sys.modules[module.__name__] = module
            exec(compile(ast.fix_missing_locations(tree), str(path), "exec"), module.__dict__)
            yield f"{name}.{term} {change.__name__}", module


def survives(name: str, module: ModuleType) -> bool:
    import darkmatter.objectives

    setattr(darkmatter.objectives, name, module)
    for cached in [key for key in sys.modules if key.startswith("test_") or key == "toys"]:
        del sys.modules[cached]
    options = ["-x", "-q", "--noconftest", "-p", "no:cacheprovider", "-W", "ignore", "-o", "addopts="]
    with contextlib.redirect_stdout(io.StringIO()):
        return pytest.main([*options, str(HERE / f"test_{name}.py")]) != pytest.ExitCode.TESTS_FAILED


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    tried, alive = 0, []
    for objective in sys.argv[1:]:
        original = importlib.import_module(f"darkmatter.objectives.{objective}")
        assert survives(objective, original), f"the tests of {objective} fail without any mutation"
        for what, mutant in mutants(objective):
            tried += 1
            if survives(objective, mutant):
                alive.append(what)
    print(json.dumps({"tried": tried, "alive": alive}))
