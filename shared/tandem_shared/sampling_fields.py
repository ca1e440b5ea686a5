"""The one table of sampling fields: RowSampling declares each field's name, type, range, default, and where it lives.

A new number needs a line here, an `optional` field in SamplingParams of inference.proto, a plain field in RowSampling
of worker.proto, and an attribute of the client's SamplingParams. The rest follows from the table: the codecs, the
checks of both services, the flags of `tandem generate`, the model's defaults and the rows' values on the device. Then
the number is given a meaning, in a sampler, which takes the values from RowOptions.on_device by name.
tests/unit/shared/test_sampling_fields.py compares protos and client with the table, and adds a field in this way.

The client imports this file, so it knows neither numpy nor torch, and no protobuf.
"""

import dataclasses
import math
import struct
from typing import Any

MAX_LOGPROBS = 20
"""The most likeliest tokens whose log-probabilities a request may ask for."""

ABOVE_ZERO = math.ulp(0.0)
FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127
UINT32_MAX, UINT64_MAX = 2**32 - 1, 2**64 - 1


@dataclasses.dataclass(frozen=True, slots=True)
class SamplingField:
    """An entry of the table. A value is right if least <= value <= most; None is right where it is the default."""

    name: str
    kind: type[float] | type[int]
    """float is the wire's float32; int is its uint32, or its uint64 if `most` needs it."""
    default: float | None
    least: float
    most: float
    part: str = "sampling"
    """The part of a request that has the field; empty if it is not a request's to set."""
    has_model_default: bool = False
    """Whether generation_config.json may give a default, which goes before this table's."""
    device_type: str | None = None
    """numpy's and torch's name for the type of the rows' values on the device; None if they stay on the host. What is
    too large for int32 becomes its largest; int64 has the bits of the uint64.
    """

    @property
    def path(self) -> str:
        """The field's name in errors."""
        return f"{self.part}.{self.name}" if self.part else self.name

    @property
    def range_text(self) -> str:
        """The range for people, after "must be"."""
        if self.kind is int:
            bits = {UINT32_MAX: 32, UINT64_MAX: 64}.get(int(self.most))
            return f"0 to 2^{bits} - 1" if bits else f"at most {self.most}"
        is_open = self.least == ABOVE_ZERO
        if self.most == FLOAT32_MAX:
            return f"{'above 0' if is_open else f'{self.least:g} or more'} and finite"
        return f"in {'(0' if is_open else f'[{self.least:g}'}, {self.most:g}]"

    def problem(self, value: float) -> str:
        """What to tell the user of a value that is out of range."""
        return f"must be {self.range_text}" + (f", is {value}" if self.kind is float else "")

    def allows(self, value: float) -> bool:
        """Whether the value is in the range, and stays there when the wire makes it a float32."""
        if not self.least <= value <= self.most:
            return False
        return self.kind is int or self.least <= struct.unpack("f", struct.pack("f", value))[0] <= self.most


def _declare(default: float | None, least: float, most: float, **places: Any) -> Any:
    """places: the later fields of SamplingField."""
    return dataclasses.field(default=default, metadata={"default": default, "least": least, "most": most, **places})


@dataclasses.dataclass(frozen=True, slots=True)
class RowSampling:
    """How a row samples. temperature 0 is greedy, top_k 0 does not limit, num_logprobs None reports no
    log-probabilities of the output, and num_prompt_logprobs None none of the prompt. choice_index says which of a
    request's outputs the row is, so that those with one seed differ.
    """

    temperature: float = _declare(1.0, 0, FLOAT32_MAX, device_type="float32", has_model_default=True)
    top_k: int = _declare(0, 0, UINT32_MAX, device_type="int32", has_model_default=True)
    top_p: float = _declare(1.0, ABOVE_ZERO, 1, device_type="float32", has_model_default=True)
    min_p: float = _declare(0.0, 0, 1, device_type="float32", has_model_default=True)
    presence_penalty: float = _declare(0.0, -2, 2, device_type="float32")
    frequency_penalty: float = _declare(0.0, -2, 2, device_type="float32")
    repetition_penalty: float = _declare(1.0, ABOVE_ZERO, FLOAT32_MAX, device_type="float32", has_model_default=True)
    seed: int = _declare(0, 0, UINT64_MAX, device_type="int64")
    choice_index: int = _declare(0, 0, UINT32_MAX, part="", device_type="int64")
    min_tokens: int = _declare(0, 0, UINT32_MAX, part="stopping", device_type="int32")
    num_logprobs: int | None = _declare(None, 0, MAX_LOGPROBS, part="output")
    num_prompt_logprobs: int | None = _declare(None, 0, MAX_LOGPROBS, part="output")


FIELDS = tuple(
    SamplingField(name=field.name, kind=float if field.type is float else int, **field.metadata)
    for field in dataclasses.fields(RowSampling)
)
REQUEST_FIELDS = tuple(field for field in FIELDS if field.part == "sampling")
"""The fields of a request's SamplingParams."""
MODEL_DEFAULT_FIELDS = tuple(field for field in FIELDS if field.has_model_default)


def fields_out_of_range(sampling: RowSampling) -> list[SamplingField]:
    """The fields whose values are wrong, in the table's order. NaN is always wrong."""
    return [
        field
        for field in FIELDS
        if (value := getattr(sampling, field.name)) is not None and not field.least <= value <= field.most
    ]
