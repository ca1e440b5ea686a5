"""Self-signed certificates for this machine, made by openssl."""

import subprocess
from pathlib import Path

_NAMES = "subjectAltName=DNS:localhost,IP:127.0.0.1"
_CA_CONFIG = f"""
[ca]
default_ca = own
[own]
database = {{folder}}/index.txt
serial = {{folder}}/serial
default_md = sha256
policy = any
x509_extensions = names
[any]
commonName = supplied
[names]
basicConstraints = critical,CA:TRUE
{_NAMES.replace("=", " = ")}
"""


def make_certificate(folder: Path, name: str, *, is_expired: bool = False) -> tuple[Path, Path]:
    """A certificate, whose own authority it is, and its key. One that is expired was valid in January 2020."""
    certificate, key, request = (folder / f"{name}.{ending}" for ending in ("pem", "key", "csr"))
    new_key = "openssl req -newkey ec -pkeyopt ec_paramgen_curve:prime256v1 -nodes -subj /CN=localhost -keyout"
    if not is_expired:
        _run(*new_key.split(), key, "-x509", "-days", 2, "-addext", _NAMES, "-out", certificate)
        return certificate, key
    _run(*new_key.split(), key, "-out", request)
    (folder / "index.txt").touch()
    (folder / "serial").write_text("01")
    (folder / "ca.cnf").write_text(_CA_CONFIG.format(folder=folder))
    dates = "-startdate 20200101000000Z -enddate 20200201000000Z"
    sign = "openssl ca -selfsign -batch -notext"
    _run(
        *sign.split(),
        *dates.split(),
        "-config",
        folder / "ca.cnf",
        "-outdir",
        folder,
        "-keyfile",
        key,
        "-in",
        request,
        "-out",
        certificate,
    )
    return certificate, key


def _run(*command: object) -> None:
    subprocess.run([str(part) for part in command], check=True, capture_output=True)
