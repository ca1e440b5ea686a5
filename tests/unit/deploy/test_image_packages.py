"""What the images without torch hold, from the packages that are installed here. `make compose-test` builds them."""

import pytest

from tests.support.requirements import closure, declared_requirements

MAX_MEGABYTES = 200


@pytest.mark.parametrize("extra", ["scheduler", "smg", "gateway"])
def test_images_without_torch_are_small(extra: str) -> None:
    packages = {
        package.name.lower(): package
        for package in closure([*declared_requirements(extra), *declared_requirements("otel")])
    }
    assert "grpcio" in packages and not {"torch", "transformers", "triton"} & set(packages)
    paths = [package.locate_file(file) for package in packages.values() for file in package.files or ()]
    num_bytes = sum(path.stat().st_size for path in paths if path.is_file())
    assert num_bytes < MAX_MEGABYTES * 1e6
