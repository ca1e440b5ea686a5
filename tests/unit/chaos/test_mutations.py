"""The mutations that the chaos harness tries fit the code as it is."""

from pathlib import Path

import pytest

from tests.chaos.harness.parts import PARTS
from tests.chaos.mutations.mutation_list import MUTATIONS, Mutation
from tests.chaos.mutations.part import find, mutate

REPOSITORY = Path(__file__).resolve().parents[3]


@pytest.mark.parametrize("mutation", MUTATIONS, ids=lambda mutation: mutation.file)
def test_each_mutation_fits(mutation: Mutation) -> None:
    assert find(REPOSITORY, mutation.file).read_text().count(mutation.old) == 1
    assert mutation.new != mutation.old
    assert mutation.part in {part.name for part in PARTS}


def test_a_mutation_that_no_longer_fits_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text("x = 1\nx = 1\n")
    with pytest.raises(ValueError, match="2 times"):
        mutate(tmp_path, Mutation("a.py", "x = 1", "x = 2", "kills"))
