"""Runs docker-compose.yml and kills its worker under a stream: `make compose-test`.

pytest does not collect this, as it needs a container engine (see compose_engine.py), root and some minutes. Every wait
is bounded. The truth for a disturbed stream is the same request undisturbed, both in float64.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import grpc
import openai
import yaml

from tandem.v1 import control_pb2, control_pb2_grpc, inference_pb2, inference_pb2_grpc
from tests.e2e.compose_engine import REPOSITORY, Engine, install_missing_tools
from tests.e2e.grpcurl import grpcurl, json_stream
from tests.e2e.services import free_port, serving_process
from tests.support.metrics import Scrape

HEALTHY_TIMEOUT_S = 120
MAX_RESTARTS = 5
STREAM_TIMEOUT_S = 120
NUM_TOKENS = 400
NUM_TOKENS_BEFORE_KILL = 40
SERVICES = ("worker", "scheduler", "gateway")
QUESTION = {"role": "user", "content": "Who are you?"}
MAX_ADDED_BYTES = 200_000_000
"""What the images without torch may add to their base."""


class Deployment:
    """The containers, and a client of theirs on this machine."""

    def __init__(self, engine: Engine, address: str, http_address: str) -> None:
        self.engine = engine
        self.url = f"http://{http_address}/v1"
        self.address = address
        self.openai = openai.OpenAI(base_url=self.url, api_key="none", max_retries=0, timeout=STREAM_TIMEOUT_S)
        self._channel = grpc.insecure_channel(address)
        self._inference = inference_pb2_grpc.InferenceServiceStub(self._channel)
        self._control = control_pb2_grpc.ControlServiceStub(self._channel)

    def wait_healthy(self) -> None:
        deadline = time.monotonic() + HEALTHY_TIMEOUT_S
        missing = list(SERVICES)
        while missing := [service for service in missing if not self.engine.is_healthy(service)]:
            assert time.monotonic() < deadline, f"not healthy after {HEALTHY_TIMEOUT_S} s: {missing}"
            for service in missing:
                restarts = int(self.engine.inspect(service, "{{.RestartCount}}"))
                assert restarts < MAX_RESTARTS, f"{service} ends again and again"
            time.sleep(0.5)

    def tokens(self, temperature: float, disturb: Callable[[], object] | None = None) -> list[int]:
        """Returns the tokens of a stream, and calls `disturb` once while it runs."""
        request = inference_pb2.GenerateStreamRequest(
            prompt=inference_pb2.Prompt(text="First Citizen:\n"),
            sampling=inference_pb2.SamplingParams(temperature=temperature, seed=11),
            stopping=inference_pb2.StoppingCriteria(max_tokens=NUM_TOKENS, ignore_eos=True),
        )
        token_ids: list[int] = []
        for message in self._inference.GenerateStream(request, timeout=STREAM_TIMEOUT_S):
            token_ids += message.token_ids
            if disturb is not None and len(token_ids) >= NUM_TOKENS_BEFORE_KILL:
                assert self.num_running() == 1, "the stream ended before it could be disturbed"
                disturb()
                disturb = None
        assert disturb is None, "the stream was never disturbed"
        assert len(token_ids) == NUM_TOKENS, f"{len(token_ids)} tokens in place of {NUM_TOKENS}"
        return token_ids

    def chat_text(self, disturb: Callable[[], object] | None = None) -> str:
        """Returns the text of a chat that is streamed over HTTP, and calls `disturb` once while it runs."""
        stream = self.openai.chat.completions.create(
            model="embedded",
            messages=[QUESTION],  # type: ignore[list-item]
            max_tokens=NUM_TOKENS,
            seed=11,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        deltas: list[str] = []
        usage = None
        for chunk in stream:
            deltas += [choice.delta.content for choice in chunk.choices if choice.delta.content]
            usage = chunk.usage or usage
            if disturb is not None and len(deltas) >= NUM_TOKENS_BEFORE_KILL:
                assert self.num_running() == 1, "the chat ended before it could be disturbed"
                disturb()
                disturb = None
        assert disturb is None, "the chat was never disturbed"
        assert usage is not None and usage.completion_tokens == NUM_TOKENS, usage
        return "".join(deltas)

    def num_running(self) -> int:
        return self._load().num_running_sequences

    def num_worker_losses(self) -> int:
        return self._load().num_worker_losses

    def _load(self) -> control_pb2.GetLoadResponse:
        response: control_pb2.GetLoadResponse = self._control.GetLoad(control_pb2.GetLoadRequest(), timeout=10)
        return response

    def kill_and_start_worker(self) -> None:
        name = self.engine.container("worker")
        self.engine.podman("kill", "--signal", "KILL", name)
        self.engine.podman("start", name)

    def crash_worker(self) -> None:
        """Kills the worker's process inside its container, as the kernel does when memory runs out."""
        serving_process(self._pid("worker")).kill()

    def crash_container(self, service: str) -> None:
        """Kills the container's first process, and all others with it."""
        os.kill(self._pid(service), 9)

    def num_restarts(self) -> int:
        """How often the worker's container has been restarted."""
        return int(self.engine.inspect("worker", "{{.RestartCount}}"))

    def _pid(self, service: str) -> int:
        """The first process of the service's container, which is the supervisor in the worker's."""
        return int(self.engine.inspect(service, "{{.State.Pid}}"))


