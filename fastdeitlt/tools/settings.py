"""`config`: settings with documentation and origin, and the shipped recipes."""

from collections.abc import Sequence

from rich.console import Console
from rich.table import Column, Table
from rich.text import Text

from fastdeitlt import config
from fastdeitlt.config import Config
from fastdeitlt.errors import UserError, printable


def show(words: Sequence[str], changed: bool = False, as_yaml: bool = False) -> None:
    """Print the settings of a recipe, or the defaults.

    Args:
        words: recipe or YAML file, sections or settings to show, and overrides; all optional.
        changed: only settings that differ from the defaults.
        as_yaml: print YAML for ``train``.

    Raises:
        UserError: no such recipe, section or setting.
    """
    overrides = [word for word in words if "=" in word]
    names = [word for word in words if "=" not in word]
    has_recipe = bool(names) and not (_is_setting(names[0]) and names[0] not in config.recipes())
    recipe, parts = (names[0], names[1:]) if has_recipe else (None, names)
    if unknown := next((name for name in parts if not _is_setting(name)), None):
        all_names = (*config.SECTIONS, *config.FIELDS)
        raise UserError(f"config show: no section or setting {unknown!r}{config.near(unknown, all_names)}")
    settings = config.parse_overrides(overrides)
    cfg = config.load(recipe, overrides) if recipe else config.build(settings, dict.fromkeys(settings, "override"))
    values, defaults = config.flatten(cfg), config.flatten(Config())
    selected = [
        name
        for name in values
        if (not parts or any(f"{name}.".startswith(f"{part}.") for part in parts))
        and not (changed and values[name] == defaults[name])
    ]
    if as_yaml:
        print(config.dump_values({name: values[name] for name in selected}), end="")
        return
    table = Table(*(Column(title, overflow="fold") for title in ("name", "value", "from", "meaning")))
    for name in selected:
        table.add_row(name, Text(printable(values[name])), cfg.origins[name], Text(config.describe(name)))
    Console().print(table)


def _is_setting(name: str) -> bool:
    return name in config.FIELDS or name in config.SECTIONS


def list_recipes() -> None:
    """Print the shipped recipes with model, data set and epochs."""
    table = Table(Column("recipe", no_wrap=True), "trains", "images", "epochs")
    for name, path in config.recipes().items():
        if name.startswith("ablation/"):
            table.add_row(name, "grid", str(config.read_yaml(path).get("student", "")), "")
            continue
        cfg = config.load(name)
        kind, epochs = ("teacher", cfg.teacher_training.epochs) if cfg.is_teachers else ("student", cfg.train.epochs)
        table.add_row(name, kind, cfg.data.title, str(epochs))
    Console().print(table)
