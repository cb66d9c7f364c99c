"""trackio's dashboard of a run as a static Space: a page that needs no server, and the records that it shows."""

import os
from pathlib import Path

from data_prep.common.command_line import UserError, first_line
from data_prep.common.hub import limit_waiting

FOLDER = "trackio"  # in the folder of a run


def publish_dashboard(run_folder: Path, space: str, private: bool) -> str:
    """Uploads what trackio has recorded of a run so far; returns the address of its dashboard.

    Args:
        space: `USER/NAME`; made if it does not exist.
        private: which trackio refuses for a static Space.

    Raises:
        UserError: if there are no records, or for any failure of trackio or the Hub.
    """
    projects = [file.stem for file in (run_folder / FOLDER).glob("*.db")]
    if len(projects) != 1:
        raise UserError(f"{run_folder / FOLDER} has no records of one run; train with --report_to trackio")
    os.environ["TRACKIO_DIR"] = str(run_folder / FOLDER)  # read when trackio is imported
    try:
        import trackio
        from huggingface_hub import constants

        limit_waiting()
        trackio.sync(projects[0], space_id=space, sdk="static", private=private or None, force=True)
    except Exception as error:  # of several libraries
        raise UserError(f"{space}: {first_line(error)}") from error
    return f"{constants.ENDPOINT}/spaces/{space}"
