"""The fields of a record that are read, and the check of a record's document: text, ids of tokens or a conversation."""

import itertools
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np

Kind = Literal["text", "tokens", "messages"]
ROLES = ("system", "user", "assistant")


class BadRecord(Exception):
    """What is wrong with a record, without its place."""


@dataclass(frozen=True)
class Fields:
    """Fields that are read of each record.

    Attributes:
        document: holds the document.
        others: for conditions.
        kind: of the document: text, a list of ids, or a conversation as a list of messages.
    """

    document: str
    others: tuple[str, ...] = ()
    kind: Kind = "text"

    @cached_property
    def names(self) -> list[str]:
        """All fields, each once; `column.field` is a field in a column."""
        return list(dict.fromkeys([self.document, *self.others]))

    def columns(self, found: Collection[str]) -> list[str]:
        """The columns that hold the fields, among those `found`."""
        return list(dict.fromkeys(name if name in found else name.partition(".")[0] for name in self.names))

    def check_names(self, found: Collection[str]) -> None:
        """Refuses a record, or a file, without one of the fields (`BadRecord`)."""
        for name in self.names:
            if name not in found and (name == self.document or name.partition(".")[0] not in found):
                options = {"text": "--text_column, --tokens_column or --where", "messages": "--messages_column"}
                named = options.get(self.kind, options["text"])
                raise BadRecord(f"no field {name!r} among {list(found)}; name one with {named}")

    def values(self, name: str, column: Any) -> Sequence[Any]:
        """The values of a column of arrow's; lists of ids without copying each id to Python."""
        import pyarrow

        kind = column.type
        is_list = pyarrow.types.is_list(kind) or pyarrow.types.is_large_list(kind)
        if not (
            self.kind == "tokens" and name == self.document and is_list and pyarrow.types.is_integer(kind.value_type)
        ):
            return column.to_pylist()  # many times faster than a batch's own to_pylist
        if column.null_count or column.values.null_count:
            return column.to_pylist()
        ids, offsets = column.values.to_numpy(), column.offsets.to_numpy()
        return [ids[start:stop] for start, stop in itertools.pairwise(offsets)]

    def check(self, record: dict[str, Any]) -> dict[str, Any]:
        """The record with a valid document, an empty one if it was null (`BadRecord` for one without one of the
        fields, and a document of another kind)."""
        self.check_names(record)
        document = record[self.document]
        if self.kind == "messages":
            record[self.document] = _messages(document, f"field {self.document!r}")
        elif self.kind == "tokens":
            record[self.document] = _ids(document, f"field {self.document!r}")
        elif document is None:
            record[self.document] = ""
        else:
            _check_text(document, f"field {self.document!r}")
        return record


def _check_text(text: Any, field: str) -> None:
    if not isinstance(text, str):
        raise BadRecord(f"{field} is not text but {type(text).__name__}")
    try:
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:  # half of a surrogate pair, which JSON can contain
        raise BadRecord(f"{field} is not text ({error})") from error


def _ids(found: Any, field: str) -> np.ndarray:
    if found is None:
        return np.empty(0, dtype=np.int64)
    if not isinstance(found, list | np.ndarray):
        raise BadRecord(f"{field} is not a list of token ids but {type(found).__name__}")
    ids = np.asarray(found) if len(found) else np.empty(0, dtype=np.int64)
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise BadRecord(f"{field} is not a list of token ids, which are whole numbers")
    return ids


def _messages(found: Any, field: str) -> list[dict[str, str]]:
    """The role and the content of each message."""
    if not isinstance(found, list):
        raise BadRecord(f"{field} is not a list of messages but {type(found).__name__}")
    messages = [_message(message, f"message {number} of {field}") for number, message in enumerate(found, start=1)]
    roles = [message["role"] for message in messages]
    if "assistant" not in roles:
        raise BadRecord(f"{field} has no message of the assistant, from which alone is learned; its roles are {roles}")
    if "system" in roles[1:]:
        raise BadRecord(f"message {roles.index('system', 1) + 1} of {field} is the system's, which must be the first")
    return messages


def _message(found: Any, place: str) -> dict[str, str]:
    if not isinstance(found, dict) or not {"role", "content"} <= found.keys():
        raise BadRecord(f"{place} has no role and content; it is {str(found)[:60]!r}")
    role, content = found["role"], found["content"]
    if role not in ROLES:
        raise BadRecord(f"{place} has the unknown role {role!r}; the roles are {', '.join(ROLES)}")
    _check_text(content, f"the content of {place}")
    if not content.strip():
        raise BadRecord(f"{place}, the {role}'s, is empty; correct the conversation or remove it")
    return {"role": role, "content": content}
