"""Documents and sequences of data folders as the texts of their tokens."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from data_prep.common.command_line import UserError, first_line
from data_prep.common.hub import local_folder
from data_prep.common.schema import STRICT, Count, Positive, read_yaml, validate
from data_prep.sharding.manifest import Manifest
from data_prep.sharding.order import shares_of, training_order
from data_prep.sharding.shards import open_shard
from data_prep.tokenization.tokenizer import hf_tokenizer

_EXCERPT = 120  # tokens
# Backgrounds of neighbouring tokens, in a terminal of 256 colours; the text is black.
_BACKGROUNDS = (153, 157, 222, 217, 189, 194)


@dataclass(frozen=True)
class _OrderSettings:
    """Settings of a run that determine the order of its data."""

    __pydantic_config__ = STRICT | {"extra": "ignore"}

    data: list[str]
    n_positions: Positive
    order: Literal["shuffled", "sequential"]
    seed: Count
    sequence_length: Positive | None = None
    data_weights: list[Annotated[float, Field(gt=0)]] | None = None


@dataclass(frozen=True)
class Excerpt:
    """The beginning of a document, or a sequence.

    Attributes:
        text: decoded as a whole.
        pieces: the text of each token; bytes that are not a whole character are U+FFFD.
        is_cut: more follows.
    """

    title: str
    text: str
    pieces: list[str]
    is_cut: bool

    def shown(self, color: bool) -> str:
        """The excerpt for a terminal; with `color` each token has a background other than its neighbours'."""
        more = " ..." if self.is_cut else ""
        if not color:
            return self.text + more
        painted = (
            f"\033[30;48;5;{background}m{piece.replace(chr(10), '⏎' + chr(10))}\033[0m"
            for piece, background in zip(self.pieces, itertools.cycle(_BACKGROUNDS), strict=False)
        )
        return "".join(painted) + more


def sample(folder: Path, manifest: Manifest, split: str, count: int, seed: int) -> Iterator[Excerpt]:
    """`count` random documents of a split, each up to the end of its shard."""
    tokenizer = hf_tokenizer(folder / "tokenizer")
    shards = [shard for shard in manifest.shards if shard.split == split and shard.documents]
    rng = np.random.default_rng(seed)
    for number in rng.integers(sum(shard.documents for shard in shards), size=count):
        for shard in shards:  # the shard in which document `number` begins
            if number < shard.documents:
                break
            number -= shard.documents
        tokens = open_shard(folder / shard.file)
        starts = np.flatnonzero(tokens == manifest.tokenizer.eos_token_id)
        document = tokens[starts[number] : starts[number + 1] if number + 1 < len(starts) else None]
        title = f"{shard.file}, document {number + 1}, {len(document):,} tokens"
        yield _excerpt(tokenizer, title, document[1:], _EXCERPT)


def sequences(names: list[str], run_folder: Path, first: int, stop: int) -> Iterator[Excerpt]:
    """The training sequences at positions `first` to before `stop` of a run on these folders (`UserError` for a folder
    that is not a run's, and for a run on other data)."""
    config = run_folder / "config.yaml"
    try:
        settings = validate(read_yaml(config), _OrderSettings, str(config))
    except (FileNotFoundError, UserError) as error:
        raise UserError(f"{run_folder}: not the folder of a run ({first_line(error)})") from error
    if [Path(name).name for name in settings.data] != [Path(name).name for name in names]:
        raise UserError(f"{run_folder} is a run on {' '.join(settings.data)}; name the same folders, in that order")
    folders = list(map(local_folder, names))
    manifests = [Manifest.read(folder) for folder in folders]
    shares, length = shares_of(manifests, settings.data_weights), settings.sequence_length or settings.n_positions
    mixture = training_order(folders, manifests, shares, "train", settings.order, settings.seed, length)
    tokenizer = hf_tokenizer(folders[0] / "tokenizer")
    for position in range(first, stop):
        yield _excerpt(tokenizer, f"sequence {position}", mixture.read(position)[:-1], length)


def _excerpt(tokenizer: Any, title: str, ids: np.ndarray, tokens: int) -> Excerpt:
    shown = ids[:tokens].tolist()
    return Excerpt(title, tokenizer.decode(shown), [tokenizer.decode([number]) for number in shown], len(ids) > tokens)
