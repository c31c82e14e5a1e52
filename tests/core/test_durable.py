"""If this fails, a full disk ends the process in the middle of a write, and says nothing."""

from __future__ import annotations

import errno
import subprocess
import sys
from pathlib import Path

import pytest

from tests.skips import mount_small_disk

WRITE = """
import sys
from pathlib import Path
from edgeglm.data.pairs import empty_images
try:
    images = empty_images(Path(sys.argv[1]), count=int(sys.argv[2]), size=100)
    images[:] = 1
except OSError as error:
    sys.exit(error.errno)
"""


@pytest.mark.parametrize(("count", "code"), [(20, 0), (200, errno.ENOSPC)])
def test_an_array_that_a_disk_does_not_hold_is_an_error_and_not_the_end_of_the_process(
    tmp_path: Path, count: int, code: int
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mount_small_disk(disk, "size=1m")
    try:
        command = [sys.executable, "-c", WRITE, str(disk), str(count)]
        assert subprocess.run(command, check=False, timeout=60).returncode == code
    finally:
        subprocess.run(["umount", "-l", str(disk)], check=False)
