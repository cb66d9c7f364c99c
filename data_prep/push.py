"""Upload a data folder to the Hub, to be used as `hf://datasets/USER/NAME`.

python -m data_prep.push data/mine USER/mine
"""

import shlex
from pathlib import Path

from data_prep import contamination
from data_prep.common.command_line import ArgumentParser, UserError, redact, run
from data_prep.common.hub import PREFIX, Hub, repository_problem
from data_prep.prepare import preparing_command
from data_prep.sharding.manifest import FILE_NAME, Manifest
from data_prep.tokenization.tokenizer import tokenizer_files
from data_prep.verify import verify


def push(folder: Path, repository: str, private: bool = False, licence: str | None = None) -> str:
    """Verifies and uploads a data folder; returns the commit's URL (`UserError` for a damaged folder, or if the Hub
    refuses)."""
    manifest = Manifest.read(folder)
    if problems := list(verify(folder)):
        raise UserError(f"{problems[0]}; {manifest.remedy}")
    hub = Hub(repository, "dataset")
    hub.create(private)
    names = [FILE_NAME, contamination.FILE_NAME, *(shard.file for shard in manifest.shards)]
    files: dict[str, Path | bytes] = {name: folder / name for name in names if (folder / name).exists()}
    files |= {f"tokenizer/{path.name}": path for path in tokenizer_files(folder / "tokenizer")}
    files["README.md"] = redact(dataset_card(manifest, folder, repository, licence)).encode()
    files[FILE_NAME] = redact((folder / FILE_NAME).read_text(encoding="utf-8")).encode()
    return hub.upload(files, f"{manifest.tokens('train'):,} training tokens")


def dataset_card(manifest: Manifest, folder: Path, repository: str, licence: str | None) -> str:
    """Returns the `README.md` for a data folder on the Hub."""
    source = manifest.source
    revision = f" at `{source.commit}`" if source.commit else ""
    steps = [f"{step.step} kept {step.documents_out:,} documents" for step in manifest.cleaning]
    words = preparing_command(str(folder), manifest)
    licence_lines = f"license: {licence}\n" if licence else ""
    made_by = f"python -m {shlex.join(words)}  # which made it\n" if words else ""
    return f"""---
{licence_lines}tags:
- gpt-accelerate
- pre-tokenized
task_categories:
- text-generation
viewer: false
---

# {repository.rpartition("/")[2]}

`{source.source}` {source.name or ""}{revision}, as tokens of `{manifest.tokenizer.name}`: \
{manifest.tokens("train"):,} for training and {manifest.tokens("val"):,} for validation, in \
{len(manifest.shards)} shards of {manifest.dtype}. Every document begins with token \
{manifest.tokenizer.eos_token_id}; `{FILE_NAME}` has the hash of each shard.

Cleaning: {"; ".join(steps) or "none by this program"}.

```bash
accelerate launch training/train.py --data {PREFIX}{repository}
{made_by}```
"""


def main() -> None:
    parser = ArgumentParser("python -m data_prep.push", __doc__)
    parser.add_argument("folder", type=Path, help="data folder")
    parser.add_argument("repository", metavar="USER/NAME", help="data set on the Hub, created if missing")
    parser.add_option("private", action="store_true", help="create a private one")
    parser.add_option("license", help="licence that its card names, as the Hub spells it")
    args = parser.parse_args()
    if problem := repository_problem("repository", args.repository):
        raise UserError(problem)
    print(push(args.folder, args.repository, args.private, args.license))
    print(f"{PREFIX}{args.repository} stands for it, as in --data {PREFIX}{args.repository}")


if __name__ == "__main__":
    run(main)
