"""Built-in conversations: questions about Python's standard library, answered by its docstrings."""

import ast
import random
import re
from collections.abc import Iterator
from pathlib import Path

from data_prep.reading.builtin import standard_library, standard_library_files

Conversation = list[dict[str, str]]
_SHORTEST, _LONGEST = 20, 160  # characters of an answer
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo"}
_QUESTIONS = {
    "module": ("What is the module {name} for?", "What does the module {name} do?"),
    "function": ("What does {name} do?", "What is {name} for?", "Explain the function {name}."),
    "class": ("What is {name}?", "What is the class {name} for?", "Explain the class {name}."),
}
_Function = ast.FunctionDef | ast.AsyncFunctionDef


def docstring_conversations(count: int = 800) -> list[Conversation]:
    """At most `count` conversations, the same in each call: what a module, function or class is for, how to call it,
    and what methods it has. Nothing is imported."""
    rng = random.Random(0)
    found = [talk for path in standard_library_files() for talk in _of_file(path, rng)]
    return rng.sample(found, min(count, len(found)))


def _of_file(path: Path, rng: random.Random) -> Iterator[Conversation]:
    parts = path.relative_to(standard_library()).with_suffix("").parts
    if _SKIPPED.intersection(parts) or any(part.startswith("_") for part in parts[:-1]):
        return
    parts = parts[:-1] if parts[-1] == "__init__" else parts
    if parts[-1].startswith("_"):
        return
    module, tree = ".".join(parts), ast.parse(path.read_text(encoding="utf-8", errors="ignore"))
    if answer := _first_sentence(tree):
        yield _talk(rng, "module", module, answer)
    for node in tree.body:
        if not isinstance(node, _Function | ast.ClassDef) or node.name.startswith("_"):
            continue
        if answer := _first_sentence(node):
            name = f"{module}.{node.name}"
            kind = "class" if isinstance(node, ast.ClassDef) else "function"
            yield _talk(rng, kind, name, answer) + _second_exchange(node, name)


def _talk(rng: random.Random, kind: str, name: str, answer: str) -> Conversation:
    return _exchange(rng.choice(_QUESTIONS[kind]).format(name=name), answer)


def _exchange(question: str, answer: str) -> Conversation:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _second_exchange(node: _Function | ast.ClassDef, name: str) -> Conversation:
    if isinstance(node, ast.ClassDef):
        methods = [one.name for one in node.body if isinstance(one, _Function) and not one.name.startswith("_")]
        return _exchange("Which methods does it have?", f"{', '.join(methods[:5])}.") if methods else []
    arguments = ast.unparse(node.args)
    return _exchange("How do I call it?", f"{name}({arguments})") if len(arguments) < _LONGEST else []


def _first_sentence(node: ast.Module | _Function | ast.ClassDef) -> str | None:
    """The first sentence of a docstring in one line, None if there is none of an ordinary length."""
    paragraph = " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())
    sentence = re.split(r"(?<=[.!?]) ", paragraph)[0]
    return sentence if _SHORTEST <= len(sentence) < _LONGEST and sentence.endswith(".") else None
