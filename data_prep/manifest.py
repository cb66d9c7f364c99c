"""`manifest.json`: what a data folder holds, where it came from, and how to tell that it is whole."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from data_prep.cli import UserError

FILE_NAME = "manifest.json"
FORMAT_VERSION = 1


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
        source: where the documents came from (`data_prep.sources.Source`).
        tokenizer: `name`, `vocab_size`, `eos_token_id`, and `sha256` of `tokenizer/tokenizer.json`.
        dtype: `uint16` or `uint32`.
        shard_tokens: the length that shards are cut at.
        cleaning: the steps that the documents went through, each with its counts.
        dropped_tokens: the rest of the document that validation ends in.
        shards: in order; validation first.
    """

    source: dict[str, Any]
    tokenizer: dict[str, Any]
    dtype: str
    shard_tokens: int
    shards: list[Shard]
    dropped_tokens: int = 0
    cleaning: list[dict[str, Any]] = field(default_factory=list)
    format_version: int = FORMAT_VERSION

    def tokens(self, split: str) -> int:
        """The number of tokens in `train` or `val`."""
        return sum(shard.tokens for shard in self.shards if shard.split == split)

    def write(self, folder: Path) -> None:
        """Write `manifest.json`; it appears whole or not at all."""
        temporary = folder / f"{FILE_NAME}.tmp"
        with open(temporary, "w", encoding="utf-8") as file:
            json.dump(asdict(self), file, indent=2)
            file.write("\n")
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(folder / FILE_NAME)

    @classmethod
    def read(cls, folder: Path) -> "Manifest":
        """Read `manifest.json` and check it against the files beside it, by name and size, and by hash
        for the tokenizer.

        Raises:
            UserError: for a folder without one, a format that is not ours, shards that are missing or
                cut short, and another tokenizer than the one that wrote them.
        """
        path = Path(folder) / FILE_NAME
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            version = fields.pop("format_version")
            if version != FORMAT_VERSION:
                raise UserError(f"{path}: format version {version}, this program reads {FORMAT_VERSION}")
            manifest = cls(**{**fields, "shards": [Shard(**shard) for shard in fields["shards"]]})
        except FileNotFoundError as error:
            raise UserError(
                f"{folder}: not a data folder (no {FILE_NAME}); prepare one with python -m data_prep.prepare"
            ) from error
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(f"{path}: not a manifest ({type(error).__name__}: {error})") from error
        manifest._check_files(Path(folder))
        return manifest

    def _check_files(self, folder: Path) -> None:
        from data_prep.shards import open_shard
        from data_prep.tokenizer import tokenizer_hash

        try:
            if tokenizer_hash(folder / "tokenizer") != self.tokenizer["sha256"]:
                raise UserError(f"{folder / 'tokenizer'} is not the tokenizer that wrote the shards beside it")
        except OSError as error:
            raise UserError(f"{folder / 'tokenizer'}: not readable ({error}); prepare the folder again") from error
        for shard in self.shards:
            if Path(shard.file).name != shard.file:
                raise UserError(f"{folder / FILE_NAME}: shard {shard.file!r} lies outside of the folder")
            tokens = open_shard(folder / shard.file)
            if len(tokens) != shard.tokens or tokens.dtype != self.dtype:
                raise UserError(
                    f"{folder / shard.file}: {len(tokens)} tokens of {tokens.dtype}, "
                    f"the manifest says {shard.tokens} of {self.dtype}; prepare the folder again"
                )
