"""Which model is champion: the decision alone, from numbers; tracking/registry.py asks it and keeps the books."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ddpm.stages.errors import InputError


@dataclass(frozen=True)
class Protocol:
    """What two scores must share to be compared: the dataset's version, and how FID was computed."""

    dataset: str  # sha256
    layer: int
    images: int
    reference_images: int
    extractor_sha256: str

    @classmethod
    def of(cls, metrics: Mapping[str, Any]) -> Protocol:
        """From what metrics/POINT.json holds. Raises InputError."""
        try:
            return cls(
                metrics["reference"],
                metrics["layer"],
                metrics["images"],
                metrics["reference_images"],
                metrics["extractor_sha256"],
            )
        except KeyError as error:
            raise InputError(f"scores without {error}: evaluate the point again (dvc repro)") from None

    @property
    def id(self) -> str:
        """Names it in tags: 12 hexadecimal digits."""
        return hashlib.sha256(json.dumps(asdict(self), sort_keys=True).encode()).hexdigest()[:12]

    def differences(self, other: Protocol) -> str:
        """In words: what changed from `other` to this, such as "layer 64 -> 2048"."""
        mine, theirs = asdict(self), asdict(other)
        hashes = {"dataset": "dataset version", "extractor_sha256": "feature extractor"}
        changed = [name for name in mine if mine[name] != theirs[name]]
        return ", ".join(
            hashes[name] if name in hashes else f"{name} {theirs[name]} -> {mine[name]}".replace("_", " ")
            for name in changed
        )


@dataclass(frozen=True)
class Score:
    """A point's FID under a protocol."""

    fid: float
    evaluations: int
    protocol: Protocol

    @classmethod
    def of(cls, metrics: Mapping[str, Any]) -> Score:
        """From what metrics/POINT.json holds. Raises InputError."""
        fid = metrics.get("fid")
        if not isinstance(fid, (int, float)) or not math.isfinite(fid):
            raise InputError(f"a FID of {fid} cannot be compared: evaluate the point again (dvc repro)")
        return cls(float(fid), int(metrics["evaluations"]), Protocol.of(metrics))

    def beats(self, other: Score) -> bool:
        """Strictly better under the same protocol: a tie keeps the champion."""
        return self.protocol == other.protocol and self.fid < other.fid


@dataclass(frozen=True)
class Decision:
    """What `promote` did. version: the champion's now, or None without one; reason: one plain line."""

    promoted: bool
    version: str | None
    reason: str
    point: str
    previous: str | None = None


def decide(challenger: Score, champion: Score, replace: bool = False) -> tuple[bool, str]:
    """-> whether the challenger takes the champion's place, and why, as the end of a sentence.

    replace: it does, whatever the scores say. Raises ValueError for scores under different protocols otherwise.
    """
    if replace:
        return True, "--replace was given"
    if challenger.protocol != champion.protocol:
        raise ValueError("scores under different protocols cannot be compared")
    if challenger.beats(champion):
        return True, f"FID {challenger.fid:.4g} is better than {champion.fid:.4g}"
    if challenger.fid == champion.fid:
        return False, f"FID {challenger.fid:.4g} is a tie"
    return False, f"FID {challenger.fid:.4g} is not better than {champion.fid:.4g}"
