"""Takes the pictures of a run's page: trains examples/lightning_bytes.py with three peers on this machine, and looks.

    python docs/images/photograph.py        # writes page.png and page-phone.png; needs Chromium, takes minutes

A third peer joins later than the others. Nothing in the pictures is made up.
"""

from __future__ import annotations

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from PIL import Image

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))

from monitor.browser import Tab, browse  # noqa: E402 - it is found only now

IMAGES = Path(__file__).parent
SCRIPT = ROOT / "examples" / "lightning_bytes.py"
STEPS, THIRD_JOINS, LOOK = 240, 40, 200
"""Steps of the run, that at which the third peer is started, and that of the picture."""
POLL_SECONDS = 0.2
PATIENCE_SECONDS = 1800.0
SIZES = {"page.png": (1200, 900), "page-phone.png": (390, 844)}


def peer(stack: ExitStack, folder: Path, number: int, **variables: str) -> Path:
    """Starts one; the path of what it says."""
    log = folder / f"peer-{number}.log"
    out = stack.enter_context(log.open("w"))
    environment = {
        **os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src"), "DISTRO_OPTIM_RELAY": "none",
        "DISTRO_OPTIM_BIND_ADDR": "127.0.0.1:0", **variables,
    }  # fmt: skip
    command = [sys.executable, str(SCRIPT), str(STEPS)]
    process = subprocess.Popen(command, stdout=out, stderr=out, env=environment, cwd=ROOT)
    stack.callback(process.wait)
    stack.callback(process.terminate)
    return log


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(ignore_cleanup_errors=True)))
        settings = '{"run_id": "bytes", "global_batch_size": 12, "joiner_wait_time": 5, "peers_to_start": 2}'
        log = peer(stack, folder, 0, DISTRO_OPTIM_WEB="0", DISTRO_OPTIM_CONFIG=settings)
        said: dict[str, str] = {}
        while len(said) < 2:
            time.sleep(POLL_SECONDS)
            for name, pattern in (("url", r"shown at (\S+)"), ("run", r"DISTRO_OPTIM_RUN=(psyche1\w+)")):
                if found := re.search(pattern, log.read_text()):
                    said[name] = found[1]
        peer(stack, folder, 1, DISTRO_OPTIM_RUN=said["run"])

        async def look(tab: Tab) -> None:
            await tab.until(f"now && now.step >= {THIRD_JOINS}")
            peer(stack, folder, 2, DISTRO_OPTIM_RUN=said["run"])
            await tab.until(f"now.step >= {LOOK} && now.peers.filter(p => p.in_epoch).length === 3")
            for name, size in SIZES.items():
                await tab.size(*size)
                await tab.until(f"innerWidth === {size[0]}")
                await tab.photograph(IMAGES / name)

        browse(folder / "browser", said["url"], look, seconds=PATIENCE_SECONDS)
    for name in SIZES:
        # An optimized palette of 256 colours: nobody sees the difference, and a clone of the repository is smaller.
        picture: Any = Image.open(IMAGES / name).convert("RGB")
        picture.quantize(256, dither=Image.Dither.NONE).save(IMAGES / name, optimize=True)


if __name__ == "__main__":
    main()
