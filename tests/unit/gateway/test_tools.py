"""Forms of outputs that come after a thought: they accept what the form alone accepts."""

import itertools
import re

import pytest

from tandem.structured_output import StructuredOutput
from tandem_gateway.tools import after_thinking
from tandem_shared.structured_output import GrammarCompiler, lark_grammar
from tests.support.tokenizers import EMBEDDED, embedded

TOKENIZER = embedded()
COMPILER = GrammarCompiler(EMBEDDED.read_bytes(), 1024, (1017, 1015))


def accepts(form: StructuredOutput, text: str) -> bool:
    """Whether the text, after a thought, may be the whole output."""
    assert form.grammar is not None
    matcher = COMPILER.matcher(lark_grammar(form.grammar))
    ids = TOKENIZER.encode(f"<think>Hm.</think>\n\n{text}", add_special_tokens=False).ids
    return matcher.try_consume_tokens(ids) == len(ids) and matcher.is_accepting()


@pytest.mark.parametrize("regex", ["a/b", r"a\/b", r"\\/", r"[/]a|\\[a]", "/{2}", "/b|a\nb", 'a"', "a#|(b//)?a"])
def test_a_regex(regex: str) -> None:
    form = after_thinking(StructuredOutput(regex=regex), thinking="may")
    texts = ["".join(text) for n in range(4) for text in itertools.product('ab/\n"\\#', repeat=n)]
    found = [text for text in texts if accepts(form, text)]
    assert found == [text for text in texts if re.fullmatch(regex, text)]
    assert found


def test_a_choice() -> None:
    texts = ["yes", 'a "b" \\ c', "line\nbreak", "%json 5", "// no", "ü 😀"]
    form = after_thinking(StructuredOutput(choice=texts), thinking="may")
    for text in [*texts, "", "no"]:
        assert accepts(form, text) == (text in texts), text
