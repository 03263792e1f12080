"""Loading and dumping of configurations: YAML files, recipes and overrides."""

import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from fastdeitlt.config.schema import EVALUATION, FIELDS, SECTIONS, STUDENT_ONLY, TEXTS, Config, field_info, near
from fastdeitlt.config.section import SHORT
from fastdeitlt.config.student import DataConfig
from fastdeitlt.config.teacher_training import TeacherTrainingConfig
from fastdeitlt.errors import UserError

Recipe = str | Path | Config
"""A shipped recipe by name, a YAML file, or a configuration."""
Settings = Sequence[str] | Mapping[str, Any]
"""Changes of a recipe: ``section.field=value``, or values by dotted name or by section as a mapping."""


def _flatten(tree: dict[str, Any], prefix: str = "", where: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        is_section = name in Config.model_fields and any(f.startswith(f"{name}.") for f in FIELDS)
        part = _flatten(value or {}, f"{name}.") if is_section and isinstance(value, dict | None) else {name: value}
        if twice := next((name for name in part if name in flat), None):
            raise UserError(f"{where}{twice} is set twice, by its dotted name and in its section. Remove one.")
        flat |= part
    return flat


class _Loader(yaml.SafeLoader):
    """YAML loader that refuses duplicate names and reads 5e-4 as a number, not text."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            name = getattr(key, "value", None)
            if isinstance(name, str) and name != "<<":  # "<<" merges another mapping, with lower precedence
                if name in seen:
                    raise UserError(f"{name} is set twice (line {key.start_mark.line + 1}). Remove one.")
                seen.add(name)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """YAML dumper that quotes text which ``_Loader`` would read as a number."""


for _side in (_Loader, _Dumper):
    _side.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"[-+]?\d+(\.\d*)?[eE][-+]?\d+$"), [*"+-0123456789"]
    )


def read_yaml(path: Path) -> dict[str, Any]:
    """Read the mapping in a YAML file; empty for an empty file.

    Raises:
        UserError: the file cannot be read, is not YAML, has a duplicate name, or is not a mapping.
    """
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"config file {path}: cannot be read ({error}), expected a YAML file") from None
    except yaml.YAMLError as error:
        raise UserError(f"config file {path}: not valid YAML ({_yaml_fault(error)})") from None
    except RecursionError:
        raise UserError(f"config file {path}: nested too deeply, expected two levels") from None
    except UserError as error:
        raise UserError(f"config file {path}: {error}") from None
    except (ValueError, ArithmeticError) as error:  # an integer of thousands of digits, the 99th of a month
        raise UserError(f"config file {path}: not a number or date ({str(error).partition(';')[0]})") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"config file {path}: got a {type(tree).__name__}, expected sections of 'name: value'")
    return {str(key): value for key, value in tree.items()}


def _yaml_fault(error: yaml.YAMLError) -> str:
    """Format a YAML error with line and column, counted from 1."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if not problem or not mark:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {problem}"


def recipes() -> dict[str, Path]:
    """Return the shipped recipes by name, such as ``teacher/cifar10_lt_r100``."""
    shipped = Path(__file__).parents[1] / "configs"
    if not shipped.is_dir():
        shipped = Path(__file__).parents[2] / "configs"
    return {str(p.relative_to(shipped).with_suffix("")): p for p in sorted(shipped.rglob("*.yaml"))}


def find(path: str) -> Path:
    """Find a config file by path, or a shipped recipe by name.

    Raises:
        UserError: neither exists; the message has the nearest recipe.
    """
    file = os.path.expanduser(path)
    if os.path.isfile(file):
        return Path(file)
    name, shipped = path.removesuffix(".yaml"), recipes()
    if name in shipped:
        return shipped[name]
    raise UserError(f"config {path}: no such file or recipe{near(name, list(shipped))}; list: fastdeitlt config list")


def load(recipe: Recipe, settings: Settings = ()) -> Config:
    """Load a recipe and apply settings in order.

    Raises:
        UserError: no such file; not YAML; a grid; a name given twice; an unknown name (with the nearest one); a value
            of the wrong type or range.
    """
    return _load(recipe, _by_name(settings))


def load_student(
    recipe: Recipe, settings: Settings = (), with_teacher: Recipe | None = None
) -> tuple[Config, Config | None]:
    """Load a student's recipe, and that of the teacher to train first.

    Settings of ``teacher_training`` apply to the teacher, all others to the student.

    Raises:
        UserError: see ``load``; a recipe of the other kind; settings of a teacher without one; a teacher's path in
            addition to a recipe.
    """
    values = _by_name(settings)
    of_teacher = {name: value for name, value in values.items() if name.startswith("teacher_training.")}
    cfg = _load(recipe, {name: value for name, value in values.items() if name not in of_teacher})
    if cfg.is_teachers:
        raise UserError(f"train: got {_title(recipe)}, a recipe of a teacher, expected a student's. Use train-teacher.")
    if with_teacher is None:
        if of_teacher:
            raise UserError(
                f"{next(iter(of_teacher))}: no effect on a student, expected with --with-teacher RECIPE (Python: "
                "with_teacher=RECIPE)"
            )
        return cfg, None
    if cfg.teacher.path:
        raise UserError(
            f"teacher.path: got {cfg.teacher.path!r} with --with-teacher, which trains a teacher. Use one of the two."
        )
    return cfg, _teachers(with_teacher, of_teacher)


def load_teacher(recipe: Recipe, settings: Settings = ()) -> Config:
    """Load a teacher's recipe.

    Its file may have settings of a student, ``settings`` may not.

    Raises:
        UserError: see ``load``; a student's recipe; a setting without effect on a teacher.
    """
    values = _by_name(settings)
    if ignored := next((name for name in values if name.startswith(STUDENT_ONLY)), None):
        own = f"teacher_training.{ignored.partition('.')[2]}"
        raise UserError(f"{ignored}: no effect on a teacher. {f'Use {own}' if own in FIELDS else 'Remove it'}.")
    return _teachers(recipe, values)


def _teachers(recipe: Recipe, values: dict[str, Any]) -> Config:
    cfg = _load(recipe, values)
    origins = {source for name, source in cfg.origins.items() if name.startswith("teacher_training.")}
    if cfg.teacher_training == TeacherTrainingConfig() and origins <= {"default"}:
        raise UserError(
            f"train-teacher: got {_title(recipe)}, which sets nothing of teacher_training, expected a recipe of a "
            "teacher. List: fastdeitlt config list."
        )
    return cfg


def _title(recipe: Recipe) -> str:
    return f"the recipe {recipe.name}" if isinstance(recipe, Config) else str(recipe)


def load_evaluation(recipe: Recipe, settings: Settings = ()) -> Config:
    """Load the images on which to score a finished model.

    Preprocessing is as the model's folder states.

    Raises:
        UserError: see ``load``; a setting without effect on a finished model.
    """
    values = _by_name(settings)
    if ignored := next((name for name in values if name == "data.exif" or not name.startswith(EVALUATION)), None):
        raise UserError(
            f"{ignored}: no effect on a finished model, expected data (without data.exif), evaluate.batch_size, "
            "train.device or train.precision. Remove it."
        )
    return _load(recipe, values)


def _load(recipe: Recipe, values: dict[str, Any]) -> Config:
    if isinstance(recipe, Config):
        flat, origins = flatten(recipe), recipe.origins
    else:
        file = find(str(recipe))
        tree = read_yaml(file)
        if "arms" in tree:
            raise UserError(f"config file {file}: got a grid, expected a recipe. Use fastdeitlt ablate {recipe}.")
        flat = _flatten(tree, where=f"config file {file}: ")
        origins = dict.fromkeys(flat, file.name)
    cfg = build(flat | values, origins | dict.fromkeys(values, "override"))
    for name in cfg.data.ignored:
        if f"data.{name}" in values and getattr(cfg.data, name) != getattr(DataConfig(), name):
            raise UserError(
                f"data.{name}: no effect on data.dataset={cfg.data.dataset}. Remove it, or set another one."
            )
    return cfg


def _by_name(settings: Settings) -> dict[str, Any]:
    return _flatten(dict(settings)) if isinstance(settings, Mapping) else parse_overrides(settings)


def parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    """Parse ``section.field=value`` texts to values by dotted name, without checks.

    Raises:
        UserError: no equals sign, or a value that is not YAML.
    """
    values: dict[str, Any] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            fix = f". For these images: data.root={override}" if os.path.isdir(override) else ""
            raise UserError(f"override {override!r}: no equals sign, expected section.field=value{fix}")
        if name in TEXTS and text.strip()[:1] not in ("'", '"'):
            values[name] = text.strip()  # text fields verbatim: a run may be called nan or 2026
            continue
        try:
            values[name] = yaml.load(text, _Loader)
        except yaml.YAMLError:
            raise UserError(f"override {override!r}: the value is not valid YAML. Quote it.") from None
        except RecursionError:
            raise UserError(
                f"override {override[:40]!r}...: nested too deeply, expected a number, text or list"
            ) from None
        except UserError:
            raise
        except (ValueError, ArithmeticError) as error:
            raise UserError(
                f"override {override[:40]!r}: not a number or date ({str(error).partition(';')[0]})"
            ) from None
    return values


def build(flat: dict[str, Any], origins: dict[str, str] | None = None) -> Config:
    """Build a validated Config from values by dotted name.

    Raises:
        UserError: see ``load``.
    """
    origins = origins or {}
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        where = f" (in {origins[name]})" if origins.get(name, "override") != "override" else ""
        if name in SECTIONS:
            got = SHORT.repr(value)
            setting = next(field for field in FIELDS if field.startswith(f"{name}."))
            raise UserError(f"{name}: got {got}{where}, expected a section of settings, such as {setting}={got}")
        if name not in FIELDS:
            raise UserError(f"unknown config name {name!r}{where}{near(name, FIELDS)}")
        section, _, field = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[field] = value
    try:
        config = Config.model_validate(tree)
    except ValidationError as error:
        first = error.errors()[0]
        name = ".".join(str(part) for part in first["loc"])
        message = first["msg"].removeprefix("Value error, ").replace("Input should be", "expected")
        if first["type"] in ("missing", "tuple_type", "too_long"):
            name = next(field for field in FIELDS if f"{name}.".startswith(f"{field}."))
            default = field_info(name).default
            example = yaml.safe_dump([*default] or [[0, 0.05]], default_flow_style=True).strip()
            raise UserError(f"{name}: got {SHORT.repr(flat[name])}, expected a list like {example}") from None
        if first["type"] == "string_pattern_mismatch":
            message = "expected letters, digits, dots, dashes and underscores, beginning with a letter or digit"
        if first["type"] == "value_error" and not isinstance(first["input"], tuple | list):
            # an error of a whole section: its message has the field and value
            raise UserError(f"{name}.{message}" if name else message) from None
        raise UserError(f"{name}: got {SHORT.repr(first['input'])}, {message}") from None
    config._origins.update({name: origins.get(name, "default") for name in FIELDS})
    return config


def flatten(config: Config) -> dict[str, Any]:
    """Return the values by dotted field name, in schema order."""
    return _flatten(config.model_dump(mode="json"))


def dump(config: Config) -> str:
    """Dump the configuration as YAML that ``load`` reads back to an equal Config."""
    return dump_values(flatten(config))


def dump_values(values: dict[str, Any]) -> str:
    """Dump settings by dotted name as YAML for ``load``."""
    tree: dict[str, Any] = {}
    for name, value in values.items():
        section, _, field = name.rpartition(".")
        (tree.setdefault(section, {}) if section else tree)[field] = value
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def dump_value(value: Any) -> str:
    """Dump the value of a setting as YAML on one line, for ``load``."""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6, allow_unicode=True)
    return text.removesuffix("...\n").strip()
