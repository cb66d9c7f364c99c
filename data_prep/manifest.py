"""`manifest.json`: what a data folder holds, where it came from, and how to tell that it is whole."""

import hashlib
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.cli import UserError

FILE_NAME, TEMPORARY_NAME = "manifest.json", "manifest.json.tmp"
FORMAT_VERSION = 2


@dataclass(frozen=True)
class Shard:
    """One file: its name, `train` or `val`, how many tokens and document starts are in it, and its sha256."""

    file: str
    split: str
    tokens: int
    documents: int
    sha256: str


@dataclass(frozen=True)
class Manifest:
    """The contents of `manifest.json`.

    Attributes:
        source: where the documents came from (`data_prep.sources.Corpus.describe`).
        tokenizer: `name`, `vocab_size`, `eos_token_id`, and `sha256` of `tokenizer/tokenizer.json`.
        format: `npy` or `bin`.
        dtype: `uint16` or `uint32`.
        shard_tokens: the length that shards are cut at.
        val_shards: how many of them, the first ones, are validation.
        cleaning: the steps that the documents went through, each with its counts.
        shards: in order; validation first.
        dropped_tokens: the rest of the document that validation ends in.
        unfinished: where preparation goes on (`data_prep.writer.Position`); None once it is complete.
    """

    source: dict[str, Any]
    tokenizer: dict[str, Any]
    format: str
    dtype: str
    shard_tokens: int
    val_shards: int
    cleaning: list[dict[str, Any]] = field(default_factory=list)
    shards: list[Shard] = field(default_factory=list)
    dropped_tokens: int = 0
    unfinished: dict[str, int] | None = None
    format_version: int = FORMAT_VERSION

    def tokens(self, split: str) -> int:
        """The number of tokens in `train` or `val`."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    @property
    def shards_sha256(self) -> str:
        """One hash for all shards, in their order."""
        return hashlib.sha256("".join(shard.sha256 for shard in self.shards).encode()).hexdigest()

    def write(self, folder: Path) -> None:
        """Write `manifest.json`; it is replaced as a whole or not at all."""
        temporary = folder / TEMPORARY_NAME
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(folder / FILE_NAME)

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read `manifest.json`, of a folder that may be unfinished, without a look at the other files.

        Raises:
            UserError: for a folder without one, and one that is not ours.
        """
        path = Path(folder) / FILE_NAME
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields["format_version"]
            if version != FORMAT_VERSION:
                raise UserError(
                    f"{path}: format version {version}, this program reads {FORMAT_VERSION}; remove {folder} and "
                    f"prepare it again"
                )
            manifest = cls(**{**fields, "shards": [Shard(**shard) for shard in fields["shards"]]})
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: not a data folder (no {FILE_NAME}); prepare one with python -m data_prep.prepare, or take "
                f"on finished shards with python -m data_prep.adopt"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a manifest ({type(error).__name__}: {error})") from error
        if outside := [shard.file for shard in manifest.shards if Path(shard.file).name != shard.file]:
            raise UserError(f"{path}: shard {outside[0]!r} lies outside of the folder")
        return manifest

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
            raise UserError(f"{problems[0]}; prepare the folder again")
        return manifest

    def problems(self, folder: Path) -> list[str]:
        """What is wrong with the files of `folder`, as far as their names, sizes and types tell."""
        from data_prep.shards import open_shard
        from data_prep.tokenizer import tokenizer_hash

        found = []
        try:
            if tokenizer_hash(folder / "tokenizer") != self.tokenizer["sha256"]:
                found.append(f"{folder / 'tokenizer'} is not the tokenizer that wrote the shards beside it")
        except OSError as error:
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
