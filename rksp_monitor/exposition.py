"""A registry as text, in each format that prometheus_client writes; what has not changed is not encoded again.

Encoding is most of what a scrape of fifty runs costs, and from one scrape to the next few of their values change. The
library's encoders know nothing of that, so they are given the new samples alone, and their lines are put between those
of before.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence

from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector
from prometheus_client.samples import Sample

Encode = Callable[[Collector], bytes]

FORMATS = 4  # content types whose lines are kept; a client may ask for any number


class Exposition:
    """The text of a registry.

    A sample is known by its identity: a collector that returns the same `Sample` again, as `rksp_monitor.metrics.Board`
    does, says that nothing changed. Others are encoded anew each time.
    """

    def __init__(self, registry: Collector) -> None:
        self._registry = registry
        self._known: dict[str, dict[int, tuple[Sample, bytes]]] = {}  # by content type, and by the sample's identity
        self._lock = threading.Lock()

    def text(self, encode: Encode, content_type: str) -> bytes:
        """Return what ``encode``, the library's encoder for this content type, would return of the registry."""
        with self._lock:
            before, now = self._known.pop(content_type, {}), dict[int, tuple[Sample, bytes]]()
            end = encode(_Families([]))
            parts = [part for family in self._registry.collect() for part in _encoded(family, encode, end, before, now)]
            self._known[content_type] = now
            while len(self._known) > FORMATS:
                del self._known[next(iter(self._known))]
            return b"".join([*parts, end])


def _encoded(
    family: Metric,
    encode: Encode,
    end: bytes,
    before: dict[int, tuple[Sample, bytes]],
    now: dict[int, tuple[Sample, bytes]],
) -> Iterable[bytes]:
    """Return the lines of a family, those of ``before`` as they were, and note all of them in ``now``."""
    new = [sample for sample in family.samples if id(sample) not in before]
    text = encode(_Families([_with(family, new)])).removesuffix(end)
    lines = [line + b"\n" for line in text.split(b"\n")[:-1]]
    head = [line for line in lines if line.startswith(b"# ")]
    if lines[: len(head)] != head or len(lines) != len(head) + len(new):
        # A sample that makes another number of lines, or a family of its own, such as the time a counter began.
        return [encode(_Families([family])).removesuffix(end)]
    now |= {id(sample): (sample, line) for sample, line in zip(new, lines[len(head) :], strict=True)}
    now |= {key: before[key] for sample in family.samples if (key := id(sample)) not in now}
    return [*head, *(now[id(sample)][1] for sample in family.samples)]


def _with(family: Metric, samples: list[Sample]) -> Metric:
    """Return the family with other samples."""
    made = Metric(family.name, family.documentation, family.type, family.unit)
    made.samples = samples
    return made


class _Families(Collector):
    """Families that are given to an encoder as if they were a registry."""

    def __init__(self, families: Sequence[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families
