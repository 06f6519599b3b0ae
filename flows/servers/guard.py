"""`python -m flows.servers.guard PID MARK FOLDER`: ends the processes that a killed `make up` has left.

`make up` starts it, and ends it.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from contextlib import suppress

import psutil

from ddpm.runtime import ending
from flows.servers import up


def main(starter: int, mark: str, folder: str) -> None:
    while os.getppid() == starter:
        time.sleep(ending.INTERVAL)
    for process in up.marked(mark):
        with suppress(psutil.Error):  # it has ended meanwhile
            process.terminate()
    up.end_what_is_left(mark)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), *sys.argv[2:])
