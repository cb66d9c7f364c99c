"""The git revision in the records of a run: this project's own, or none."""

import subprocess

from training.records.environment import git_revision


def test_the_revision_of_the_repository_that_tracks_the_file(tmp_path):
    def git(*words):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        done = subprocess.run(["git", *identity, *words], cwd=tmp_path, check=True, capture_output=True, text=True)
        return done.stdout.strip()

    installed = tmp_path / "installed.py"
    installed.touch()
    assert git_revision(installed) is None  # in no repository
    git("init")
    tracked = tmp_path / "tracked.py"
    tracked.touch()
    git("add", "tracked.py")
    git("commit", "-m", "one")
    commit = git("rev-parse", "HEAD")
    assert git_revision(tracked) == commit
    assert git_revision(installed) is None  # in an environment within somebody's repository
    tracked.write_text("changed")
    assert git_revision(tracked) == f"{commit}+"
