"""What `import tandem` gives."""

import tandem
from tandem_shared import VERSION
from tandem_shared.rpc.rich_status import PUBLIC_STATUS_CODES


def test_every_name_is_there_and_is_the_one_it_says() -> None:
    for name in tandem.__all__:
        value = getattr(tandem, name)
        assert value is not None and getattr(value, "__name__", name) == name
    assert tandem.__version__ == VERSION


def test_every_error_that_a_server_sends_is_exported() -> None:
    assert {error_class.__name__ for error_class in PUBLIC_STATUS_CODES} <= set(tandem.__all__)
