from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("module", ["segue.server.app", "segue.cli.main"])
def test_the_front_end_does_not_load_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=_ROOT).returncode == 0


def test_tokenising_does_not_load_torch(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from tests.server.rig import write_model\n"
        "from segue.server.tokenizer import ModelTokenizer; from segue.types import Message\n"
        "tokenizer = ModelTokenizer.load(write_model(Path(sys.argv[1]) / 'model'))\n"
        "assert tokenizer.encode('hello') and tokenizer.encode_chat([Message(role='user', content='x')], None)\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False, cwd=_ROOT).returncode == 0
