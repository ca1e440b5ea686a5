"""Generates the stubs in tandem from protos; with --check, fails where the committed stubs differ instead.

grpcio-tools is held at the version whose code runs with protobuf 6 and 7 and with grpcio 1.76 and newer.
"""

import filecmp
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROTOS = ROOT / "protos"
PACKAGES = sorted({path.parent.relative_to(PROTOS) for path in PROTOS.rglob("*.proto")})


def generate(out: Path) -> None:
    bin_folder = Path(sys.executable).parent
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--proto_path={PROTOS}",
        *(f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        *(f"--plugin={bin_folder / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
        *(str(path) for path in sorted(PROTOS.rglob("*.proto"))),
    ]
    subprocess.run(command, check=True, stderr=subprocess.PIPE)


def differences(fresh: Path, committed: Path) -> list[str]:
    names = {path.name for folder in (fresh, committed) for path in folder.glob("*_pb2*")}
    _, different, missing = filecmp.cmpfiles(fresh, committed, sorted(names), shallow=False)
    return different + missing


def main() -> int:
    if sys.argv[1:] != ["--check"]:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = [name for package in PACKAGES for name in differences(Path(folder) / package, ROOT / package)]
    if stale:
        print(f"the stubs differ from protos: {', '.join(stale)}; run make protos", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
