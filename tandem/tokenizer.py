"""A tokenizer that asks the server, so it needs no file of the model and no library."""

from collections.abc import Mapping, Sequence
from typing import Any

from tandem.calls import ArrayOfIds
from tandem.chat import Chat
from tandem.client import TandemClient


class Tokenizer:
    """The served model's tokenizer, with the names that transformers has for the same.

    It has what is here and no more. Where more is needed, transformers' AutoTokenizer reads the model's folder. Each
    method is a call to the server, and raises what TandemClient's calls raise.
    """

    def __init__(self, client: TandemClient) -> None:
        self._client = client

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """The token ids of a text."""
        return self._client.tokenize(text, add_special_tokens=add_special_tokens)

    def decode(self, token_ids: Sequence[int] | ArrayOfIds, *, skip_special_tokens: bool = False) -> str:
        """The text of token ids."""
        return self._client.detokenize(token_ids, skip_special_tokens=skip_special_tokens)

    def apply_chat_template(
        self,
        conversation: Sequence[Mapping[str, Any]],
        tools: Sequence[Mapping[str, Any]] | None = None,
        *,
        add_generation_prompt: bool = False,
        continue_final_message: bool = False,
        tokenize: bool = True,
        enable_thinking: bool | None = None,
        **chat_template_kwargs: Any,
    ) -> list[int] | str:
        """The token ids of a conversation, or its text if tokenize is False."""
        chat = Chat(
            conversation,
            tools,
            add_generation_prompt,
            enable_thinking,
            chat_template_kwargs or None,
            continue_final_message,
        )
        ids = self._client.tokenize(chat)
        return ids if tokenize else self.decode(ids)

    @property
    def vocab_size(self) -> int:
        """Token ids are below this number."""
        return self._client.model_info().vocab_size

    @property
    def eos_token_id(self) -> int | None:
        """The first of the tokens that end an output, None if there is none."""
        return next(iter(self.eos_token_ids), None)

    @property
    def eos_token_ids(self) -> list[int]:
        """The tokens that end an output."""
        return list(self._client.model_info().eos_token_ids)
