"""What pyproject.toml says the package needs, and folders that hold just that."""

import importlib.metadata
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())


def declared_requirements(extra: str | None = None) -> list[str]:
    """What pip installs beside the package itself, with an extra or without any."""
    project = PYPROJECT["project"]
    texts = set(project["dependencies"])
    for text in project["optional-dependencies"][extra] if extra else []:
        requirement = Requirement(text)
        if requirement.name == project["name"]:
            for other in requirement.extras:
                texts |= set(declared_requirements(other))
        else:
            texts.add(text)
    return sorted(texts)


def link_packages(folder: Path, requirements: Iterable[str]) -> None:
    """Fills a folder with links to the installed packages that the requirements name, and to those they need in turn.

    So an environment has exactly what is declared, without a download.
    """
    for name in {entry for distribution in closure(requirements) for entry in _entries(distribution)}:
        (folder / name.name).symlink_to(name)


def closure(requirements: Iterable[str]) -> list[importlib.metadata.Distribution]:
    """The installed packages that the requirements name, and those they need in turn."""
    found: dict[tuple[str, str], importlib.metadata.Distribution] = {}
    waiting = [(Requirement(text), "") for text in requirements]
    while waiting:
        requirement, wanted_by = waiting.pop()
        if requirement.marker and not requirement.marker.evaluate({"extra": wanted_by}):
            continue
        for extra in ("", *requirement.extras):
            key = (canonicalize_name(requirement.name), extra)
            if key not in found:
                found[key] = importlib.metadata.distribution(requirement.name)
                waiting += [(Requirement(text), extra) for text in found[key].requires or []]
    return list(found.values())


def _entries(distribution: importlib.metadata.Distribution) -> Iterator[Path]:
    """The top-level files and folders of a distribution in site-packages."""
    for name in {file.parts[0] for file in distribution.files or []} - {"..", "__pycache__"}:
        yield Path(str(distribution.locate_file(name))).resolve()
