"""A `gcloud` that writes down what it was called with, and workers that are folders.

`tpu-vm ssh --command` runs the command in every worker's folder at the same time, as its home;
`tpu-vm scp` copies into them; `describe` answers from a list. Whatever else is asked does nothing.
"""

import json
import os
import shutil
import stat
import subprocess
import sys
from pathlib import Path

SCRIPTS = Path(__file__).parent.parent.parent / "scripts"
BASH = shutil.which("bash")
SETTINGS = {"TPU_NAME": "mine", "ZONE": "us-central2-b", "PROJECT": "lab"}

_GCLOUD = """\
#!{python} -SE
import json, os, subprocess, sys
from pathlib import Path
cloud = Path({cloud!r})
arguments = sys.argv[1:]
with open(cloud / "calls", "a") as calls:
    calls.write(json.dumps(arguments) + chr(10))
flags = dict(a[2:].split("=", 1) for a in arguments if a.startswith("--") and "=" in a)
homes = sorted((cloud / "workers").glob("*"))
if flags.get("worker", "all") != "all":
    homes = [homes[int(flags["worker"])]]
failed = 0
if arguments[3] == "ssh":
    # gcloud cuts the command at spaces, and ssh puts spaces between the pieces again.
    command = " ".join(flags["command"].split(" "))
    running = [
        subprocess.Popen(["bash", "-c", command], cwd=home, env={{**os.environ, "HOME": str(home)}})
        for home in homes
    ]
    failed = max(process.wait() for process in running)
elif arguments[3] == "scp":
    *sources, destination = [a for a in arguments[4:] if not a.startswith("--")]
    for home in homes:
        failed |= subprocess.call(["cp", *sources, str(home / destination.partition(":")[2])])
elif arguments[3] == "describe":
    answers = (cloud / arguments[2]).read_text().splitlines()
    print(answers[0])
    (cloud / arguments[2]).write_text(chr(10).join(answers[1:] or answers))
sys.exit(failed)
"""


class FakeCloud:
    """A folder with a `gcloud`, a root of a small repository to call it from, and workers."""

    def __init__(self, folder: Path, num_workers: int = 1):
        self.folder = folder
        self.root = folder / "root"
        self.homes = [folder / "workers" / str(worker) for worker in range(num_workers)]
        for made in (self.root / "scripts", folder / "bin", *self.homes):
            made.mkdir(parents=True)
        for name in ("tpu_vm.sh", "tpu_worker.sh", "environment.sh"):
            target = self.root / "scripts" / name
            target.write_bytes((SCRIPTS / name).read_bytes())
        self.program("gcloud", _GCLOUD.format(python=sys.executable, cloud=str(folder)))

    def program(self, name: str, text: str) -> None:
        """Puts a program on the path."""
        path = self.folder / "bin" / name
        path.write_text(text)
        path.chmod(path.stat().st_mode | stat.S_IXUSR)

    def answers(self, kind: str, states: list[str]) -> None:
        """What `describe` says, look by look; the last stays."""
        (self.folder / kind).write_text("\n".join(states))

    def commit(self) -> str:
        """Commits all that is in the root; returns the name setup gives the archive."""
        git = ["git", "-c", "user.name=n", "-c", "user.email=e@x", "-C", str(self.root)]
        subprocess.run([*git, "init", "--quiet"], check=True)
        subprocess.run([*git, "add", "."], check=True)
        subprocess.run([*git, "commit", "--quiet", "--message=m"], check=True)
        short = [*git, "rev-parse", "--short=12", "HEAD"]
        found = subprocess.run(short, check=True, capture_output=True, text=True)
        return f"recexplore-{found.stdout.strip()}.tar.gz"

    def command(self, *arguments: str) -> list[str]:
        """How tpu_vm.sh is called."""
        return [BASH, str(self.root / "scripts/tpu_vm.sh"), *arguments]

    def environment(self, **changes: str) -> dict[str, str]:
        """Where it is called: the usual settings, the fake programs first on the path."""
        kept = {k: v for k, v in os.environ.items() if k not in ("ACCELERATOR", "RUNTIME_VERSION")}
        path = f"{self.folder / 'bin'}:{os.environ['PATH']}"
        return {**kept, **SETTINGS, "PATH": path, **changes}

    def launch(self, *arguments: str, **changes: str) -> subprocess.CompletedProcess:
        """Calls tpu_vm.sh and waits for it."""
        environment = self.environment(**changes)
        found = subprocess.run(self.command(*arguments), capture_output=True, env=environment)
        # Decoded here, because text=True would turn a carriage return into a line feed.
        found.stdout, found.stderr = found.stdout.decode(), found.stderr.decode()
        return found

    def calls(self) -> list[list[str]]:
        """What gcloud was called with so far, oldest first."""
        path = self.folder / "calls"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