def check_health(deployment: Deployment) -> None:
    for service in SERVICES:
        assert deployment.engine.is_healthy(service), service


def check_curl_chats(deployment: Deployment) -> None:
    body = json.dumps({"messages": [QUESTION], "max_tokens": 24})
    command = ["curl", "--silent", "--fail-with-body", "--max-time", "60", "--header", "content-type: application/json"]
    command += ["--data", body, f"{deployment.url}/chat/completions"]
    answer = json.loads(subprocess.run(command, check=True, capture_output=True, timeout=90).stdout)
    assert answer["model"] == "embedded" and answer["choices"][0]["message"]["content"].strip(), answer


def check_openai_client(deployment: Deployment) -> None:
    [model] = deployment.openai.models.list().data
    answer = deployment.openai.completions.create(model=model.id, prompt="ROMEO:\n", max_tokens=24)
    assert model.id == "embedded" and answer.choices[0].text.strip(), answer


def check_not_root(deployment: Deployment) -> None:
    for service in SERVICES:
        user = deployment.engine.podman("exec", deployment.engine.container(service), "id", "-un")
        assert user == "tandem", user


def check_confined(deployment: Deployment) -> None:
    """No container can write to its image, has a capability or can get one, and its log has an end."""
    engine = deployment.engine
    for service in SERVICES:
        script = "touch /tmp/x && ! touch /home/tandem/x && ! touch /opt/tandem/x && cat /proc/1/status"
        lines = engine.podman("exec", engine.container(service), "sh", "-c", script).splitlines()
        status = dict(line.split(":\t") for line in lines if ":\t" in line)
        assert (int(status["CapEff"], 16), int(status["CapBnd"], 16), status["NoNewPrivs"]) == (0, 0, "1"), status
        assert engine.inspect(service, "{{.HostConfig.ReadonlyRootfs}}") == "true"
        assert "10M" in engine.inspect(service, "{{.HostConfig.LogConfig.Size}}").upper()


def check_packages(deployment: Deployment) -> None:
    """Each image has the packages of its service alone."""
    program = "import importlib.metadata as m; print(*(d.name.lower() for d in m.distributions()))"
    packages = {
        service: set(
            deployment.engine.podman("exec", deployment.engine.container(service), "python", "-c", program).split()
        )
        for service in SERVICES
    }
    assert "torch" in packages["worker"] and all("tandem-llm" in each for each in packages.values()), packages
    assert not {"torch", "transformers"} & (packages["scheduler"] | packages["gateway"]), packages
    assert not [name for name in packages["worker"] if name.startswith(("cuda", "nvidia", "triton"))], packages


def check_image_sizes(deployment: Deployment) -> None:
    engine = deployment.engine
    for service in ("scheduler", "gateway"):
        added = engine.image_size(f"{engine.project}_{service}") - engine.image_size(engine.base_image())
        assert added <= MAX_ADDED_BYTES, f"the image of the {service} adds {added} bytes to its base"


def check_metrics(deployment: Deployment) -> None:
    """Each service gives its metrics where deploy/observability has Prometheus scrape it."""
    jobs = yaml.safe_load((REPOSITORY / "deploy/observability/prometheus.yml").read_text())["scrape_configs"]
    targets = {job["job_name"]: job["static_configs"][0]["targets"] for job in jobs}
    seen = {"scheduler": "tandem:worker_up", "worker": "tandem:worker_session_open", "gateway": "http_scheduler_up"}
    program = (
        "import sys, urllib.request as r; print(r.urlopen(f'http://{sys.argv[1]}/metrics', timeout=20).read().decode())"
    )
    container = deployment.engine.container("gateway")
    for service, metric in seen.items():
        text = deployment.engine.podman("exec", container, "python", "-c", program, *targets[service])
        assert Scrape(text, prefix="")[metric] == 1, text


def check_grpcurl_lists(deployment: Deployment) -> None:
    listed = grpcurl(deployment.address, "list").split()
    assert {"tandem.v1.InferenceService", "tandem.v1.ControlService", "grpc.health.v1.Health"} <= set(listed), listed


