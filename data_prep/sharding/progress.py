"""What a preparation shows while it runs."""

import sys
import time
from typing import Any

from data_prep.common.records import Position
from data_prep.reading.corpus import Corpus
from data_prep.reading.formats import Block
from data_prep.sharding.manifest import Manifest

_SECONDS_BETWEEN_LINES = 30


class Progress:
    """A progress bar on a terminal, a line every 30 seconds elsewhere.

    Attributes:
        total: bytes of the corpus; 0 if it is not known.
        done: bytes that have been read, by earlier processes too.
        tokens: tokens that this process has made.
    """

    def __init__(self, corpus: Corpus, start: Position) -> None:
        before = corpus.bytes_before(start)
        self.total = 0 if before is None else corpus.bytes
        self.before = self.done = before or 0
        self.tokens = self.documents = 0
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        from tqdm import tqdm

        share = "{percentage:3.0f}% |{bar:20}| {desc}, {elapsed} gone, {remaining} left"
        form = share if self.total else "{desc}, {elapsed} gone"
        self.bar = tqdm(total=self.total or None, initial=self.done, disable=None, bar_format=form)
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def update(self, block: Block, tokens: int, manifest: Manifest) -> None:
        """Counts a written block."""
        self.done += block.size
        self.tokens += tokens
        self.documents += len(block.texts)
        now, millions = time.monotonic(), self.tokens / 1e6
        speed = f"{millions / max(now - self.started, 1e-9):.2f}M tokens/s"
        text = f"shard {len(manifest.shards)}: {self.documents:,} documents, {millions:,.1f}M tokens, {speed}"
        self.bar.set_description_str(text, refresh=False)
        self.bar.update(block.size)
        if self.bar.disable and now - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = now
            print(f"{self._share()}{text}{self._left(now)}", file=sys.stderr)

    def _share(self) -> str:
        return f"{self.done / self.total:4.0%}  " if self.total else ""

    def _left(self, now: float) -> str:
        if not self.total:
            return ""
        left = (self.total - self.done) * (now - self.started) / max(self.done - self.before, 1)
        return f", {self.bar.format_interval(left)} left"

    def remaining_tokens(self) -> int | None:
        """Estimated number of tokens in the rest of the corpus; None if its size is not known."""
        if not self.total:
            return None
        return int(self.tokens * max(0, self.total - self.done) / max(self.done - self.before, 1))
