"""Clean raw documents with datatrove: filters, deduplication, GPT-3's quality classifier and decontamination.

python -m data_prep.clean data_prep/configs/clean.yaml
"""

import contextlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from data_prep.cleaning.configuration import STEPS, CleanConfig, executor_class, read_config
from data_prep.common.command_line import ArgumentParser, UserError, run
from data_prep.common.files import partial_name, write_text
from data_prep.common.locks import LOCK_NAME, locked
from data_prep.common.records import CleaningStep
from data_prep.common.schema import read_json
from data_prep.reading.sources import CLEANING_CONFIG, CLEANING_REPORT

QUEUED = "queued"  # in work/, once Slurm has the tasks


def clean(config: CleanConfig) -> list[CleaningStep] | None:
    """Make `config.output`: a folder of .jsonl.zst files for each source, and `cleaning.json`.

    What an interrupted cleaning has finished is not done again; an output that is complete is left as it is.

    Returns:
        The report, one entry a step; None where the executor has only queued the tasks.

    Raises:
        UserError: for whatever the user can mend.
    """
    output = Path(config.output)
    work, report = output / "work", output / CLEANING_REPORT
    _claim(config, output)
    with locked(output):
        if not report.exists():
            work.mkdir(exist_ok=True)
            if (work / QUEUED).exists():
                return None
            with _output_to(work / "log"):
                _run_stages(config, work)
            if config.executor == "slurm":
                (work / QUEUED).touch()
                return None
        _remove_work(work)
    return read_json(report, list[CleaningStep])


def _remove_work(work: Path) -> None:
    """Remove what the stages have written into `work`, by its names, and the folder if nothing else is in it."""
    for name in ("logs", "out", *STEPS):
        if (work / name).is_dir():
            shutil.rmtree(work / name)
    for name in ("log", QUEUED):
        (work / name).unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it is not there, or has files of others in it
        work.rmdir()


def _run_stages(config: CleanConfig, work: Path) -> None:
    from data_prep.cleaning.stages import stages

    planned = stages(config)
    previous = None
    for number, stage in enumerate(planned, start=1):
        print(f"{number}/{len(planned)} {stage.name}", flush=True)
        executor = executor_class(config.executor)(
            pipeline=stage.pipeline,
            tasks=stage.tasks,
            workers=min(config.workers, stage.tasks),
            logging_dir=str(work / "logs" / f"{number:02d}_{stage.name}"),
            depends=previous,
            **config.executor_settings,
        )
        _run_stage(executor, stage.name, work / "log")
        previous = executor


def _run_stage(executor: Any, name: str, log: Path) -> None:
    try:
        executor.run()
    except UserError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"{name} failed with {type(error).__name__}: {reason}; see {log}, and run the same command to go on"
        ) from error


@contextlib.contextmanager
def _output_to(path: Path) -> Iterator[None]:
    """Send what this process and those that it starts write to stderr, datatrove's log, to the end of a file."""
    sys.stderr.flush()
    kept, kept_object = os.dup(2), sys.stderr
    with open(path, "a", encoding="utf-8") as file:
        os.dup2(file.fileno(), 2)
        sys.stderr = file
        try:
            yield
        finally:
            sys.stderr = kept_object
            os.dup2(kept, 2)
            os.close(kept)


def _claim(config: CleanConfig, output: Path) -> None:
    """Note in the output folder what makes it, or check that it is the same."""
    # Through JSON, so that what is compared is what was written.
    wanted = json.loads(json.dumps(config.identity()))
    path = output / CLEANING_CONFIG
    if path.exists():
        found = read_json(path, dict[str, Any])
        before, now = _flat(found), _flat(wanted)
        if different := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
            details = ", ".join(
                f"{name}={_short(before.get(name))} (now: {_short(now.get(name))})" for name in different
            )
            raise UserError(f"{output} was made with {details}; choose another output, or remove this one")
        return
    temporary = path.with_name(partial_name(path.name))
    if output.exists() and any(found not in (temporary, output / LOCK_NAME) for found in output.iterdir()):
        raise UserError(f"{output} exists and was not made by this program (no {path.name}); choose another output")
    output.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(wanted, indent=2) + "\n")


def _flat(settings: dict[str, Any], where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in settings.items():
        flat |= _flat(value, f"{where}{name}.") if isinstance(value, dict) and value else {f"{where}{name}": value}
    return flat


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def table(report: list[CleaningStep]) -> str:
    """The report for a person: what each step left."""
    if not report:
        return "no step was run"
    lines = [f"{'step':<20}{'documents':>12}{'kept':>8}{'characters':>16}{'kept':>8}"]
    first = report[0]
    lines.append(f"{'raw':<20}{first.documents_in:>12,}{'':>8}{first.characters_in:>16,}")
    for step in report:
        line = f"{step.step:<20}"
        for unit, width in (("documents", 12), ("characters", 16)):
            before, after = getattr(step, f"{unit}_in"), getattr(step, f"{unit}_out")
            line += f"{after:>{width},}{after / max(before, 1):>8.1%}"
        lines.append(line)
    empty = [name for name, counts in report[-1].sources.items() if not counts.documents_out]
    return "\n".join(lines + [f"source {name!r}: no document is left" for name in empty])


def main() -> None:
    parser = ArgumentParser("python -m data_prep.clean", __doc__)
    parser.add_argument("config", type=Path, help="YAML file; data_prep/configs/clean.yaml explains every setting")
    config = read_config(parser.parse_args().config)
    report = clean(config)
    if report is None:
        print(
            f"queued; once the jobs have ended, {config.output}/{CLEANING_REPORT} is there and this command prints it; "
            f"if any has failed, remove {config.output}/work/{QUEUED} and run it to queue what is left"
        )
    else:
        print(table(report))
        print(f"{config.output}: python -m data_prep.prepare FOLDER --source {config.output}")


if __name__ == "__main__":
    run(main)
