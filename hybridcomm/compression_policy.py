"""What is compressed, and how: rules by name, role and size of a parameter. Pure data, equal on all ranks.

    CompressionPolicy(
        rules=(
            Rule(match="*.norm*", compress=None),
            Rule(role="bias", compress=None),
            Rule(role="embedding", compress="topk:0.001"),
            Rule(min_numel=65536, compress=Schedule((0, None), (100, "topk:0.01"))),
        ),
        default=None,
    )

The first rule that a parameter meets decides; parameters that no rule meets take ``default``.
"""

from __future__ import annotations

import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from hybridcomm.auto import is_auto
from hybridcomm.compress import Compress
from hybridcomm.errors import CompressorError
from hybridcomm.schedule import Schedule

__all__ = ["ROLES", "Choice", "CompressionPolicy", "ParameterFacts", "Rule"]

ROLES = ("norm", "bias", "embedding", "matrix", "vector")
"""By the parameter's module and shape: "norm" in its class's name, named bias, of an embedding; else of two or more
dimensions (convolutions too), or of fewer."""

Choice = Compress | Schedule


class ParameterFacts(NamedTuple):
    """What rules ask of a parameter."""

    name: str
    numel: int
    role: str


@dataclass(frozen=True, kw_only=True)
class Rule:
    """Parameters that meet all conditions are compressed by ``compress`` (None: stay dense).

    ``match``: an fnmatch pattern of the name. ``role``: one of `ROLES`. ``min_numel``, ``max_numel``: elements,
    both included. ``optional``: it may decide about no parameter; else that is an error, as it is a typing mistake
    more often than not.
    """

    compress: Choice
    match: str = "*"
    role: str | None = None
    min_numel: int = 0
    max_numel: int | None = None
    optional: bool = False

    def __post_init__(self) -> None:
        if self.role is not None and self.role not in ROLES:
            raise CompressorError(f"role={self.role!r}: choose one of {', '.join(ROLES)}")
        if self.min_numel < 0 or (self.max_numel is not None and self.max_numel < self.min_numel):
            sizes = f"min_numel={self.min_numel}, max_numel={self.max_numel}"
            raise CompressorError(f"{sizes}: 0 <= min_numel <= max_numel must hold")
        object.__setattr__(self, "compress", _canonical(self.compress))

    def meets(self, parameter: ParameterFacts) -> bool:
        return (
            fnmatch.fnmatchcase(parameter.name, self.match)
            and self.role in (None, parameter.role)
            and self.min_numel <= parameter.numel
            and (self.max_numel is None or parameter.numel <= self.max_numel)
        )

    def to_dict(self) -> dict[str, Any]:
        """Conditions that are set, and the compressor's text; for JSON."""
        fields = {
            name: getattr(self, name) for name in ("match", "role", "min_numel", "max_numel", "optional")
        }
        defaults = Rule(compress=None)
        kept = {name: value for name, value in fields.items() if value != getattr(defaults, name)}
        return {**kept, "compress": str(_canonical(self.compress))}

    def __str__(self) -> str:
        return f"rule {json.dumps(self.to_dict())}"


@dataclass(frozen=True, kw_only=True)
class CompressionPolicy:
    """Which parameters a `Reducer` compresses, and how; see the module."""

    rules: tuple[Rule, ...] = ()
    default: Choice = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "rules", tuple(self.rules))
        object.__setattr__(self, "default", _canonical(self.default))

    @classmethod
    def of(cls, compress: Choice | CompressionPolicy) -> CompressionPolicy:
        """A policy as it is; anything else for all but norms, biases and other vectors, which stay dense.

        They are a thousandth of the elements and train badly with late gradients. To compress everything, pass
        ``CompressionPolicy(default=...)``.
        """
        if isinstance(compress, CompressionPolicy):
            return compress
        spared = () if compress is None else ("norm", "bias", "vector")
        rules = tuple(Rule(role=role, compress=None, optional=True) for role in spared)
        return cls(rules=rules, default=compress)

    def assign(self, parameters: Sequence[ParameterFacts]) -> dict[str, str | Schedule]:
        """Each parameter's schedule, or its "auto" text; raises `CompressorError` for a rule that decides nothing."""
        deciding = {p.name: next((rule for rule in self.rules if rule.meets(p)), None) for p in parameters}
        used = {id(rule) for rule in deciding.values()}
        for rule in self.rules:
            if id(rule) in used or rule.optional:
                continue
            met = [p.name for p in parameters if rule.meets(p)]
            why = f"rules before it decide about {', '.join(met[:5])}" if met else "no parameter meets it"
            raise CompressorError(f"{rule} has no effect: {why}; correct it, or set optional=True")
        return {
            name: _canonical(self.default if rule is None else rule.compress)
            for name, rule in deciding.items()
        }

    def to_dict(self) -> dict[str, Any]:
        """For JSON; `from_dict` reads it back, custom compressors apart."""
        return {"rules": [rule.to_dict() for rule in self.rules], "default": str(_canonical(self.default))}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> CompressionPolicy:
        """Raises `CompressorError` for an unknown field, or a text that names no codec."""
        try:
            rules = tuple(Rule(**rule) for rule in data.get("rules", ()))
            return cls(**{**data, "rules": rules})
        except TypeError as error:
            raise CompressorError(f"not a compression policy: {error}") from error

    def __str__(self) -> str:
        return json.dumps(self.to_dict())


def _canonical(choice: Choice) -> str | Schedule:
    return choice if isinstance(choice, str) and is_auto(choice) else Schedule.of(choice)
