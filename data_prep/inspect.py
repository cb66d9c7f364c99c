"""Show what is in data folders: sources, document lengths, bytes per token, and documents as text.

python -m data_prep.inspect data/quickstart
python -m data_prep.inspect data/web data/books --documents 0 --html mixture.html
python -m data_prep.inspect data/quickstart --run runs/quickstart --sequences 592:608
"""

import sys
from pathlib import Path

from data_prep.common.command_line import ArgumentParser, UserError, redact, run
from data_prep.common.hub import local_folder
from data_prep.inspection.documents import sample, sequences
from data_prep.inspection.page import Inspected, write_page
from data_prep.inspection.statistics import Statistics, statistics
from data_prep.sharding.manifest import Manifest

_BAR = 40


def histogram(found: Statistics) -> str:
    """The lengths of documents, one line with a bar for each power of two."""
    longest = found.lengths.max()
    return "\n".join(
        f"  {first:>10,} to {last:>10,}  {count:>12,}  {'#' * round(_BAR * count / longest)}"
        for first, last, count in found.length_rows()
    )


def summary(one: Inspected, total: int) -> str:
    """The numbers of a folder."""
    manifest, found = one.manifest, one.statistics
    return (
        f"{one.folder}\n"
        f"source      {redact(manifest.source.source)}\n"
        f"tokenizer   {manifest.tokenizer.name}, {manifest.tokenizer.vocab_size:,} ids, {manifest.dtype}\n"
        f"tokens      {found.tokens:,} ({found.tokens / total:.1%} of all shown): "
        f"{manifest.tokens('train'):,} for training, {manifest.tokens('val'):,} for validation, "
        f"in {len(manifest.shards)} shards\n"
        f"documents   {found.documents:,}, {found.tokens / found.documents:,.0f} tokens each\n"
        f"fertility   {found.fertility}\n"
        f"cleaning    {', '.join(step.step for step in manifest.cleaning) or 'none'}\n"
        f"lengths in tokens, documents\n{histogram(found)}"
    )


def _range(word: str) -> tuple[int, int]:
    first, _, stop = word.partition(":")
    return int(first), int(stop or int(first) + 1)


def main() -> None:
    parser = ArgumentParser("python -m data_prep.inspect", __doc__)
    parser.add_argument("folders", nargs="+", help="data folders, or hf://datasets/USER/NAME")
    parser.add_option("documents", type=int, default=3, help="to show of each folder")
    parser.add_option("split", choices=["train", "val"], default="train", help="to show documents of")
    parser.add_option("seed", type=int, default=0, help="of the choice of documents")
    choices = ["auto", "always", "never"]
    parser.add_option("color", choices=choices, default="auto", help="of tokens; auto: on a terminal")
    parser.add_option("html", type=Path, help="also write all of it to this HTML page")
    parser.add_option("sequences", type=_range, metavar="FIRST:STOP", help="show these training sequences instead")
    parser.add_option("run", type=Path, help="folder of the run whose sequences they are")
    args = parser.parse_args()
    if (args.sequences is None) != (args.run is None):
        raise UserError("sequences are those of a run: give --sequences and --run together")
    if args.sequences is not None and args.html is not None:
        raise UserError("--html shows folders, not --sequences; give one of them")
    color = args.color == "always" or (args.color == "auto" and sys.stdout.isatty())
    if args.sequences is not None:
        for excerpt in sequences(args.folders, args.run, *args.sequences):
            print(f"--- {excerpt.title}\n{excerpt.shown(color)}")
        return
    if args.documents < 0 or args.seed < 0:
        raise UserError(f"documents={args.documents} and seed={args.seed} must be at least 0")
    manifests = {folder: Manifest.read(folder) for folder in map(local_folder, args.folders)}
    total = sum(shard.tokens for manifest in manifests.values() for shard in manifest.shards)
    inspected = []
    for folder, manifest in manifests.items():
        documents = list(sample(folder, manifest, args.split, args.documents, args.seed))
        inspected.append(Inspected(folder, manifest, statistics(folder, manifest), documents))
        print(summary(inspected[-1], total))
        for excerpt in documents:
            print(f"--- {excerpt.title}\n{excerpt.shown(color)}")
        print()
    if args.html is not None:
        write_page(args.html, inspected)
        print(f"page  {args.html}")


if __name__ == "__main__":
    run(main)
