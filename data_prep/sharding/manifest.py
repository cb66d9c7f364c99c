"""`manifest.json`: what a data folder holds, where it came from, and how to tell that it is whole."""

import hashlib
import json
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from data_prep.common.command_line import UserError
from data_prep.common.files import read_text, write_text
from data_prep.common.records import CleaningStep, Position, Shard, SourceRecord, TokenizerRecord
from data_prep.common.schema import STRICT, Count, Positive, parse_json

FILE_NAME = "manifest.json"
ADOPTED = "adopted"  # the source of shards that another program wrote
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
        tokenizer, dtype: None until the tokenizer is there; `uint16` or `uint32`.
        format: `npy` or `bin`.
        shard_tokens: the length that shards are cut at.
        val_shards: how many of them, the first ones, are validation.
        cleaning: the steps that the documents went through.
        shards: in order; validation first.
        dropped_tokens: the rest of the document that validation ends in.
        unfinished: where preparation goes on; None once it is complete.
    """

    __pydantic_config__ = STRICT

    source: SourceRecord
    tokenizer: TokenizerRecord | None
    format: Literal["npy", "bin"]
    dtype: Literal["uint16", "uint32"] | None
    shard_tokens: Positive
    val_shards: Positive
    cleaning: list[CleaningStep] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    dropped_tokens: Count = 0
    unfinished: Position | None = None
    format_version: Literal[2] = FORMAT_VERSION

    def tokens(self, split: str) -> int:
        """The number of tokens in `train` or `val`."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    @property
    def shards_sha256(self) -> str:
        """One hash for all shards, in their order."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write `manifest.json`; it is replaced as a whole or not at all."""
        write_text(folder / FILE_NAME, json.dumps(asdict(self), indent=2) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read `manifest.json`, of a folder that may be unfinished, without a look at the other files.

        Raises:
            UserError: for a folder without one, and for one that is not ours or contradicts itself.
        """
        path = Path(folder) / FILE_NAME
        try:
            text = read_text(path)
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: not a data folder (no {FILE_NAME}); prepare one with python -m data_prep.prepare, or take "
                f"on finished shards with python -m data_prep.register"
            ) from error
        manifest = parse_json(text, cls, str(path))
        if contradictions := list(manifest.contradictions()):
            raise UserError(f"{path}: {'; '.join(contradictions)}")
        return manifest

    def contradictions(self) -> Iterator[str]:
        """What of a manifest cannot all be true."""
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
        # Our own preparation may be given texts that repeat themselves, shard by shard.
        adopted = self.source.source == ADOPTED
        by_hash = {shard.sha256: shard.file for shard in self.shards if shard.split == "val" and adopted}
        for shard in self.shards:
            if shard.split == "train" and shard.sha256 in by_hash:
                yield f"training shard {shard.file!r} is the same as {by_hash[shard.sha256]!r} of validation"
        if splits != sorted(splits, reverse=True) or splits.count("val") > self.val_shards:
            yield f"the shards of validation are not the first val_shards={self.val_shards}"
        if self.unfinished is None and (splits.count("val") != self.val_shards or "train" not in splits):
            count = {split: splits.count(split) for split in ("val", "train")}
            yield f"{count['val']} shards of validation, val_shards={self.val_shards}; {count['train']} of training"
        if self.tokenizer is None or self.dtype is None:
            if self.shards or self.unfinished is None:
                yield "there are shards, and no tokenizer and dtype"
            return
        largest = {"uint16": 2**16, "uint32": 2**32}[self.dtype]
        if not self.tokenizer.eos_token_id < self.tokenizer.vocab_size <= largest:
            yield (
                f"eos_token_id={self.tokenizer.eos_token_id} must be less than vocab_size={self.tokenizer.vocab_size}, "
                f"and that at most the {largest} ids of {self.dtype}"
            )

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `manifest.json` of a finished folder and check it against the files beside it: names, sizes, types and
        the tokenizer's hash. What takes reading all of the shards is left to `data_prep.verify`.

        Raises:
            UserError: as `load`, for a folder that is not finished, shards that are missing or cut short, and another
                tokenizer than the one that wrote them.
        """
        manifest = cls.load(folder)
        if manifest.unfinished is not None:
            raise UserError(
                f"{folder}: its preparation has not finished ({len(manifest.shards)} shards so far); run the same "
                f"python -m data_prep.prepare again, which goes on with it"
            )
        if problems := manifest.problems(Path(folder)):
            raise UserError(f"{problems[0]}; {manifest.remedy}")
        return manifest

    @property
    def remedy(self) -> str:
        """What helps where the files are not those of the manifest."""
        if self.source.source == ADOPTED:
            return "get the shards again from where they are from, and adopt them anew"
        return "remove the folder and prepare it again, or download it again"

    def problems(self, folder: Path) -> list[str]:
        """What is wrong with the files of `folder`, as far as their names, sizes and types tell."""
        from data_prep.sharding.shards import open_shard
        from data_prep.tokenization.tokenizer import tokenizer_hash

        found = []
        try:
            if tokenizer_hash(folder / "tokenizer") != self.tokenizer.sha256:
                found.append(f"{folder / 'tokenizer'} is not the tokenizer that wrote the shards beside it")
        except (OSError, UserError) as error:
            found.append(f"{folder / 'tokenizer'}: not readable ({error})")
        for shard in self.shards:
            try:
                tokens = open_shard(folder / shard.file)
            except UserError as error:
                found.append(str(error))
                continue
            if len(tokens) != shard.tokens or tokens.dtype != self.dtype:
                found.append(
                    f"{folder / shard.file}: {len(tokens)} tokens of {tokens.dtype}, "
                    f"the manifest says {shard.tokens} of {self.dtype}"
                )
        return found


def split_of_name(file: str) -> str | None:
    """The split that a shard's name says, as in `name_train_000001.npy`; None where it says none or both."""
    found = set(re.findall(r"(?<![a-z])(val|train)(?![a-z])", Path(file).stem))
    return found.pop() if len(found) == 1 else None
