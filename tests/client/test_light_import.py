"""The SDK needs grpcio and protobuf, and ``import segue`` needs nothing at all."""

from __future__ import annotations

import subprocess
import sys

PREAMBLE = """
import sys

class OnlyTheStandardLibraryAnd:
    def __init__(self, *names):
        self.allowed = {*sys.stdlib_module_names, *names}

    def find_spec(self, name, path=None, target=None):
        if name.partition('.')[0] not in self.allowed:
            raise ModuleNotFoundError(f'{name} is blocked', name=name)
"""


def run(code: str) -> None:
    result = subprocess.run(
        [sys.executable, "-I", "-W", "error", "-c", PREAMBLE + code], check=False, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr


def test_the_block_works() -> None:
    run(
        "sys.meta_path.insert(0, OnlyTheStandardLibraryAnd('segue', 'grpc', 'google'))\n"
        "for name in ('msgspec', 'torch', 'numba', 'numpy', 'tokenizers', 'rich', 'typer'):\n"
        "    try: __import__(name)\n"
        "    except ModuleNotFoundError: continue\n"
        "    raise SystemExit(f'{name} was imported')\n"
    )


def test_the_sdk_needs_only_grpc_and_protobuf() -> None:
    run(
        "sys.meta_path.insert(0, OnlyTheStandardLibraryAnd('segue', 'grpc', 'google', 'typing_extensions'))\n"
        "import segue\n"
        "for name in segue.__all__: getattr(segue, name)\n"
        "with segue.Client('127.0.0.1:1') as client:\n"
        "    try: client.info(timeout=5)\n"
        "    except segue.EngineUnavailableError: sys.exit(0)\n"
        "sys.exit('nothing listens there')\n"
    )


def test_importing_the_package_loads_no_grpc() -> None:
    run(
        "sys.meta_path.insert(0, OnlyTheStandardLibraryAnd('segue'))\n"
        "import segue\n"
        "segue.SLO(ttft_ms=200), segue.Message(role='user', content='x'), segue.InvalidRequestError\n"
        "sys.exit('grpc' in sys.modules)\n"
    )


def test_what_the_package_does_not_have_is_an_attribute_error() -> None:
    run(
        "import segue\n"
        "try: segue.AsyncClientt\n"
        "except AttributeError as error: sys.exit('AsyncClientt' not in str(error))\n"
        "sys.exit('no error')\n"
    )
