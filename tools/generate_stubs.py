"""Generates the stubs in tandem from protos, and copies the protos beside them, for users of other languages to find in
the wheel. With --check, fails where the committed files differ instead.

grpcio-tools is held at the version whose code runs with protobuf 6 and 7 and with grpcio 1.76 and newer.
"""

import filecmp
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROTOS = ROOT / "protos"
FILES = [path.relative_to(PROTOS) for path in sorted(PROTOS.rglob("*.proto"))]
PACKAGES = sorted({path.parent for path in FILES})
GENERATED = ("*_pb2*", "*.proto")


def generate(out: Path) -> None:
    """Writes all stubs and copies of the protos under a folder, where they lie as in the repository."""
    bin_folder = Path(sys.executable).parent
    command = [
        sys.executable,
        "-m",
        "grpc_tools.protoc",
        f"--proto_path={PROTOS}",
        *(f"--{kind}_out={out}" for kind in ("python", "grpc_python", "mypy", "mypy_grpc")),
        *(f"--plugin={bin_folder / name}" for name in ("protoc-gen-mypy", "protoc-gen-mypy_grpc")),
        *map(str, FILES),
    ]
    subprocess.run(command, check=True, stderr=subprocess.PIPE)
    for path in FILES:
        shutil.copyfile(PROTOS / path, out / path)


def differences(fresh: Path, committed: Path) -> list[str]:
    """The names of the generated files that differ between two folders or are in only one of them."""
    names = {path.name for folder in (fresh, committed) for pattern in GENERATED for path in folder.glob(pattern)}
    _, different, missing = filecmp.cmpfiles(fresh, committed, sorted(names), shallow=False)
    return different + missing


def main() -> int:
    """Exit status 1 if --check finds a difference."""
    if sys.argv[1:] != ["--check"]:
        generate(ROOT)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        generate(Path(folder))
        stale = [
            str(package / name) for package in PACKAGES for name in differences(Path(folder) / package, ROOT / package)
        ]
    if stale:
        print(f"differ from what protos gives: {', '.join(stale)}; run make protos", file=sys.stderr)
    return 1 if stale else 0


if __name__ == "__main__":
    sys.exit(main())
