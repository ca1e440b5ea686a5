"""What a scrape says, read with prometheus_client's own parser."""

import asyncio
import urllib.request
from collections.abc import Iterable

from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families


class Scrape:
    """The samples of one scrape."""

    def __init__(self, text: str, prefix: str = "tandem:") -> None:
        self.families: dict[str, Metric] = {family.name: family for family in text_string_to_metric_families(text)}
        self._prefix = prefix
        self._samples = [sample for family in self.families.values() for sample in family.samples]

    def values(self, name: str, label: str) -> dict[str, float]:
        """The samples of a name, without the prefix, by the value of one label."""
        return {sample.labels[label]: sample.value for sample in self._named(name)}

    def counts(self, name: str, label: str) -> dict[str, float]:
        """The samples of a name that are not 0, by the value of one label."""
        return {value: count for value, count in self.values(name, label).items() if count}

    def __getitem__(self, name: str) -> float:
        """The sum of all samples of that name, without the prefix."""
        return sum(sample.value for sample in self._named(name))

    def __contains__(self, name: str) -> bool:
        return any(True for _ in self._named(name))

    def counted(self) -> dict[tuple[str, frozenset[tuple[str, str]]], float]:
        """All samples that never go back, by name and labels."""
        kinds = {"counter": ("_total",), "histogram": ("_count", "_bucket", "_sum")}
        return {
            (sample.name, frozenset(sample.labels.items())): sample.value
            for family in self.families.values()
            for sample in family.samples
            if sample.name.endswith(kinds.get(family.type, ()))
        }

    def _named(self, name: str) -> Iterable:
        return (sample for sample in self._samples if sample.name == self._prefix + name)


async def scrape(port: int, prefix: str = "tandem:") -> Scrape:
    """Scrapes a port of this machine."""
    url = f"http://127.0.0.1:{port}/metrics"
    response = await asyncio.to_thread(lambda: urllib.request.urlopen(url, timeout=20).read())
    return Scrape(response.decode(), prefix)
