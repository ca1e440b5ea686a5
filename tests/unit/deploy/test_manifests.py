"""Each object of deploy/kubernetes by itself, and what it refers to. Kubernetes' own schemas judge its form."""

import base64
import copy
import re
from pathlib import Path, PurePosixPath

import jsonschema
import kubernetes_validate
import pytest
import yaml

from tandem_shared import VERSION
from tandem_shared.rpc.api_keys import KeyFile
from tandem_shared.rpc.session_secret import read_secret
from tests.unit.deploy import lws_schema
from tests.unit.deploy.manifests import (
    FOLDER,
    OVERLAYS,
    ROOT,
    Object,
    build,
    named,
    on_linux,
    pods_of,
    secrets,
    settings_of,
)

KUBERNETES = "1.37"
DOWNLOAD = tuple(yaml.safe_load_all((FOLDER / "download-model.yaml").read_text()))
LWS_VARIABLES = {"LWS_GROUP_SIZE", "LWS_WORKER_INDEX", "LWS_LEADER_ADDRESS"}
"""What LeaderWorkerSet puts into every container."""

pytestmark = on_linux
every_overlay = pytest.mark.parametrize("overlay", OVERLAYS)


def check_schema(each: Object) -> None:
    if each["kind"] != "LeaderWorkerSet":
        kubernetes_validate.validate(each, KUBERNETES, strict=True)
        return
    jsonschema.validate(each, lws_schema.SCHEMA)
    for name in ("leaderTemplate", "workerTemplate"):
        template = each["spec"]["leaderWorkerTemplate"][name]
        check_schema({"apiVersion": "v1", "kind": "PodTemplate", "metadata": {"name": "any"}, "template": template})


def test_the_documentation_has_all_overlays() -> None:
    text = (ROOT / "docs" / "deployment.md").read_text()
    assert set(OVERLAYS) == {"base", "cpu", "tensor-parallel", "multi-host", "smg"}
    assert [name for name in OVERLAYS if f"deploy/kubernetes/{name}" not in text] == []


@every_overlay
def test_schemas_hold(overlay: str) -> None:
    for each in build(overlay):
        check_schema(each)


def test_schemas_hold_for_what_is_applied_by_hand() -> None:
    for each in (*DOWNLOAD, *secrets().values()):
        check_schema(each)


@pytest.mark.parametrize(("overlay", "kind"), [("base", "StatefulSet"), ("multi-host", "LeaderWorkerSet")])
def test_schemas_find_a_misspelt_field(overlay: str, kind: str) -> None:
    each = copy.deepcopy(named(build(overlay), kind)["tandem-worker"])
    next(pods_of((each,))).container["livenessProbe"]["periodSecs"] = 1
    with pytest.raises(Exception, match="periodSecs"):
        check_schema(each)


@every_overlay
def test_what_is_referred_to_is_there(overlay: str) -> None:
    objects = build(overlay)
    claims = named(objects, "PersistentVolumeClaim")
    for pods in (*pods_of(objects), *pods_of(DOWNLOAD)):
        volumes = {volume["name"]: volume for volume in pods.spec["volumes"]}
        assert set(volumes) == {mount["name"] for mount in pods.container["volumeMounts"]}
        for volume in volumes.values():
            assert volume.get("persistentVolumeClaim", {}).get("claimName") in {None, *claims}
            assert volume.get("secret", {}).get("secretName") in {None, *secrets()}
        for variable in pods.container["env"]:
            if reference := variable.get("valueFrom", {}).get("secretKeyRef"):
                assert reference["key"] in secrets()[reference["name"]]["data"]
        known = {variable["name"] for variable in pods.container["env"]}
        known |= LWS_VARIABLES if pods.owner["kind"] == "LeaderWorkerSet" else set()
        assert set(re.findall(r"\$\((\w+)\)", " ".join(pods.container["command"]))) <= known


@every_overlay
def test_files_that_settings_name_are_in_secrets(overlay: str) -> None:
    objects, num_files = build(overlay), 0
    for pods in pods_of(objects):
        if pods.name == "smg":
            continue
        mounted = {}
        for mount in pods.container["volumeMounts"]:
            [volume] = [each for each in pods.spec["volumes"] if each["name"] == mount["name"]]
            if "secret" in volume:
                # A mount of a single file would not follow the Secret when it changes.
                assert mount["readOnly"] and "subPath" not in mount
                mounted[mount["mountPath"]] = secrets()[volume["secret"]["secretName"]]["data"]
        for name, value in vars(settings_of(pods, objects)).items():
            if name.endswith("_file") and value:
                path = PurePosixPath(value)
                assert path.name in mounted[str(path.parent)], name
                num_files += 1
    assert num_files >= 2


def test_the_documented_secrets_are_ones_that_the_services_take(tmp_path: Path) -> None:
    for name, key, read in (("tandem-session", "secret", read_secret), ("tandem-api-keys", "keys", KeyFile)):
        file = tmp_path / key
        file.write_bytes(base64.b64decode(secrets()[name]["data"][key]))
        assert read(str(file))


@every_overlay
def test_pods_are_confined(overlay: str) -> None:
    for pods in (*pods_of(build(overlay)), *pods_of(DOWNLOAD)):
        pod, container = pods.spec["securityContext"], pods.container["securityContext"]
        assert pod["runAsNonRoot"] and pod["runAsUser"] == pod["runAsGroup"] == 1000
        assert pod["seccompProfile"] == {"type": "RuntimeDefault"}
        assert container == {
            "allowPrivilegeEscalation": False,
            "readOnlyRootFilesystem": True,
            "capabilities": {"drop": ["ALL"]},
        }
        assert not pods.spec["automountServiceAccountToken"] and not pods.spec["enableServiceLinks"]
        assert not {"hostNetwork", "hostIPC", "hostPID"} & set(pods.spec)
        assert {"cpu", "memory"} <= set(pods.container["resources"]["requests"])
        assert "memory" in pods.container["resources"]["limits"]
        # Nothing else can be written, and the image's home folder neither.
        assert {"name": "HOME", "value": "/tmp"} in pods.container["env"]
        for volume in pods.spec["volumes"]:
            assert "emptyDir" not in volume or "sizeLimit" in volume["emptyDir"]


@every_overlay
def test_selectors_select_what_they_are_for(overlay: str) -> None:
    objects = build(overlay)
    all_pods = list(pods_of(objects))
    for each in objects:
        if each["kind"] in ("StatefulSet", "Deployment"):
            [own] = pods_of((each,))
            assert own.selected_by(each["spec"]["selector"]["matchLabels"])
        elif each["kind"] == "PodDisruptionBudget":
            selected = [pods.name for pods in all_pods if pods.selected_by(each["spec"]["selector"]["matchLabels"])]
            assert selected == [each["metadata"]["name"]]
            # With 0, draining the node of an only pod would wait for ever.
            assert each["spec"]["maxUnavailable"] == 1
    budgets = named(objects, "PodDisruptionBudget")
    assert {"tandem-scheduler", "tandem-worker"} <= set(budgets)


@every_overlay
def test_images_are_targets_of_the_dockerfile(overlay: str) -> None:
    targets = set(re.findall(r"^FROM \S+ AS (\S+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE))
    images = {pods.container["image"] for pods in (*pods_of(build(overlay)), *pods_of(DOWNLOAD))}
    names = {image.removeprefix("tandem-").removesuffix(f":{VERSION}") for image in images}
    assert names <= targets, (images, targets)
