"""What preparation shows of itself while it runs."""

import sys
import time
from typing import Any

from data_prep.reading.readers import Block, Cursor
from data_prep.reading.sources import Corpus
from data_prep.sharding.manifest import Manifest

_SECONDS_BETWEEN_LINES = 30


class Progress:
    """Tokens a second, documents, shard and time left: a bar on a terminal, a line now and then elsewhere.

    Attributes:
        done: bytes of the corpus that have been read, those of earlier runs included.
        tokens: so many came out of the bytes that this run has read.
    """

    def __init__(self, corpus: Corpus, start: Cursor) -> None:
        self.total = corpus.bytes
        self.before = self.done = sum(corpus.sizes[: start.file])
        self.tokens = self.documents = 0
        self.started = self.last_line = time.monotonic()

    def __enter__(self) -> "Progress":
        from tqdm import tqdm

        form = "{percentage:3.0f}% |{bar:20}| {desc}, {elapsed} gone, {remaining} left"
        self.bar = tqdm(total=self.total, initial=self.done, disable=None, bar_format=form)
        return self

    def __exit__(self, *error: Any) -> None:
        self.bar.close()

    def update(self, block: Block, tokens: int, manifest: Manifest) -> None:
        """Count a block that has been written."""
        self.done += block.size
        self.tokens += tokens
        self.documents += len(block.texts)
        now = time.monotonic()
        text = (
            f"shard {len(manifest.shards)}: {self.documents:,} documents, {self.tokens / 1e6:,.1f}M tokens, "
            f"{self.tokens / 1e6 / max(now - self.started, 1e-9):.2f}M tokens/s"
        )
        self.bar.set_description_str(text, refresh=False)
        self.bar.update(block.size)
        if self.bar.disable and now - self.last_line > _SECONDS_BETWEEN_LINES:
            self.last_line = now
            left = (self.total - self.done) * (now - self.started) / max(self.done - self.before, 1)
            print(f"{self.done / self.total:4.0%}  {text}, {self.bar.format_interval(left)} left", file=sys.stderr)

    def tokens_to_come(self) -> int:
        """About how many tokens the rest of the corpus will be."""
        return int(self.tokens * max(0, self.total - self.done) / max(self.done - self.before, 1))
