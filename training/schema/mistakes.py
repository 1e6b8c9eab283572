"""What pydantic found, in the words of someone who wrote a YAML file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from rksp_core.errors import ConfigError
from training.names import choose, unknown_key


def sentence(error: ValidationError, root: type[BaseModel]) -> str:
    """Return one sentence about the first mistake in a document that ``root`` describes."""
    # An unknown key is often the cause of a missing one, so it is said first.
    findings = error.errors(include_url=False)
    first = min(findings, key=lambda finding: finding["type"] != "extra_forbidden")
    place = _place(first["loc"], root)
    where = ".".join(place)
    if first["type"] == "extra_forbidden":
        *section, key = place
        return unknown_key(".".join(section), key, _known_keys(first["loc"][:-1], root))
    if first["type"] == "union_tag_invalid":
        known = [tag.strip(" '") for tag in first["ctx"]["expected_tags"].split(",")]
        try:
            choose(first["ctx"]["tag"], known, f"{where}.name")
        except ConfigError as unknown:
            return str(unknown)
    if first["type"] == "missing":
        shared = getattr(_section(first["loc"][:-1], root), "shared", ())
        hint = "; give it, or name it among model.arguments" if place[-1] in shared else ""
        return f"the key {where!r} is missing{hint}"
    if first["type"] == "value_error":
        return str(first["ctx"]["error"])
    if first["type"] in {"model_type", "model_attributes_type"}:
        own = f"{{{_known_keys(first['loc'], root)[0]}: ...}}"
        return f"{where} must be a section with keys of its own, such as {own}, got {first['input']!r}"
    message = first["msg"].replace("Input should", "it should").replace("valid tuple", "list")
    return f"{where} cannot be {first['input']!r}: {message[0].lower()}{message[1:]}"


def section_named(annotation: Any, name: object) -> type[BaseModel] | None:
    """Return the section of a union that goes by this name."""
    return next((section for section in _sections(annotation) if _name(section) == name), None)


def _place(location: Sequence[int | str], root: type[BaseModel]) -> list[str]:
    """Return the keys of a finding as the user wrote them: without the names that pydantic puts in for a union."""
    parts = [str(part) for part in location]
    field = root.model_fields.get(parts[0]) if len(parts) > 1 else None
    tagged = field is not None and section_named(field.annotation, parts[1]) is not None
    return [parts[0], *parts[2:]] if tagged else parts


def _known_keys(location: Sequence[int | str], root: type[BaseModel]) -> list[str]:
    section = _section(location, root)
    return ["name"] if section is None else list(section.model_fields)


def _section(location: Sequence[int | str], root: type[BaseModel]) -> type[BaseModel] | None:
    """Return the section at a place in a finding, where a name chooses among the classes of a union."""
    section: type[BaseModel] | None = root
    choices: list[type[BaseModel]] = [root]
    for part in map(str, location):
        named = [each for each in choices if _name(each) == part] if len(choices) > 1 else []
        if not named and section is not None and part in section.model_fields:
            named = _sections(section.model_fields[part].annotation)
        choices = named
        section = choices[0] if len(choices) == 1 else None
    return section


def _sections(annotation: Any) -> list[type[BaseModel]]:
    """Return the sections that an annotation such as ``A``, ``A | None`` or ``Annotated[A | B, ...]`` allows."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections(part)]


def _name(section: type[BaseModel]) -> object:
    field = section.model_fields.get("name")
    return None if field is None else field.default
