"""Clean raw documents with datatrove: filters, deduplication, GPT-3's quality classifier and decontamination.

python -m data_prep.clean data_prep/configs/clean.yaml
"""

import contextlib
import importlib.util
import json
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from data_prep.cleaning.configuration import INSTALL, CleanConfig, make_executor
from data_prep.common.command_line import ArgumentParser, UserError, raise_all, run
from data_prep.common.files import partial_name, write_text
from data_prep.common.locks import LOCK_NAME, locked
from data_prep.common.schema import find_problems, read_json, read_yaml, validate
from data_prep.sources.corpus import files_read
from data_prep.sources.files import CLEANING_CONFIG, CLEANING_REPORT
from data_prep.sources.source import CleaningStep

QUEUED = "queued"  # sentinel file in work/: Slurm has the tasks


def read_config(path: Path) -> CleanConfig:
    """Reads and checks a configuration (`UserError` with all problems)."""
    settings = read_yaml(path)
    if missing := [name for name in ("datatrove", "spacy", "sklearn") if importlib.util.find_spec(name) is None]:
        raise UserError(f"cleaning needs {', '.join(missing)}, not installed here: {INSTALL}")
    from data_prep.cleaning.pipeline import plan
    from data_prep.cleaning.steps import Stage

    found = find_problems(settings, CleanConfig, str(path))
    problems, wrong = [problem for _, problem in found], {name for name, _ in found}
    config = validate({name: settings[name] for name in settings if name not in wrong}, CleanConfig, str(path))
    if "executor" not in wrong:
        make_executor(config, Stage("", [], 1), Path("logs"), None, problems)
    plan(config, {}, problems)
    raise_all(list(dict.fromkeys(problems)), "problems", f"{path}: ")
    return config


def clean(config: CleanConfig) -> list[CleaningStep] | None:
    """Creates `config.output`: one folder of .jsonl.zst files per source, and `cleaning.json`.

    Continues an interrupted cleaning; leaves a complete output as it is.

    Returns:
        The report, one entry a step; None if the executor has only queued the tasks.

    Raises:
        UserError: for any error that the user can fix.
    """
    output = Path(config.output)
    work, report = output / "work", output / CLEANING_REPORT
    stages = _claim(config, output)
    with locked(output):
        if not report.exists():
            work.mkdir(exist_ok=True)
            if (work / QUEUED).exists():
                return None
            with _stderr_to(work / "log"):
                _run_stages(config, stages, work)
            if config.executor == "slurm":
                (work / QUEUED).touch()
                return None
        for name in ("logs", "out", *(f"{number:02d}" for number in range(len(config.steps)))):
            shutil.rmtree(work / name, ignore_errors=True)
        for name in ("log", QUEUED):
            (work / name).unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # missing, or with files of others in it
            work.rmdir()
    return read_json(report, list[CleaningStep])


def _run_stages(config: CleanConfig, stages: list[Any], work: Path) -> None:
    executor, problems = None, list[str]()
    for number, stage in enumerate(stages, start=1):
        print(f"{number}/{len(stages)} {stage.name}", flush=True)
        executor = make_executor(config, stage, work / "logs" / f"{number:02d}_{stage.name}", executor, problems)
        raise_all(problems)
        try:
            executor.run()
        except UserError:
            raise
        except Exception as error:
            reason = f"{stage.name} failed with {type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"{reason}; see {work / 'log'}, and run the same command to go on") from error


@contextlib.contextmanager
def _stderr_to(path: Path) -> Iterator[None]:
    """Appends stderr of this process and its children (datatrove's log) to a file."""
    descriptor = os.dup(2)
    with open(path, "a", encoding="utf-8") as file, contextlib.redirect_stderr(file):
        os.dup2(file.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(descriptor, 2)
            os.close(descriptor)


def _claim(config: CleanConfig, output: Path) -> list[Any]:
    """Records everything that determines the result in the output folder, or checks it against an earlier record;
    returns the passes, over the same Hub commits."""
    from data_prep.cleaning.pipeline import plan

    path = output / CLEANING_CONFIG
    stored = read_json(path, dict[str, Any]) if path.exists() else None
    commits = {name: found.get("commit") for name, found in (stored or {}).get("found", {}).items()}
    problems: list[str] = []
    corpora, stages = plan(config, commits, problems)
    raise_all(problems)
    for name, corpus in corpora.items():
        if corpus.not_read:
            print(f"{name}: {files_read(len(corpus.paths), corpus.not_read, {})}")
    wanted = config.model_dump(mode="json", exclude={"executor", "executor_settings", "workers"})
    wanted["found"] = {name: asdict(corpus.describe()) for name, corpus in corpora.items()}
    evaluation_sets = (name for step in config.steps for name in (step.model_extra or {}).get("against", []))
    wanted["bytes"] = {name: os.path.getsize(name) for name in evaluation_sets}
    wanted = json.loads(json.dumps(wanted))  # with lists for tuples, as they are stored
    if stored is not None:
        before, now = _flat(stored), _flat(wanted)
        if different := sorted(name for name in {*before, *now} if before.get(name) != now.get(name)):
            changes = (f"{name}={before.get(name)!r:.60} (now: {now.get(name)!r:.60})" for name in different)
            raise UserError(f"{output} was made with {', '.join(changes)}; choose another output, or remove this one")
        return stages
    ours = (partial_name(path.name), LOCK_NAME)
    if output.exists() and any(found.name not in ours for found in output.iterdir()):
        raise UserError(f"{output} exists and was not made by this program (no {path.name}); choose another output")
    output.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(wanted, indent=2) + "\n")
    return stages


def _flat(settings: Any, where: str = "") -> dict[str, Any]:
    """Values by their names, as in `steps.0.min_doc_words`."""
    if not settings or not isinstance(settings, dict | list):
        return {where: settings}
    pairs = settings.items() if isinstance(settings, dict) else enumerate(settings)
    return {key: value for name, one in pairs for key, value in _flat(one, f"{where}.{name}".lstrip(".")).items()}


def table(report: list[CleaningStep]) -> str:
    """Formats the report as a table of sizes after each step."""
    if not report:
        return "no step was run"
    first = report[0]
    lines = [f"{'step':<20}{'documents':>12}{'kept':>8}{'characters':>16}{'kept':>8}"]
    lines.append(f"{'raw':<20}{first.documents_in:>12,}{'':>8}{first.characters_in:>16,}")
    for step in report:
        documents = f"{step.documents_out:>12,}{step.documents_out / max(step.documents_in, 1):>8.1%}"
        characters = f"{step.characters_out:>16,}{step.characters_out / max(step.characters_in, 1):>8.1%}"
        lines.append(f"{step.step:<20}{documents}{characters}")
    empty = [name for name, counts in report[-1].sources.items() if not counts.documents_out]
    return "\n".join(lines + [f"source {name!r}: no document is left" for name in empty])


def main() -> None:
    parser = ArgumentParser("python -m data_prep.clean", __doc__)
    parser.add_argument("config", type=Path, help="YAML file; data_prep/configs/clean.yaml explains every setting")
    config = read_config(parser.parse_args().config)
    if (report := clean(config)) is None:
        print(
            f"queued; once the jobs have ended, {config.output}/{CLEANING_REPORT} is there and this command prints it; "
            f"if any has failed, remove {config.output}/work/{QUEUED} and run it to queue what is left"
        )
    else:
        print(table(report))
        print(f"{config.output}: python -m data_prep.prepare FOLDER --source {shlex.quote(str(config.output))}")


if __name__ == "__main__":
    run(main)
