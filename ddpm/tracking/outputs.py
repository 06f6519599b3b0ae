"""Publishes outputs, with the comparison of the report and the champion.

This module joins them, since ddpm.tracking.publish cannot import the registry: the registry imports it to publish runs.
"""

from __future__ import annotations

from functools import partial

from ddpm.tracking.publish import publishing
from ddpm.tracking.registry.compared import with_champion

publish = partial(publishing.publish, champion=with_champion)
publish_or_warn = partial(publishing.publish_or_warn, champion=with_champion)
follow = partial(publishing.follow, champion=with_champion)
