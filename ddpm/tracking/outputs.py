"""Publishes outputs, and compares the report with the champion.

ddpm.tracking.publish cannot import the registry, because the registry imports ddpm.tracking.publish. So this module passes
the registry's comparison to the publisher.
"""

from __future__ import annotations

from functools import partial

from ddpm.tracking.publish import publishing
from ddpm.tracking.registry.compared import with_champion

publish = partial(publishing.publish, champion=with_champion)
publish_or_warn = partial(publishing.publish_or_warn, champion=with_champion)
follow = partial(publishing.follow, champion=with_champion)
