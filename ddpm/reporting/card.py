"""The model card: what a model is for, what it was made from, how good it is and how sure that is, how to load it."""

from __future__ import annotations

import io
from collections.abc import Mapping
from typing import Any

from ruamel.yaml import YAML

from ddpm.files.scores import Scores
from ddpm.reporting.page import render
from ddpm.scores.metrics import METRICS, Metric

# What is known of a source's licence; what image-folder reads is the user's own.
LICENCES = {
    "digits": "Optical Recognition of Handwritten Digits (Alpaydin and Kaynak 1998, UCI Machine Learning Repository), CC BY 4.0",
    "fashion-mnist": "Fashion-MNIST (Xiao et al. 2017), MIT",
    "cifar10": "CIFAR-10 (Krizhevsky 2009), published without a licence: photographs from the web",
    "image-folder": "a folder of images; their licence is not known here",
}
OPEN = ("digits", "fashion-mnist")  # whose licence lets a model be shared under this project's own
LONGEST = 5000  # characters of a description in a registry


def card(
    name: str,
    point: str,
    settings: Mapping[str, Any],
    scores: Scores,
    about: Mapping[str, Any],
    likelihood: Mapping[str, Any] | None = None,
) -> str:
    """The body, in Markdown, at most LONGEST characters.

    name: of the registered model. settings: the sampler row's options, `steps` and `clip`. scores: of metrics/POINT.json.
    about: model.json. likelihood: of metrics/likelihood/SCHEDULE.json.
    """
    training, data = about["training"], about["data"]
    text = render(
        "card.md.jinja",
        name=name,
        point=point,
        settings=dict(settings),
        scores=scores,
        metrics=_shown(scores),
        likelihood={split: likelihood[split] for split in ("train", "test") if split in likelihood}
        if likelihood
        else {},
        about=about,
        training=training,
        data=data,
        licence=LICENCES[data["name"]],
        conditional="classes" in about["network"],
    )
    return text[:LONGEST]


def _shown(scores: Scores) -> list[Metric]:
    """The metrics that say how good it is, as far as it has them."""
    return [metric for metric in METRICS.values() if metric.direction and metric.name in scores.values]


def with_front_matter(body: str, name: str, scores: Scores, about: Mapping[str, Any]) -> str:
    """The card as a file of its own, headed by what model hubs read: licence, tags, datasets, metrics."""
    data = about["data"]
    hub = {metric.hub or metric.name: metric for metric in _shown(scores)}
    entry = {
        "task": {"type": "unconditional-image-generation"},
        "dataset": {"name": data["name"], "type": data["name"], "revision": data["sha256"]},
        "metrics": [
            {"type": kind, "name": metric.title, "value": scores.values[metric.name]} for kind, metric in hub.items()
        ],
    }
    matter = {
        "license": "apache-2.0" if data["name"] in OPEN else "other",
        "tags": ["diffusion", "ddpm", "unconditional-image-generation", "pytorch"],
        "datasets": [data["name"]],
        "metrics": list(hub),
        "model-index": [{"name": name, "results": [entry]}],
    }
    written = io.StringIO()
    yaml = YAML()
    yaml.default_flow_style = False
    yaml.width = 1000
    yaml.dump(matter, written)
    return f"---\n{written.getvalue()}---\n\n{body}"
