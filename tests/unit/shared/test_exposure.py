"""Which services start on an address that others reach."""

import pytest

from tandem import cli
from tandem_gateway.__main__ import main as gateway_main
from tandem_scheduler.__main__ import main as scheduler_main
from tandem_shared.config import SchedulerSettings, WorkerSettings
from tandem_shared.errors import ConfigError
from tandem_shared.gateway_settings import GatewaySettings
from tandem_shared.settings_checks import check_exposure
from tandem_worker.__main__ import main as worker_main


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gpu-host"])
def test_a_worker_within_reach_of_others_wants_a_secret_or_certificates(host: str) -> None:
    with pytest.raises(ConfigError, match=f"--host {host} lets whoever reaches it open a session"):
        check_exposure(WorkerSettings(host=host))
    check_exposure(WorkerSettings(host=host, session_secret_file="secret"))
    check_exposure(WorkerSettings(host=host, tls_client_ca="ca.pem"))


@pytest.mark.parametrize("settings", [SchedulerSettings, GatewaySettings])
@pytest.mark.parametrize("host", ["0.0.0.0", "::", "10.0.0.7", "gpu-host"])
def test_a_server_within_reach_of_others_wants_keys_or_tls_or_to_be_told(
    host: str, settings: type[SchedulerSettings | GatewaySettings]
) -> None:
    with pytest.raises(ConfigError, match=f"--host {host} lets whoever reaches it use the service: .*--insecure"):
        check_exposure(settings(host=host))
    for taken in ({"api_key_file": "keys"}, {"tls_cert": "cert.pem"}, {"insecure": True}):
        check_exposure(settings(host=host, **taken))


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "::1", "localhost"])
def test_on_loopback_none_is_needed(host: str) -> None:
    for settings in (WorkerSettings, SchedulerSettings, GatewaySettings):
        check_exposure(settings(host=host))


@pytest.mark.parametrize(
    ("program", "main", "advice"),
    [
        ("tandem-scheduler", scheduler_main, "--api-key-file"),
        ("tandem-gateway", gateway_main, "--api-key-file"),
        ("tandem-worker", worker_main, "--session-secret-file"),
    ],
)
def test_the_programs_say_what_to_do_and_end(
    program: str,
    main: object,
    advice: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("sys.argv", [program, "--host", "0.0.0.0"])
    with pytest.raises(SystemExit) as end:
        main()  # type: ignore[operator]
    assert end.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith(f"{program}: --host 0.0.0.0 lets whoever reaches it ") and advice in line


def test_tandem_serve_starts_nothing_then(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "embedded", "--host", "0.0.0.0"]) != 0
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("tandem serve: --host 0.0.0.0 lets whoever reaches it ") and "--insecure" in line
