"""The tables people read are the ones the benchmarks wrote."""

import subprocess
import sys
from pathlib import Path


def test_the_tables_in_the_readmes_come_from_the_result_files():
    script = Path(__file__).parent.parent / "benchmarks" / "tables.py"
    run = subprocess.run([sys.executable, script, "--check"], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + "run python benchmarks/tables.py"
