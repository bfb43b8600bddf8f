"""What a wheel carries is enough to run from, away from the sources."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

ROOT = Path(__file__).parent.parent


def test_a_wheel_carries_the_configurations_and_data_that_a_run_needs(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", tmp_path]
    made = subprocess.run([*build, ROOT], capture_output=True, text=True)
    assert made.returncode == 0, made.stdout + made.stderr
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        assert not [name for name in archive.namelist() if name.startswith("tests")]
        assert "recexplore/serving/page.html" in archive.namelist()
        archive.extractall(tmp_path / "site")
    flags = [
        "--workdir",
        "W",
        "--gin_file",
        "runs/demo.gin",
        "--gin.world.Settings.num_users=20",
    ]
    code = "import recexplore; print(recexplore.__file__); from recexplore.cli import main; main()"
    found = subprocess.run(
        [sys.executable, "-c", code, "ingest", *flags],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "site")},
    )
    assert found.stdout.strip().startswith(str(tmp_path / "site"))
    assert (tmp_path / "W/interactions/interactions.parquet").exists(), found.stderr
