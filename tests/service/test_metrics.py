from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

from camcal.service.metrics import Metrics, joined


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_joined_metrics_have_a_worker_label() -> None:
    first, second = Metrics(), Metrics()
    for metrics, count in ((first, 3), (second, 4)):
        metrics.requests.labels("/predict", "200").inc(count)
        metrics.ready.set(count == 3)
        for _ in range(count):
            metrics.batch_size.observe(count)
    second.requests.labels("/predict", "503").inc()
    texts = {0: first.render(), 2: second.render()}
    text = joined(texts)
    assert samples(text) == {
        (name, tuple(sorted((*labels, ("worker", str(worker)))))): value
        for worker, alone in texts.items()
        for (name, labels), value in samples(alone).items()
    }
    assert 'camcal_requests_total{code="200",route="/predict",worker="2"} 4.0' in text.decode()
    # Prometheus requires each metric family to appear only once.
    names = re.findall(r"^# TYPE (\S+)", text.decode(), re.M)
    assert len(names) == len(set(names))
