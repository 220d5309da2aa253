"""From a command line to a TrainConfig, with one-line errors."""

from __future__ import annotations

import contextlib
import difflib
import io
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tyro
from pydantic import BaseModel, ValidationError

from model.config import MODEL_PRESETS
from train.config import PRESETS, TrainConfig
from train.errors import ConfigError

__all__ = ["parse"]

_EXTRA = {"--help", "-h", "--config", "--print-config", "--model.preset"}
_DESCRIPTION = """Trains a sequential recommender over several ranks; evaluates it by full ranking.

Without arguments: 4 ranks as 2 virtual nodes of 2, generated data, top-k 1 % with error feedback between
nodes. Started by torchrun it joins as one rank. Also understood: --config FILE (JSON, as printed by
--print-config), --print-config, and --model.preset NAME (small, wide, deep)."""


def parse(argv: Sequence[str]) -> TrainConfig | None:
    """The configuration that ``argv`` asks for; None when ``--print-config`` was answered.

    Raises ConfigError with one line that names the option; ``--help`` prints and exits with 0.
    """
    args = list(argv)
    _refuse_unknown(args)
    preset = _take(args, "--preset", "demo")
    file = _take(args, "--config", None)
    shape = _take(args, "--model.preset", None)
    printing = "--print-config" in args
    args = [arg for arg in args if arg != "--print-config"]
    layers = [("preset", {**_named(PRESETS, preset, "--preset"), "preset": preset})]
    if shape is not None:
        layers.append(("model.preset", {"model": _named(MODEL_PRESETS, shape, "--model.preset")}))
    if file is not None:
        layers.append(("file", _read_file(Path(file))))
    base: dict[str, Any] = {}
    for _, layer in layers:
        base = _merge(base, layer)
    default = _validated(base)
    config = _apply_command_line(args, default)
    if not printing:
        return config
    print(config.model_dump_json(indent=2))
    _print_origins(layers, default, config)
    return None


def _apply_command_line(args: list[str], default: TrainConfig) -> TrainConfig:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                TrainConfig,
                prog="python -m train.run",
                description=_DESCRIPTION,
                default=default,
                args=args,
                config=(tyro.conf.FlagConversionOff,),
            )
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None
    except SystemExit as stop:
        if stop.code in (0, None):
            raise
        raise ConfigError(_plain(said.getvalue())) from None


def _plain(said: str) -> str:
    """tyro's framed message as one line."""
    text = " ".join(re.sub(r"[╭╮╰╯│─]+|\x1b\[[0-9;]*m", " ", said).split())
    found = re.search(r"Error parsing (\S+): \d+ validation errors? for \w+ (.*?) \[type=", text)
    if found:  # pydantic: "Value error, ..." of a whole group, or "field what is wrong" of a field
        group = "" if found[1] == "TrainConfig" else f"{found[1]}."
        whole, _, message = found[2].partition("Value error, ")
        field, _, problem = found[2].partition(" ")
        return message if not whole else f"--{group}{field.replace('_', '-')}: {problem}"
    text = re.split(r"Argument helptext|For full helptext", text)[0]
    text = re.sub(r"^.*?(Error parsing|invalid choice|Unrecognized options:|Missing)", r"\1", text)
    return text.strip(" .") or "the command line cannot be parsed"


def _refuse_unknown(args: Sequence[str]) -> None:
    known = sorted(_EXTRA | set(_options(TrainConfig)))
    for arg in args:
        name = arg.partition("=")[0].replace("_", "-")
        if name.startswith("--") and name not in known:
            close = [option for option in known if option.endswith(f".{name.lstrip('-')}")]
            close = close or difflib.get_close_matches(name, known, n=1, cutoff=0.5)
            hint = f"; did you mean {close[0]}?" if close else "; see --help"
            raise ConfigError(f"unknown option {arg.partition('=')[0]}{hint}")


def _options(model: type[BaseModel], prefix: str = "--") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            found += _options(field.annotation, f"{prefix}{name.replace('_', '-')}.")
        else:
            found.append(prefix + name.replace("_", "-"))
    return found


def _take(args: list[str], name: str, default: str | None) -> Any:
    """Removes ``name VALUE`` or ``name=VALUE`` from ``args``; the last one counts."""
    value = default
    index = 0
    while index < len(args):
        if args[index] == name:
            if index + 1 == len(args):
                raise ConfigError(f"{name} needs a value")
            value = args[index + 1]
            del args[index : index + 2]
        elif args[index].startswith(f"{name}="):
            value = args.pop(index).partition("=")[2]
        else:
            index += 1
    return value


def _named(choices: dict[str, dict[str, Any]], name: str, option: str) -> dict[str, Any]:
    if name in choices:
        return choices[name]
    close = difflib.get_close_matches(name, choices, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise ConfigError(f"{option} {name!r}: {hint}there are {', '.join(choices)}")


def _read_file(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigError(f"--config {path}: {error.strerror}") from None
    except ValueError as error:
        raise ConfigError(f"--config {path}: not valid JSON: {error}") from None
    if not isinstance(content, dict):
        raise ConfigError(f"--config {path}: expected a JSON object")
    return content


def _merge(base: dict[str, Any], layer: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in layer.items():
        old = merged.get(key)
        merged[key] = _merge(old, value) if isinstance(old, dict) and isinstance(value, dict) else value
    return merged


def _validated(content: dict[str, Any]) -> TrainConfig:
    try:
        return TrainConfig.model_validate(content)
    except ValidationError as error:
        raise ConfigError(_one_line(error)) from None


def _one_line(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"])
    message = first["msg"].removeprefix("Value error, ")
    return f"--{where.replace('_', '-')}: {message}" if where else message


def _flat(content: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in content.items():
        flat.update(_flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value})
    return flat


def _print_origins(
    layers: Sequence[tuple[str, dict[str, Any]]], default: TrainConfig, config: TrainConfig
) -> None:
    """To stderr, so that stdout stays a valid file: where each value that is no default comes from."""
    origins = {key: name for name, layer in layers for key in _flat(layer)}
    before, after = _flat(default.model_dump(mode="json")), _flat(config.model_dump(mode="json"))
    origins.update({key: "command line" for key in after if after[key] != before[key]})
    for key, origin in sorted(origins.items()):
        print(f"# {key} = {after[key]!r} from {origin}", file=sys.stderr)