def check_grpcurl_streams_text(deployment: Deployment) -> None:
    request = {"prompt": {"text": "First Citizen:\n"}, "stopping": {"max_tokens": 24, "ignore_eos": True}}
    output = grpcurl(deployment.address, "tandem.v1.InferenceService/GenerateStream", data=json.dumps(request))
    text = "".join(message.get("text_delta", "") for message in json_stream(output))
    assert text.strip(), output


def check_killed_worker(deployment: Deployment) -> None:
    for temperature in (0.0, 1.0):
        undisturbed = deployment.tokens(temperature)
        assert len(set(undisturbed)) >= 20, undisturbed
        losses = deployment.num_worker_losses()
        assert deployment.tokens(temperature, deployment.kill_and_start_worker) == undisturbed
        assert deployment.num_worker_losses() == losses + 1


def check_crashed_worker(deployment: Deployment) -> None:
    """The worker's supervisor, the first process of its container, starts it again."""
    undisturbed = deployment.tokens(1.0)
    losses, restarts = deployment.num_worker_losses(), deployment.num_restarts()
    assert deployment.tokens(1.0, deployment.crash_worker) == undisturbed
    assert deployment.num_worker_losses() == losses + 1
    assert deployment.num_restarts() == restarts


def check_crashed_worker_container(deployment: Deployment) -> None:
    """Only the restart policy starts the container again."""
    undisturbed = deployment.tokens(1.0)
    losses = deployment.num_worker_losses()
    assert deployment.tokens(1.0, lambda: deployment.crash_container("worker")) == undisturbed
    assert deployment.num_worker_losses() == losses + 1


def check_killed_worker_under_a_chat(deployment: Deployment) -> None:
    undisturbed = deployment.chat_text()
    losses = deployment.num_worker_losses()
    assert deployment.chat_text(deployment.kill_and_start_worker) == undisturbed
    assert deployment.num_worker_losses() == losses + 1


def check_crashed_gateway_container(deployment: Deployment) -> None:
    """The restart policy starts it again, and streams of gRPC clients do not notice."""
    undisturbed = deployment.tokens(1.0)
    assert deployment.tokens(1.0, lambda: deployment.crash_container("gateway")) == undisturbed
    deployment.wait_healthy()
    check_openai_client(deployment)


CHECKS = (
    check_health,
    check_curl_chats,
    check_openai_client,
    check_not_root,
    check_confined,
    check_packages,
    check_image_sizes,
    check_metrics,
    check_grpcurl_lists,
    check_grpcurl_streams_text,
    check_killed_worker,
    check_crashed_worker,
    check_crashed_worker_container,
    check_killed_worker_under_a_chat,
    check_crashed_gateway_container,
    check_health,
)


def report(name: str, check: Callable[[], object]) -> bool:
    started = time.monotonic()
    try:
        check()
    except Exception:
        traceback.print_exc()
        print(f"FAILED {name}", flush=True)
        return False
    print(f"passed {name} ({time.monotonic() - started:.1f} s)", flush=True)
    return True


def tear_down(engine: Engine) -> None:
    engine.remove(SERVICES)
    assert not engine.leftovers(), engine.leftovers()


def run_checks(engine: Engine, address: str, http_address: str) -> list[bool]:
    def bring_up() -> None:
        engine.compose("build", timeout_s=1200)
        engine.compose("up", "--detach", timeout_s=90)
        deployment.wait_healthy()

    deployment = Deployment(engine, address, http_address)
    passed = [report("bring_up", bring_up)]
    if all(passed):
        passed += [report(check.__name__, lambda check=check: check(deployment)) for check in CHECKS]
    if not all(passed):
        for service in SERVICES:
            print(f"--- {service}", flush=True)
            subprocess.run(["podman", "logs", "--tail", "60", engine.container(service)], timeout=30, check=False)
    return passed


def main() -> int:
    install_missing_tools()
    with tempfile.TemporaryDirectory(prefix="tandem-compose-") as folder:
        port, http_port = free_port(), free_port()
        variables = {
            "PORT": str(port),
            "HTTP_PORT": str(http_port),
            "DTYPE": "float64",
            "MODEL": "embedded",
            "MODEL_DIR": "models",
        }
        bare = Engine("tandem", Path(folder), {})
        engine = Engine(f"tandem-test-{os.getpid()}", Path(folder), {**variables, "BASE_IMAGE": bare.base_image()})
        passed: list[bool] = []
        try:
            passed += run_checks(engine, f"127.0.0.1:{port}", f"127.0.0.1:{http_port}")
        finally:
            passed.append(report("tear_down", lambda: tear_down(engine)))
    print(f"{sum(passed)} passed, {len(passed) - sum(passed)} failed")
    return 0 if all(passed) else 1


if __name__ == "__main__":
    sys.exit(main())
