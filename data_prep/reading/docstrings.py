"""Built-in conversations: questions about Python's standard library, answered by its docstrings."""

import ast
import random
from collections.abc import Iterator

from data_prep.reading.builtin import standard_library, standard_library_files

Conversation = list[dict[str, str]]
_SHORTEST, _LONGEST = 20, 160  # characters of an answer
_SKIPPED = {"test", "tests", "idlelib", "lib2to3", "turtledemo"}


def docstring_conversations(count: int = 800) -> list[Conversation]:
    """At most `count` conversations, the same in each call: what a function or class is for, and how to call it.
    Nothing is imported."""
    found = list(_conversations())
    return random.Random(0).sample(found, min(count, len(found)))


def _conversations() -> Iterator[Conversation]:
    for path in standard_library_files():
        parts = path.relative_to(standard_library()).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if _SKIPPED.intersection(parts) or any(part.startswith("_") for part in parts):
            continue
        for node in ast.parse(path.read_text(encoding="utf-8", errors="ignore")).body:
            if not isinstance(node, ast.FunctionDef | ast.ClassDef) or node.name.startswith("_"):
                continue
            name = ".".join([*parts, node.name])
            turns = {f"What does {name} do?": " ".join((ast.get_docstring(node) or "").split("\n\n")[0].split())}
            if isinstance(node, ast.FunctionDef):
                turns["How do I call it?"] = f"{name}({ast.unparse(node.args)})"
            if all(_SHORTEST <= len(answer) < _LONGEST for answer in turns.values()):
                yield [
                    {"role": role, "content": text}
                    for turn in turns.items()
                    for role, text in zip(("user", "assistant"), turn, strict=True)
                ]
