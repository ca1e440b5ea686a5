"""Whether `tandem serve` has HTTP, and on which port."""

import argparse
import socket

import pytest

from tandem.commands import serve_http
from tandem.commands.serve_http import read_http_flags
from tandem_shared.config import SchedulerSettings
from tandem_shared.errors import ConfigError
from tandem_shared.gateway_settings import DEFAULT_HTTP_PORT
from tandem_shared.options import Given

PLAIN = SchedulerSettings()
TLS = SchedulerSettings(tls_cert="cert.pem", tls_key="key.pem")


def options(**given: str) -> argparse.Namespace:
    return argparse.Namespace(**{"http_port": None, "host": None, "tls_cert": None, **given})


def test_the_port_is_the_default_the_flag_or_the_variable() -> None:
    settings = read_http_flags(options(host="127.0.0.2"), {}, PLAIN)
    assert settings is not None and (settings.http_port, settings.host) == (DEFAULT_HTTP_PORT, "127.0.0.2")
    settings = read_http_flags(options(http_port="8123"), {"TANDEM_HTTP_PORT": "8124", "TANDEM_PORT_FILE": "x"}, PLAIN)
    assert settings is not None and (settings.http_port, settings.port_file) == (8123, "")
    assert read_http_flags(options(), {"TANDEM_HTTP_PORT": "0"}, PLAIN) is None


def test_a_default_that_is_taken_gives_way_and_a_wish_does_not(capsys: pytest.CaptureFixture[str]) -> None:
    # An address of this machine that no other test uses.
    with socket.create_server(("127.0.0.3", DEFAULT_HTTP_PORT)):
        settings = read_http_flags(options(host="127.0.0.3"), {}, PLAIN)
        assert settings is not None and settings.http_port == 0
        assert "port 8000 is taken" in capsys.readouterr().err
        # Whether a flag, a variable or a file wishes for it.
        for given, environment, file in (
            ({"http_port": "8000"}, {}, {}),
            ({}, {"TANDEM_HTTP_PORT": "8000"}, {}),
            ({}, {}, {"http_port": Given("8000", "a file")}),
        ):
            with pytest.raises(ConfigError, match=r"127\.0\.0\.3:8000"):
                read_http_flags(options(host="127.0.0.3", **given), environment, PLAIN, file)


def test_where_http_can_not_be_it_is_left_out_unless_it_was_wished_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert read_http_flags(options(), {}, TLS) is None
    assert "no HTTP: with --tls-cert" in capsys.readouterr().err
    with pytest.raises(ConfigError, match="tandem-gateway"):
        read_http_flags(options(http_port="8000"), {}, TLS)

    def missing(extra: str) -> None:
        raise ConfigError(f"install tandem-llm[{extra}]")

    monkeypatch.setattr(serve_http, "require_extra", missing)
    assert read_http_flags(options(), {}, PLAIN) is None
    with pytest.raises(ConfigError, match=r"tandem-llm\[gateway\]"):
        read_http_flags(options(), {"TANDEM_HTTP_PORT": "8000"}, PLAIN)
