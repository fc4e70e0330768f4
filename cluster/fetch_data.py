"""Copy a data set onto this machine's own disk, once.

command:   python cluster/fetch_data.py s3://bucket/coco /local/data

The source is a folder in an object store (s3://, gs://) or on a share; credentials are the machine's own (an
instance profile, a service account). The folder appears when it is complete; where it is already, nothing is done, so
every start of a machine may run this. To replace the data, delete the folder, or name another one.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from autodet.object_store import SCHEMES, Place, is_url

THREADS = 32  # images are small: most of the time is waiting for the store's answer


def main(argv: list[str] | None = None) -> int:
    """Fetch, unless it is here; code 1 and one line where that is not possible."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("source", help="folder: s3://…, gs://… or a path")
    parser.add_argument("folder", type=Path, help="where the data shall lie on this machine")
    options = parser.parse_args(argv)
    if options.folder.exists() and any(options.folder.iterdir()):
        print(f"{options.folder} is here already.")
        return 0
    try:
        fetch(options.source, options.folder)
    except (OSError, ValueError) as error:
        print(f"error: cannot fetch {options.source}: {error}", file=sys.stderr)
        return 1
    print(f"{options.source} is in {options.folder}.")
    return 0


def fetch(source: str, folder: Path) -> None:
    """Copy into a folder beside ``folder``, which is renamed at the end: half a data set is never seen."""
    partial = folder.parent / f"{folder.name}.partial-{os.getpid()}"
    partial.mkdir(parents=True)
    try:
        if is_url(source):
            download(source.rstrip("/"), partial)
        else:
            shutil.copytree(source, partial, dirs_exist_ok=True)
        if not any(partial.iterdir()):
            raise ValueError("nothing is there")
        os.replace(partial, folder)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def download(url: str, folder: Path) -> None:
    """All objects below a URL."""
    if url.partition("://")[0] not in SCHEMES:
        raise ValueError(f"expected {', '.join(f'{scheme}://…' for scheme in SCHEMES)} or a path")

    def bring(key: str) -> None:
        found = Place(url, key).read()
        if found is None:
            raise ValueError(f"{key} was removed meanwhile")
        path = folder / key
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(found[0])

    keys = [found.name for found in Place(url, "").files() if not found.name.endswith("/")]
    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(bring, keys))


if __name__ == "__main__":
    raise SystemExit(main())
