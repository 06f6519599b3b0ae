"""Writes the model card: intended use, scores with intervals, how to load the model, data, recipe, licence and limits."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML

from ddpm.files.models import BoundRecord, ModelRecord
from ddpm.files.scores import Scores
from ddpm.reporting.templates import render
from ddpm.scores.metrics import METRICS, Metric
from ddpm.sources.source import SOURCES, Source

LONGEST = 5000  # the largest number of characters of a description in MLflow's registry


def card(
    name: str,
    point: str,
    settings: Mapping[str, Any],
    scores: Scores,
    model: ModelRecord,
    likelihood: BoundRecord | None = None,
) -> str:
    """Returns the model card as Markdown, cut to LONGEST characters.

    Args:
        name: the name of the registered model.
        point: the name of the point, such as linear-ddim-50.
        settings: the options of the point's sampler, plus `steps` and `clip`.
        scores: the scores of the point.
        model: the content of model.json.
        likelihood: the likelihood bound of the model, if it was measured.
    """
    source = _source(model.data.name)
    text = render(
        "card.md.jinja",
        name=name,
        point=point,
        settings=dict(settings),
        scores=scores,
        metrics=_shown(scores),
        likelihood=likelihood.splits if likelihood else {},
        model=model,
        training=model.training.content,
        data=model.data,
        licence=source.licence if source else "the licence is unknown",
        shareable=source is not None and source.shareable,
        conditional=model.network.classes > 0,
    )
    return text[:LONGEST]


def _source(name: str) -> Source | None:
    """Returns the data source of this name, or None if there is none. In records of older models, the name has dashes."""
    return SOURCES.get(name.replace("-", "_"))


def _shown(scores: Scores) -> list[Metric]:
    """Returns the metrics of these scores, except metrics of which neither high nor low values are better."""
    return [metric for metric in METRICS.values() if metric.direction and metric.name in scores.values]


def with_front_matter(body: str, name: str, scores: Scores, model: ModelRecord) -> str:
    """Returns the model card with front matter, the YAML header that model hubs read: licence, tags, datasets, metrics.

    Args:
        body: the card as Markdown.
        name: the name of the registered model.
        scores: the scores of the point.
        model: the content of model.json.
    """
    data, source = model.data.name, _source(model.data.name)
    hub = {metric.hub or metric.name: metric for metric in _shown(scores)}
    entry = {
        "task": {"type": "unconditional-image-generation"},
        "dataset": {"name": data, "type": data, "revision": model.data.sha256},
        "metrics": [
            {"type": kind, "name": metric.title, "value": scores.values[metric.name]} for kind, metric in hub.items()
        ],
    }
    matter = {
        "license": "apache-2.0" if source and source.shareable else "other",
        "tags": ["diffusion", "ddpm", "unconditional-image-generation", "pytorch"],
        "datasets": [data],
        "metrics": list(hub),
        "model-index": [{"name": name, "results": [entry]}],
    }
    written = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 1000
    yaml.dump(matter, written)
    return f"---\n{written.getvalue()}---\n\n{body}"
