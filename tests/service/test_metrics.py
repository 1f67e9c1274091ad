from __future__ import annotations

import re

from prometheus_client.parser import text_string_to_metric_families

from service.metrics import Metrics, merged


def samples(text: bytes) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text.decode())
        for sample in family.samples
    }


def test_one_process_merges_to_itself() -> None:
    metrics = Metrics()
    metrics.requests.labels("/predict", "200").inc(3)
    metrics.request_seconds.labels("/predict").observe(0.02)
    metrics.model_info.labels("digits", "1", "cpu", "10").set(1)
    text = metrics.render()
    assert merged([text]) == text


def test_several_processes_merge() -> None:
    first, second = Metrics(), Metrics()
    for metrics, count in ((first, 3), (second, 4)):
        metrics.requests.labels("/predict", "200").inc(count)
        metrics.queue_limit.set(256)
        metrics.ready.set(count == 3)
        metrics.model_info.labels("digits", "1", "cpu", "10").set(1)
        for _ in range(count):
            metrics.batch_size.observe(count)
    second.requests.labels("/predict", "503").inc()
    text = merged([first.render(), second.render()])
    found = samples(text)
    assert found["camcal_requests_total", (("code", "200"), ("route", "/predict"))] == 7
    assert found["camcal_requests_total", (("code", "503"), ("route", "/predict"))] == 1
    assert found["camcal_queue_limit", ()] == 512
    assert found["camcal_ready", ()] == 0
    model = (("classes", "10"), ("name", "digits"), ("provider", "cpu"), ("version", "1"))
    assert found["camcal_model_info", model] == 1
    assert [found["camcal_batch_size_bucket", (("le", le),)] for le in ("2.0", "4.0", "+Inf")] == [0, 7, 7]
    assert found["camcal_batch_size_sum", ()] == 3 * 3 + 4 * 4
    started = "process_start_time_seconds", ()
    assert found[started] == samples(first.render())[started]
    # Each family once, in one piece, as Prometheus demands.
    names = re.findall(r"^# TYPE (\S+)", text.decode(), re.M)
    assert len(names) == len(set(names))
    assert set(samples(first.render())) <= set(found)
