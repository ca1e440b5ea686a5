"""What a user sees who has grpcurl and no stubs: everything is found by reflection. The model is the embedded one."""

import json

import pytest

from tests.e2e.conftest import StartEngine
from tests.e2e.grpcurl import GrpcurlError, buf_curl, grpcurl, json_stream
from tests.e2e.services import INFERENCE, WORKER, Engine

STANDARD_SERVICES = {
    "grpc.health.v1.Health",
    "grpc.channelz.v1.Channelz",
    "grpc.reflection.v1.ServerReflection",
    "grpc.reflection.v1alpha.ServerReflection",
}


@pytest.fixture(scope="module")
def engine(start_engine: StartEngine) -> Engine:
    return start_engine("embedded", dtype="float32")


def test_list_names_every_service(engine: Engine) -> None:
    own = {INFERENCE, "tandem.v1.ControlService"}
    assert set(grpcurl(engine.scheduler.address, "list").split()) == own | STANDARD_SERVICES
    assert set(grpcurl(engine.worker.address, "list").split()) == {WORKER} | STANDARD_SERVICES


@pytest.mark.parametrize("version", ["v1", "v1alpha"])
def test_buf_finds_everything_by_either_version_of_reflection(engine: Engine, version: str) -> None:
    for service in engine.scheduler, engine.worker:
        services = buf_curl(service.address, "--list-services", version=version).split()
        assert set(services) >= STANDARD_SERVICES
        assert f"grpc.reflection.{version}.ServerReflection/ServerReflectionInfo" in buf_curl(
            service.address, "--list-methods", version=version
        )
    info = json.loads(buf_curl(engine.scheduler.address, path=f"{INFERENCE}/GetModelInfo", version=version))
    assert info["model"] == "embedded"


def test_describe_shows_methods_and_fields(engine: Engine) -> None:
    service = grpcurl(engine.scheduler.address, "describe", INFERENCE)
    assert "rpc GenerateStream ( .tandem.v1.GenerateStreamRequest )" in service
    assert "optional float temperature = 1;" in grpcurl(
        engine.scheduler.address, "describe", "tandem.v1.SamplingParams"
    )
    assert "rpc ExecuteSteps ( stream" in grpcurl(engine.worker.address, "describe", WORKER)
    assert "uint64 step_id = 1;" in grpcurl(engine.worker.address, "describe", "tandem.internal.v1.StepPlan")


@pytest.mark.parametrize("service", ["", INFERENCE, "tandem.v1.ControlService"])
def test_the_scheduler_is_healthy(engine: Engine, service: str) -> None:
    data = json.dumps({"service": service})
    assert json_stream(grpcurl(engine.scheduler.address, "grpc.health.v1.Health/Check", data=data)) == [
        {"status": "SERVING"}
    ]


@pytest.mark.parametrize("service", ["", WORKER])
def test_the_worker_is_healthy(engine: Engine, service: str) -> None:
    data = json.dumps({"service": service})
    assert json_stream(grpcurl(engine.worker.address, "grpc.health.v1.Health/Check", data=data)) == [
        {"status": "SERVING"}
    ]


def test_health_of_an_unknown_service_is_not_found(engine: Engine) -> None:
    with pytest.raises(GrpcurlError, match="NotFound"):
        grpcurl(engine.scheduler.address, "grpc.health.v1.Health/Check", data='{"service": "tandem.v1.Nothing"}')


def test_worker_info_answers(engine: Engine) -> None:
    [info] = json_stream(grpcurl(engine.worker.address, f"{WORKER}/GetWorkerInfo"))
    assert info["dtype"] == "float32"
    assert info["device"] == "cpu"
    assert info["fingerprint"]


def test_any_client_learns_the_model(engine: Engine) -> None:
    [info] = json_stream(grpcurl(engine.scheduler.address, f"{INFERENCE}/GetModelInfo"))
    assert info["model"] == "embedded" and info["dtype"] == "float32"
    assert info["vocab_size"] > 0 and info["max_model_len"] > 0


def test_a_generation_streams_text(engine: Engine) -> None:
    request = {
        "prompt": {"text": "First Citizen:\n"},
        "sampling": {"temperature": 0},
        "stopping": {"max_tokens": 24, "ignore_eos": True},
    }
    output = grpcurl(engine.scheduler.address, f"{INFERENCE}/GenerateStream", data=json.dumps(request))
    messages = json_stream(output)
    assert len(messages) > 1
    assert sum(len(message.get("token_ids", [])) for message in messages) == 24
    assert "".join(message.get("text_delta", "") for message in messages).strip()
    assert messages[-1]["finish"] == {"reason": "FINISH_REASON_LENGTH"}
    assert messages[-1]["usage"]["num_output_tokens"] == 24
    [whole] = json_stream(grpcurl(engine.scheduler.address, f"{INFERENCE}/Generate", data=json.dumps(request)))
    assert whole["choices"][0]["text"] == "".join(message.get("text_delta", "") for message in messages)


def test_a_chat_is_answered_and_its_turn_ends(engine: Engine) -> None:
    messages = [{"role": "system", "content": "You are ROMEO."}, {"role": "user", "content": "Who are you?"}]
    request = {
        "prompt": {"chat": {"messages": messages}},
        "sampling": {"temperature": 0},
        "stopping": {"max_tokens": 200},
    }
    [reply] = json_stream(grpcurl(engine.scheduler.address, f"{INFERENCE}/Generate", data=json.dumps(request)))
    [choice] = reply["choices"]
    assert choice["finish"]["reason"] == "FINISH_REASON_STOP"
    said = "<|im_start|>system\nYou are ROMEO.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n"
    rendered = f"{said}<|im_start|>assistant\n"
    same = {**request, "prompt": {"text": rendered}}
    [expected] = json_stream(grpcurl(engine.scheduler.address, f"{INFERENCE}/Generate", data=json.dumps(same)))
    assert choice["text"].strip() and choice == expected["choices"][0]


def test_a_bad_request_is_refused_with_its_fields(engine: Engine) -> None:
    request = {"prompt": {"text": "To be"}, "sampling": {"top_p": 1.5}, "stopping": {"max_tokens": 0}}
    with pytest.raises(GrpcurlError) as caught:
        grpcurl(engine.scheduler.address, f"{INFERENCE}/GenerateStream", data=json.dumps(request))
    assert "Code: InvalidArgument" in caught.value.output
    assert "google.rpc.BadRequest" in caught.value.output
    assert '"reason":"INVALID_REQUEST"' in caught.value.output.replace('": "', '":"')
    assert '"domain":"tandem.v1"' in caught.value.output.replace('": "', '":"')
    for field in ("sampling.top_p", "stopping.max_tokens"):
        assert field in caught.value.output


def test_load_is_there_for_an_operator(engine: Engine) -> None:
    [load] = json_stream(grpcurl(engine.scheduler.address, "tandem.v1.ControlService/GetLoad"))
    assert load["num_total_blocks"] > 0
    assert load["num_free_blocks"] + load.get("num_cached_blocks", 0) == load["num_total_blocks"]
