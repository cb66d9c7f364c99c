"""`manifest.json`: contents and origin of a data folder, and checks that it is complete."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Literal

import numpy as np

from data_prep.common.command_line import UserError, listed
from data_prep.common.files import describe_path, read_text, write_text
from data_prep.common.schema import STRICT, Count, Positive, Sha256, parse_json
from data_prep.sharding.shards import Dtype, Format, Split, open_shard
from data_prep.sources.source import CleaningStep, Position, SourceRecord
from data_prep.tokenization.tokenizer import TokenizerRecord, tokenizer_hash

FILE_NAME = "manifest.json"
REGISTERED = "registered"  # the source of shards of another program


@dataclass(frozen=True)
class Shard:
    """One shard.

    Attributes:
        documents: number of those that begin in it.
        text_bytes: size of the source's text in UTF-8; None where it is not known, and with GPT-2's kind of tokenizer,
            whose tokens tell it.
    """

    __pydantic_config__ = STRICT

    file: str
    split: Split
    tokens: Positive
    documents: Count
    sha256: Sha256
    text_bytes: Count | None = None


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
        shard_tokens: tokens in a full shard.
        val_shards: number of validation shards; they come first.
        files_not_read: number of files beside the source's that were not read, by suffix.
        bad_files: files that could not be read to their end, with the reason.
        cleaning: the steps that cleaned the documents.
        dropped_tokens: rest of the document that the last validation shard cuts.
        split_document: training begins with that rest, as a document of its own, since there is no other for it.
        val_text_bytes: size of the source's text before each of `text_marks` in validation; as in `Shard`, only where
            the tokens do not tell it.
        unfinished: where preparation continues; None once complete.
    """

    __pydantic_config__ = STRICT

    source: SourceRecord
    tokenizer: TokenizerRecord
    format: Format
    dtype: Dtype
    shard_tokens: Positive
    val_shards: Positive
    files_not_read: dict[str, Count] = field(default_factory=dict)
    bad_files: dict[str, str] = field(default_factory=dict)
    cleaning: list[CleaningStep] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    dropped_tokens: Count = 0
    split_document: bool = False
    val_text_bytes: list[Count] = field(default_factory=list)
    unfinished: Position | None = None
    format_version: Literal[2] = 2

    def tokens(self, split: str) -> int:
        """Number of tokens in `train` or `val`."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def text_bytes(self, *splits: str) -> int | None:
        """Size of the source's text in some splits; None if it is not known."""
        counts = [shard.text_bytes for shard in self.shards if shard.split in splits]
        known = [count for count in counts if count is not None]
        return sum(known) if len(known) == len(counts) else None

    def val_text_bytes_before(self, count: int) -> int | None:
        """Size of the source's text that the first `count` tokens of validation stand for, interpolated between marks;
        None if it is not known."""
        if (total := self.text_bytes("val")) is None:
            return None
        marks = islice(text_marks(), len(self.val_text_bytes))
        return round(np.interp(count, [0, *marks, self.tokens("val")], [0, *self.val_text_bytes, total]))

    @property
    def shards_sha256(self) -> str:
        """One hash over all shards, in order."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    @property
    def is_registered(self) -> bool:
        """Whether the shards come from another program, by `data_prep.register`."""
        return self.source.source == REGISTERED

    @property
    def remedy(self) -> str:
        """Advice for files that do not match the manifest."""
        if self.is_registered:
            return f"get the shards again from their origin, remove {FILE_NAME} and register them again"
        return "remove the folder and prepare it again, or download it again"

    def write(self, folder: Path) -> None:
        """Replaces `manifest.json`, completely or not at all."""
        write_text(folder / FILE_NAME, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Reads `manifest.json` of a complete or unfinished folder, and no other file (`UserError` if it is missing,
        invalid or contradictory)."""
        path = Path(folder) / FILE_NAME
        try:
            text = read_text(path)
        except FileNotFoundError as error:
            kind = describe_path(Path(folder))
            found = f"; it is {kind}" if kind else ""
            raise UserError(
                f"{folder}: not a data folder (no {FILE_NAME}){found}; prepare one with python -m data_prep.prepare, "
                f"or register finished shards with python -m data_prep.register"
            ) from error
        manifest = parse_json(text, cls, str(path))
        if contradictions := list(manifest.contradictions()):
            raise UserError(f"{path}: {listed(contradictions)}")
        return manifest

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Reads `manifest.json` of a complete folder and compares it with the files, except for the hashes of shards
        and their ids, which `data_prep.verify` checks (`UserError` for an unfinished or damaged folder)."""
        manifest = cls.load(folder)
        if manifest.unfinished is not None:
            raise UserError(
                f"{folder}: its preparation has not finished ({len(manifest.shards)} shards so far); run the same "
                f"python -m data_prep.prepare again, which continues it"
            )
        if problems := manifest.problems(Path(folder)):
            raise UserError(f"{problems[0]}; {manifest.remedy}")
        return manifest

    def contradictions(self) -> Iterator[str]:
        """Statements of the manifest that cannot be true together."""
        splits = [shard.split for shard in self.shards]
        for shard in self.shards:
            if Path(shard.file).name != shard.file or not shard.file.endswith(f".{self.format}"):
                yield f"shard {shard.file!r} is not a plain name that ends in .{self.format}"
            if split_of_name(shard.file) not in (None, shard.split):
                yield f"shard {shard.file!r} is listed as split {shard.split!r}"
            if shard.tokens > self.shard_tokens or shard.documents > shard.tokens:
                size = f"{shard.tokens} tokens and {shard.documents} documents"
                yield f"shard {shard.file!r} has {size} of at most shard_tokens={self.shard_tokens}"
        counts = Counter(shard.file for shard in self.shards)
        yield from (f"shard {name!r} is listed twice" for name, count in counts.items() if count > 1)
        if self.is_registered:  # texts that are prepared here may repeat themselves
            val = {shard.sha256: shard.file for shard in self.shards if shard.split == "val"}
            for shard in self.shards:
                if shard.split == "train" and shard.sha256 in val:
                    yield f"training shard {shard.file!r} is the same as {val[shard.sha256]!r} of validation"
        val_count, train_count = splits.count("val"), splits.count("train")
        if splits != sorted(splits, reverse=True) or val_count > self.val_shards:
            yield f"the shards of validation are not the first val_shards={self.val_shards}"
        if self.unfinished is None and (val_count != self.val_shards or not train_count):
            yield f"{val_count} shards of validation, val_shards={self.val_shards}; {train_count} of training"
        largest = {"uint16": 2**16, "uint32": 2**32}[self.dtype]
        if not self.tokenizer.eos_token_id < self.tokenizer.vocab_size <= largest:
            yield (
                f"eos_token_id={self.tokenizer.eos_token_id} must be less than vocab_size={self.tokenizer.vocab_size}, "
                f"and that at most the {largest} ids of {self.dtype}"
            )

    def problems(self, folder: Path) -> list[str]:
        """Differences between the manifest and the names, sizes and types of the files in `folder`."""
        found = []
        try:
            if tokenizer_hash(folder / "tokenizer") != self.tokenizer.sha256:
                found.append(f"{folder / 'tokenizer'} is not the tokenizer that wrote the shards beside it")
        except (OSError, UserError) as error:
            found.append(f"{folder / 'tokenizer'}: not readable ({error})")
        for shard in self.shards:
            path = folder / shard.file
            try:
                tokens = open_shard(path)
                if len(tokens) != shard.tokens or tokens.dtype != self.dtype:
                    expected = f"the manifest says {shard.tokens} of {self.dtype}"
                    found.append(f"{path}: {len(tokens)} tokens of {tokens.dtype}, {expected}")
            except UserError as error:
                found.append(str(error))
        return found


def text_marks() -> Iterator[int]:
    """Numbers with at most five significant bits: 1, 2, ..., 32, 34, ..., 64, 68, ... Any other is within 3% of one."""
    mark = 1
    while True:
        yield mark
        mark += 1 << max(0, mark.bit_length() - 5)


def split_of_name(file: str) -> Split | None:
    """Split in a shard's name, as in `name_train_000001.npy`; None if it names none or both."""
    found: set[Split] = set(re.findall(r"(?<![a-z])(val|train)(?![a-z])", Path(file).stem))
    return found.pop() if len(found) == 1 else None
