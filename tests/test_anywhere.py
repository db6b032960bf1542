"""pytest as people start it: from another folder, without a home, in a narrow terminal that reads no UTF-8, in the background, with
standard input closed and with what they have set for their own work."""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

pytestmark = pytest.mark.host

TESTS = Path(__file__).parent
FILES = ("chat", "cli", "first_word", "presets", "progress", "startup", "tune", "xray")
CASES = {"hardware": "an_error_costs or nobody_has_to_read", "torch": "inductor", "packaging": "wheel"}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="a shell of POSIX")
def test_whoever_starts_it_and_however(tmp_path):
    temporary = tempfile.mkdtemp(prefix="with späces ")  # not below tmp_path: sockets have short names
    kept = ("PATH", "PYTHONPATH", "LD_", "PIP_", "SSL_", "HTTP", "NO_PROXY")  # how programs and packages are found here
    environment = {name: value for name, value in os.environ.items() if name.upper().startswith(kept)}
    environment |= {"TMPDIR": temporary, "HOME": "/dev/null", "LANG": "C", "COLUMNS": "30", "HF_HOME": "/dev/null/hf"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_TOKEN": "nonsense", "TRANSFORMERS_OFFLINE": "1", "TRILLAMA_BACKEND": "reference"}
    environment |= {"TRILLAMA_TUNING": "/dev/null/tuning.json", "TRILLAMA_PDL": "1"}
    chosen = [str(TESTS / f"test_{name}.py") for name in (*FILES, *CASES)]
    names = " or ".join([*(f"test_{name}.py" for name in FILES), *(f"(test_{name}.py and ({k}))" for name, k in CASES.items())])
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", names, *chosen]
    started = ["sh", "-c", 'trap "" INT HUP; exec "$@" <&-', "sh", *command]
    run = subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8", errors="replace")
    shutil.rmtree(temporary)
    assert run.returncode == 0, run.stdout[-4000:] + run.stderr[-1000:]
    assert " passed" in run.stdout
