"""The Job that downloads a model, with what the scheduler's image has, from a hub of the test's own."""

import subprocess
import sys
from pathlib import Path

import yaml

from tandem_shared.model_folder import EMBEDDED_MODEL, resolve_model
from tests.support.fake_hub import REPOSITORY, FakeHub
from tests.support.requirements import declared_requirements, link_packages
from tests.unit.deploy.manifests import FOLDER, build, named, on_linux

pytestmark = on_linux
PROGRAM = "import sys; sys.path.append(sys.argv.pop(1)); from huggingface_hub.cli.hf import main; sys.exit(main())"


def test_the_job_puts_the_model_where_the_services_look_for_it(tmp_path: Path) -> None:
    job = yaml.safe_load((FOLDER / "download-model.yaml").read_text())
    [container] = job["spec"]["template"]["spec"]["containers"]
    program, verb, repository, flag, folder = container["command"]
    assert (program, verb, flag) == ("hf", "download", "--local-dir")
    [settings] = named(build("base"), "ConfigMap").values()
    assert folder == settings["data"]["TANDEM_MODEL"] and folder.endswith(repository.partition("/")[2])

    files = {path.name: path.read_bytes() for path in resolve_model(EMBEDDED_MODEL, []).iterdir() if path.is_file()}
    packages, model = tmp_path / "packages", tmp_path / "model"
    packages.mkdir()
    # The image of the scheduler has this extra.
    link_packages(packages, declared_requirements("smg"))
    with FakeHub(files) as hub:
        command = [sys.executable, "-S", "-c", PROGRAM, str(packages), verb, REPOSITORY, flag, str(model)]
        environment = {**hub.environment(tmp_path / "cache"), "HOME": str(tmp_path), "PYTHONPATH": ""}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert {path.name: path.read_bytes() for path in model.iterdir() if path.is_file()} == files
