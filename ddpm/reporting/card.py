"""The model card: what a model is for, what it was made from, how good it is and how sure that is, how to load it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML

from ddpm.files.models import BoundRecord, ModelRecord
from ddpm.reporting.page import render
from ddpm.scores.metrics import METRICS
from ddpm.sources.source import SOURCES, Source

NAMES = {"inception_score": "is"}  # what model hubs call a metric, where that differs
LONGEST = 5000  # characters of a description in a registry


def card(
    name: str,
    point: str,
    settings: Mapping[str, Any],
    metrics: Mapping[str, Any],
    model: ModelRecord,
    likelihood: BoundRecord | None = None,
) -> str:
    """The body, in Markdown, at most LONGEST characters.

    name: of the registered model. settings: the sampler row's options, `steps` and `clip`. metrics: of metrics/POINT.json.
    model: the record of the model. likelihood: the record of its bound.
    """
    source = _source(model.data.name)
    text = render(
        "card.md.jinja",
        name=name,
        point=point,
        settings=dict(settings),
        metrics=metrics,
        scores=[(key, METRICS[key]) for key in METRICS if metrics.get(key) is not None],
        likelihood=likelihood.splits if likelihood else {},
        model=model,
        training=model.training,
        data=model.data,
        licence=source.licence if source else "its licence is not known here",
        shareable=source is not None and source.shareable,
        conditional=model.network.classes > 0,
    )
    return text[:LONGEST]


def _source(name: str) -> Source | None:
    """Returns the row of the source that a model names; None if its module is gone. Older models name it with dashes."""
    return SOURCES.get(name.replace("-", "_"))


def with_front_matter(body: str, name: str, metrics: Mapping[str, Any], model: ModelRecord) -> str:
    """The card as a file of its own, headed by what model hubs read: licence, tags, datasets, metrics."""
    data, source = model.data.name, _source(model.data.name)
    hub = {key: NAMES.get(key, key) for key in METRICS if metrics.get(key) is not None}
    entry = {
        "task": {"type": "unconditional-image-generation"},
        "dataset": {"name": data, "type": data, "revision": model.data.sha256},
        "metrics": [{"type": kind, "name": METRICS[key].title, "value": metrics[key]} for key, kind in hub.items()],
    }
    matter = {
        "license": "apache-2.0" if source and source.shareable else "other",
        "tags": ["diffusion", "ddpm", "unconditional-image-generation", "pytorch"],
        "datasets": [data],
        "metrics": list(hub.values()),
        "model-index": [{"name": name, "results": [entry]}],
    }
    written = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 1000
    yaml.dump(matter, written)
    return f"---\n{written.getvalue()}---\n\n{body}"
